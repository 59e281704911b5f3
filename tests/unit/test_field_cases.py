"""Read what people brought to tools of this kind (tests/data/field), and require what should happen in each case."""

from __future__ import annotations

import base64
import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.data.external_pairs import TextPair, read_text_pairs
from csr_vlm.data.images import load_image
from csr_vlm.data.prompts import InputReport, read_prompts
from csr_vlm.evaluation.answers import read_captions, read_evaluation_prompts
from csr_vlm.evaluation.pope import read_answers, read_questions

FIELD = Path(__file__).parents[1] / "data" / "field"


def prompts(path: Path, **settings: Any) -> tuple[list[Prompt], InputReport]:
    report = InputReport()
    return list(read_prompts(DataConfig(prompts=str(path), **settings), report)), report


def pairs(path: Path, **settings: Any) -> tuple[list[TextPair], InputReport]:
    report = InputReport()
    return list(read_text_pairs(DataConfig(prompts=str(path), pairs=str(path), **settings), report)), report


def test_a_json_text_is_read_as_its_fields() -> None:
    path = FIELD / "04-rlhf-v-text-is-json" / "prompts.jsonl"
    assert [prompt.text for prompt in prompts(path)[0]] == ["What is it?"] * 2
    assert [(pair.chosen, pair.rejected) for pair in pairs(path)[0]] == [("A boat.", "A boat and a fish.")] * 2


@pytest.mark.parametrize(
    ("name", "image_id"), [("prompts", "a.jpg"), ("file_name", "a.jpg"), ("dict", "b.jpg"), ("bom", "a.jpg")]
)
def test_evaluation_prompts_are_read_as_prompts_are(name: str, image_id: str) -> None:
    (found,) = read_evaluation_prompts(FIELD / "05-eval-answer-keyerror" / f"{name}.jsonl")
    assert (found.prompt.text, found.image_id) == ("What is it?", image_id)


@pytest.mark.parametrize("name", ["lf.json", "swift.jsonl", "trl.jsonl", "trl-implicit.jsonl"])
def test_preference_files_without_ids_are_numbered(name: str) -> None:
    (pair,), report = pairs(FIELD / "06-pairs-of-others-have-no-id" / name)
    assert (pair.prompt.text, pair.chosen, pair.rejected) == ("What is it?", "A boat.", "A fish.")
    assert pair.prompt.prompt_id
    assert not report.dropped


def test_repeated_ids_are_numbered() -> None:
    found, report = prompts(FIELD / "07-duplicate-ids-of-llava" / "prompts.json")
    assert (len(found), report.dropped) == (12, {})
    assert [prompt.prompt_id for prompt in found[:3]] == ["000000000000", "000000000000#2", "000000000000#3"]


def test_links_to_pictures_and_to_shared_folders_are_followed(tmp_path: Path) -> None:
    """The case itself consists of links, which not every copy of a repository keeps."""
    picture = FIELD / "09-folder-with-heic" / "a.jpg"
    for folder in ("real", "photos", "pg"):
        (tmp_path / folder).mkdir()
    shutil.copy(picture, tmp_path / "real" / "a.jpg")
    (tmp_path / "photos" / "a.jpg").symlink_to("../real/a.jpg")
    (tmp_path / "pg" / "coco").symlink_to("../real")
    row = {"id": 1, "image": "coco/a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    (tmp_path / "pg" / "llava.json").write_text(json.dumps([row]))
    assert [Path(prompt.image) for prompt in prompts(tmp_path / "photos")[0]] == [tmp_path / "real" / "a.jpg"]
    assert [prompt.text for prompt in prompts(tmp_path / "pg" / "llava.json")[0]] == ["What?"]
    _, report = prompts(tmp_path / "pg" / "llava.json", follow_links=False)
    assert report.dropped == {"link out of the image root, with data.follow_links=false": 1}


def test_a_folder_says_what_it_leaves_out() -> None:
    found, _ = prompts(FIELD / "09-folder-with-heic" / "photos")
    assert [Path(prompt.image).suffix for prompt in found] == [".HEIC", ".heif", ".jfif", ".avif", ".JPG"]
    found, report = prompts(FIELD / "09-folder-with-heic" / "mix")
    assert len(found) == 1
    assert "if it holds the prompts, set data.prompts to this file" in report.examples[0]


def test_damaged_metadata_costs_no_pixels() -> None:
    folder = FIELD / "10-metadata-damages-no-pixels"
    found, report = prompts(folder / "prompts.jsonl")
    assert (len(found), report.dropped) == (3, {})
    assert all(load_image(prompt.image, 10**6).getextrema() for prompt in found)


def test_what_is_obvious_is_read_and_all_else_has_a_reason_of_its_own() -> None:
    found, report = prompts(FIELD / "11-reasons-that-mislead" / "prompts.jsonl")
    assert [prompt.prompt_id for prompt in found] == ["1", "2", "3", "prompts-4", "5", "7", "8"]
    assert report.dropped == {"image is a URL, which is not fetched; download it": 1, "unreadable (damaged)": 1}
    assert [example.partition(":")[0] for example in report.examples] == [
        "prompts.jsonl line 6",
        "prompts.jsonl line 9",
    ]


def test_a_byte_order_mark_in_evaluation_files_is_ignored() -> None:
    folder = FIELD / "14-bom-in-evaluation-files"
    assert [question.text for question in read_questions(folder / "q.json").questions] == ["Is there a boat?"]
    assert list(read_answers(folder / "a.jsonl")) == ["1"]


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": 1.0, "image": {"path": "a.jpg"}, "question": "<image>Is there a boat?", "label": "Yes"},
        {"question_id": "1", "images": ["a.jpg"], "text": "Is there a boat?", "answer": "yes"},
    ],
)
def test_benchmark_questions_are_read_as_prompts_are(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    (question,) = read_questions(tmp_path / "q.jsonl").questions
    assert (question.question_id, question.image, question.text, question.label) == (
        "1",
        "a.jpg",
        "Is there a boat?",
        True,
    )


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"id": 1, "text": "x?", "label": "yes"}, "question_id is missing"),
        ({"question_id": 1, "text": "x?", "gt": "yes"}, "label is missing, or neither yes nor no"),
        ({"question_id": 1, "caption": "x?", "label": "no"}, "text is missing"),
    ],
)
def test_a_benchmark_question_names_its_row_and_keys(tmp_path: Path, row: dict[str, Any], missing: str) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(CsrError, match=f"row 1: {missing}") as error:
        read_questions(tmp_path / "q.jsonl")
    assert error.value.hint.endswith(f"the row has {', '.join(row)}")


@pytest.mark.parametrize(
    "row",
    [
        {"image_id": 42.0},
        {"image_id": 42},
        {"image": "COCO_val2014_000000000042.jpg"},
        {"file_name": "x\\000000000042.jpg"},
    ],
)
def test_captions_name_their_image_as_prompts_do(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({**row, "caption": "A boat."}))
    assert [caption.image_id for caption in read_captions(tmp_path / "c.jsonl")] == [42]


@pytest.mark.parametrize(
    "name",
    [
        *("csr_orig.json", "lf_alpaca.json", "mmpr.jsonl", "povid.json", "rlhfv.parquet", "sentinel.json"),
        *("trl_strings.parquet", "trl_system.parquet"),
    ],
)
def test_pairs_of_others_are_all_read(name: str) -> None:
    found, report = pairs(FIELD / "15-pairs-of-others" / name)
    assert (len(found), report.dropped) == (4, {})
    for pair in found:
        assert "boat" in pair.chosen
        assert "fish" in pair.rejected
        assert pair.prompt.text.endswith("Describe this image in detail.")
        assert pair.prompt.text.startswith("You are helpful.") == (name == "trl_system.parquet")
        assert pair.chosen_ends is pair.rejected_ends is (name != "sentinel.json")


def test_hadpo_descriptions_name_the_image_that_is_missing(tmp_path: Path) -> None:
    folder = FIELD / "15-pairs-of-others"
    _, report = pairs(folder / "hadpo_desc.json")
    assert report.dropped == {"missing": 2}
    assert "2355.jpg" in report.examples[0]
    for name in ("2355", "2356"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.jpg")
    found, report = pairs(folder / "hadpo_desc.json", image_root=str(tmp_path))
    assert (len(found), report.dropped) == (2, {})


def test_a_pointer_in_place_of_a_picture_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    (tmp_path / "p.jsonl").write_text('{"image": "a.jpg", "text": "What is it?"}')
    _, report = prompts(tmp_path / "p.jsonl")
    assert report.dropped == {"a Git LFS pointer; fetch the images with git lfs pull": 1}


ASKED = [{"role": "user", "content": "<image>What is it?"}]
ANSWERS = {
    "chosen": [{"role": "assistant", "content": "A boat."}],
    "rejected": [{"role": "assistant", "content": "A fish."}],
}
TURNS = {name: [*ASKED, *answer] for name, answer in ANSWERS.items()}


def one_pair(tmp_path: Path, row: dict[str, Any]) -> tuple[list[tuple[str, str, str]], InputReport]:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "p.jsonl").write_text(json.dumps({"images": ["a.jpg"], **row}))
    found, report = pairs(tmp_path / "p.jsonl")
    return [(pair.prompt.text, pair.chosen, pair.rejected) for pair in found], report


@pytest.mark.parametrize(
    "row",
    [
        {"query": "<image>What is it?", "response": "A boat.", "rejected_response": "A fish."},
        {"messages": json.dumps(TURNS["chosen"]), "rejected_response": "A fish."},
        {"messages": TURNS["chosen"], "rejected_messages": json.dumps(TURNS["rejected"])},
        {"prompt": json.dumps(ASKED), **{name: json.dumps(answer) for name, answer in ANSWERS.items()}},
        {name: json.dumps(turns) for name, turns in TURNS.items()},
        {"text": "\ufeff" + json.dumps({"question": "What is it?", "chosen": "A boat.", "rejected": "A fish."})},
        {"images": '["a.jpg"]', "question": "What is it?", "chosen": "A boat.", "rejected": "A fish."},
        {"conversations": [{"from": "Human", "value": "What is it?"}], **{k: v[0] for k, v in ANSWERS.items()}},
    ],
)
def test_pairs_of_older_releases_and_json_in_tables_are_read(tmp_path: Path, row: dict[str, Any]) -> None:
    found, report = one_pair(tmp_path, row)
    assert (found, report.dropped) == ([("What is it?", "A boat.", "A fish.")], {})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": TURNS["chosen"], "rejected": [{"role": "user", "content": "And?"}, *ANSWERS["rejected"]]},
            "chosen and rejected answer different questions",
        ),
        (
            {"messages": TURNS["chosen"], "rejected_response": "A fish.", "rejected_images": ["b.jpg"]},
            "another image for the rejected response",
        ),
        ({"text": '{"question": "What is it?", "chosen": "A bo'}, "text is a JSON object that is not complete"),
        ({"chosen": "What is it? A boat.", "rejected": "What is it? A fish."}, "empty prompt"),
    ],
)
def test_pairs_that_would_be_misread_have_a_reason(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    found, report = one_pair(tmp_path, row)
    assert (found, report.dropped) == ([], {reason: 1})


def image_row(tmp_path: Path, image: Any) -> tuple[list[Prompt], InputReport]:
    for name in ("a b.png", "\u00fc.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": 1, "image": image, "text": "What is it?"}))
    return prompts(tmp_path / "p.jsonl")


def encoded_png() -> str:
    """Return a PNG in Base64 with padding and with both characters that the URL-safe form replaces."""
    buffer = BytesIO()
    Image.frombytes("RGB", (8, 8), bytes(range(192))).save(buffer, "PNG")
    padding = b"\xff" * (3 - len(buffer.getvalue()) % 3) + b"\xff\xff\xff\xfb\xef\xbe\0"
    return base64.b64encode(buffer.getvalue() + padding).decode()


ENCODED = encoded_png()
assert ENCODED.endswith("=")
assert {"+", "/"} <= set(ENCODED)


@pytest.mark.parametrize(
    "image",
    [
        *("a%20b.png", "file:///{folder}/a%20b.png", "file:{folder}/a%20b.png", "u\u0308.png", "./a b.png"),
        f"DATA:image/png;charset=x;BASE64,{ENCODED}",
        f"data:image/png;base64,{quote(ENCODED, safe='')}",
        f"data:image/png;base64,{ENCODED[:76]}\n{ENCODED[76:]}",
        ENCODED.rstrip("="),
        ENCODED.replace("+", "-").replace("/", "_"),
    ],
)
def test_paths_and_encodings_that_are_obvious_are_read(tmp_path: Path, image: str) -> None:
    found, report = image_row(tmp_path, image.replace("{folder}", str(tmp_path)))
    assert (len(found), report.dropped) == (1, {})


@pytest.mark.parametrize(
    ("image", "reason", "example"),
    [
        ("hdfs://x/a.png", "image is a URL, which is not fetched; download it", ""),
        (5, "image that is neither a path nor bytes", "in image"),
        ({"filename": "a b.png"}, "image that is neither a path nor bytes", "in image"),
        (None, "no image", "the row has id, image, text"),
    ],
)
def test_an_image_that_is_not_read_has_a_reason_of_its_own(
    tmp_path: Path, image: Any, reason: str, example: str
) -> None:
    found, report = image_row(tmp_path, image)
    assert (found, report.dropped) == ([], {reason: 1})
    assert report.examples[0].endswith(example)


@pytest.mark.parametrize(
    ("row", "example"),
    [({"question": ["x"]}, "no question in question"), ({"caption": "x"}, "the row has image, caption")],
)
def test_a_missing_question_names_the_keys(tmp_path: Path, row: dict[str, Any], example: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": "a.png", **row}))
    _, report = prompts(tmp_path / "p.jsonl")
    assert report.dropped == {"empty prompt": 1}
    assert report.examples[0].endswith(example)
