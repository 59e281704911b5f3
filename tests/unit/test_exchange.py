"""Export pairs to the formats of other programs and read them back."""

from __future__ import annotations

import io
import json
import typing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from csr_vlm.cli.export import Format
from csr_vlm.config.schema import DataConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.data.external_pairs import TextPair, count_pairs, read_text_pairs
from csr_vlm.data.images import load_image
from csr_vlm.data.pair_export import write_pairs
from csr_vlm.data.preference import FormattedPair
from csr_vlm.data.prompts import InputReport, read_prompts
from csr_vlm.data.sources import PAIR_FORMATS, PAIR_READERS
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.pipeline.offline_pairs import check_pairs, has_offline_pairs
from tests.exchange_rows import OTHERS, OTHERS_OF_THEIR_OWN
from tests.unit.builders import config

FORMATS = sorted(PAIR_FORMATS)
EMBEDDING = {"trl", "rlaifv"}


MEASURED = {"chosen_reward": 2.0, "rejected_reward": 1.0, "margin": 1.0}


def response(text: str, reward: float = 0.0, complete: bool = True) -> Response:
    return Response("0", (1, 2), -1.5, text, 1, reward, complete)


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Return three pairs over two images; the first prompt has two pairs."""
    pairs = []
    for name, color, text in (
        ("a", "red", 'A "red" café.'),
        ("a", "red", "Red\nand <b>."),
        ("b/1", "blue", "一条船。"),
    ):
        path = tmp_path / f"{color}.png"
        Image.new("RGB", (4, 4), color).save(path)
        pairs.append(Pair(Prompt(name, str(path), "What is this?"), 2, response(text, 2.0), response("A boat.", 1.0)))
    return pairs


def export(pairs: list[Pair], form: str, out: Path, copy_images: bool = False, **options: Any) -> Path:
    settings = {"origin": "org/model", "rule": SentenceRule("."), "max_image_pixels": 10_000, **options}
    return write_pairs(iter(pairs), form, out, copy_images=copy_images, **settings)


def read_back(path: Path, images: Path | None = None, **settings: Any) -> tuple[list[TextPair], InputReport]:
    report = InputReport()
    data = DataConfig(prompts="-", pairs=str(path), **{"image_root": "/", **settings})
    return list(read_text_pairs(data, report, images=images)), report


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def test_configuration_and_export_list_the_same_formats() -> None:
    named = typing.get_args(DataConfig.model_fields["pairs_format"].annotation)
    assert set(named) - {"auto"} == set(PAIR_READERS)
    assert {form.value for form in Format} == set(PAIR_FORMATS)


# Round trips


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("named", [True, False])
def test_exported_pairs_are_read_back(pairs: list[Pair], tmp_path: Path, form: str, named: bool) -> None:
    path = export(pairs, form, tmp_path / "out")
    text_pairs, report = read_back(path, images=tmp_path / "kept", pairs_format=form if named else "auto")
    assert report.dump() == {"accepted": 3, "dropped": {}, "examples": []}
    for text, pair in zip(text_pairs, pairs, strict=True):
        assert (text.prompt.prompt_id, text.prompt.text) == (pair.prompt.prompt_id, pair.prompt.text)
        assert (text.chosen, text.rejected) == (pair.chosen.text, pair.rejected.text)
        assert load_image(text.prompt.image, 100).tobytes() == load_image(pair.prompt.image, 100).tobytes()
        if form != "rlaifv":
            assert text.prompt.image == pair.prompt.image
    assert count_pairs(DataConfig(prompts="-", pairs=str(path))) == 3


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_with_images_can_be_moved(pairs: list[Pair], tmp_path: Path, form: str) -> None:
    path = export(pairs, form, tmp_path / "out", copy_images=True)
    pixels = [load_image(pair.prompt.image, 100).tobytes() for pair in pairs]
    for pair in pairs:
        Path(pair.prompt.image).unlink(missing_ok=True)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    text_pairs, _ = read_back(moved / path.name, images=tmp_path / "kept", image_root=None)
    assert [load_image(text.prompt.image, 100).tobytes() for text in text_pairs] == pixels
    copied = [file for file in (moved / "images").rglob("*") if file.is_file()] if form not in EMBEDDING else []
    assert len(copied) == (0 if form in EMBEDDING else 2), "one copy of each picture"


@pytest.mark.parametrize("form", FORMATS)
def test_pairs_can_be_read_as_prompts(pairs: list[Pair], tmp_path: Path, form: str) -> None:
    path = export(pairs, form, tmp_path / "out", copy_images=True)
    report = InputReport()
    prompts = list(read_prompts(DataConfig(prompts=str(path)), report, images=tmp_path / "kept"))
    assert [(prompt.prompt_id, prompt.text) for prompt in prompts] == [("a", "What is this?"), ("b/1", "What is this?")]
    assert report.dropped == {"duplicate id": 1}


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_pairs_give_the_same_bytes(pairs: list[Pair], tmp_path: Path, form: str) -> None:
    first, again = (export(pairs, form, tmp_path / name, copy_images=True) for name in ("one", "two"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_an_empty_export_is_a_valid_file(tmp_path: Path, form: str) -> None:
    assert rows_of(export([], form, tmp_path)) == []


# The exact fields


def test_the_fields_of_trl(pairs: list[Pair], tmp_path: Path) -> None:
    from datasets import load_dataset

    path = export(pairs[:1], "trl", tmp_path / "out")
    assert rows_of(path) == [
        {
            "id": "a",
            "images": [{"bytes": None, "path": pairs[0].prompt.image}],
            "prompt": [{"role": "user", "content": "What is this?"}],
            "chosen": [{"role": "assistant", "content": 'A "red" café.'}],
            "rejected": [{"role": "assistant", "content": "A boat."}],
            **MEASURED,
        }
    ]
    for copied in (False, True):
        path = export(pairs, "trl", tmp_path / "out", copy_images=copied)
        loaded = load_dataset(
            "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / f"cache-{copied}")
        )
        assert [row["images"][0].getpixel((0, 0)) for row in loaded] == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]


def test_the_fields_of_llava(pairs: list[Pair], tmp_path: Path) -> None:
    question = {"from": "human", "value": "<image>\nWhat is this?"}
    assert rows_of(export(pairs[:1], "llava", tmp_path / "out")) == [
        {
            "id": "a",
            "image": pairs[0].prompt.image,
            "conversations": [question, {"from": "gpt", "value": 'A "red" café.'}],
            "rejected_conversations": [question, {"from": "gpt", "value": "A boat."}],
            **MEASURED,
        }
    ]


def test_the_fields_of_llamafactory(pairs: list[Pair], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (row,) = rows_of(export(pairs[:1], "llamafactory", out, copy_images=True))
    (image,) = row["images"]
    assert (out / image).is_file(), "media_dir is the folder of dataset_info.json"
    assert row == {
        "id": "a",
        "conversations": [{"from": "human", "value": "<image>What is this?"}],
        "chosen": {"from": "gpt", "value": 'A "red" café.'},
        "rejected": {"from": "gpt", "value": "A boat."},
        "images": [image],
        **MEASURED,
    }
    assert json.loads((out / "dataset_info.json").read_text()) == {
        "csr_pairs": {
            "file_name": "pairs.json",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"},
        }
    }


def test_the_fields_of_swift(pairs: list[Pair], tmp_path: Path) -> None:
    assert rows_of(export(pairs[:1], "swift", tmp_path / "out")) == [
        {
            "id": "a",
            "messages": [
                {"role": "user", "content": "<image>What is this?"},
                {"role": "assistant", "content": 'A "red" café.'},
            ],
            "images": [pairs[0].prompt.image],
            "rejected_response": "A boat.",
            **MEASURED,
        }
    ]
    (entry,) = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert entry["dataset_path"] == "pairs.jsonl", "relative to dataset_info.json"


def test_the_fields_of_rlaifv(pairs: list[Pair], tmp_path: Path) -> None:
    path = export(pairs[:1], "rlaifv", tmp_path / "out")
    (row,) = rows_of(path)
    assert Image.open(io.BytesIO(row["image"].pop("bytes"))).getpixel((0, 0)) == (255, 0, 0)
    assert row == {
        "ds_name": "csr-vlm",
        "image": {"path": "red.png"},
        "question": "What is this?",
        "chosen": 'A "red" café.',
        "rejected": "A boat.",
        "origin_dataset": "csr-vlm",
        "origin_split": '{"model": "org/model", "iteration": 2}',
        "idx": "a",
        "image_path": pairs[0].prompt.image,
        **MEASURED,
    }
    features = json.loads(pq.read_schema(path).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}


def test_the_fields_of_sentinel(pairs: list[Pair], tmp_path: Path) -> None:
    assert rows_of(export(pairs[:1], "sentinel", tmp_path / "out")) == [
        {
            "image_id": "a",
            "image_path": pairs[0].prompt.image,
            "question": "What is this?",
            "context": "",
            "y_win": 'A "red" café.',
            "y_lose": "A boat.",
            "chosen_ends": True,
            "rejected_ends": True,
            **MEASURED,
        }
    ]


# Pairs that do not end


def continued(pairs: list[Pair], *sides: bool) -> list[Pair]:
    """Return one pair of sentences that continue "It is day.", and one question pair."""
    prompt = pairs[0].prompt
    chosen = response("It is day. A boat.", 2.0, sides[0])
    rejected = response("It is day. A fish." if sides[1] or not sides[0] else "It is day. A fish. It", 1.0, sides[1])
    return [Pair(prompt, 2, chosen, rejected), Pair(Prompt("a?0", prompt.image, "Is there a boat?"), 2, *YES_NO)]


YES_NO = (response("Yes."), response("No."))


def as_text(pair: Pair, context: str) -> FormattedPair:
    end = "</s>"
    sides = [side.text[len(context) :] + (end if side.complete else "") for side in (pair.chosen, pair.rejected)]
    return FormattedPair(f"USER: <image>\n{pair.prompt.text} ASSISTANT:{context}", *sides)


def export_continued(pairs: list[Pair], form: str, out: Path) -> Path:
    return export(pairs, form, out, described=True, to_template=as_text if form == "trl" else None)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sides", [(False, False), (True, True), (True, False), (False, True)])
def test_pairs_that_do_not_end_are_read_back(
    pairs: list[Pair], tmp_path: Path, form: str, sides: tuple[bool, bool]
) -> None:
    written = continued(pairs, *sides)
    path = export_continued(written, form, tmp_path / "out")
    for name in (form, "auto"):
        text_pairs, report = read_back(path, images=tmp_path / "kept", pairs_format=name)
        assert report.dropped == {}
        for text, pair in zip(text_pairs, written, strict=True):
            assert (text.prompt.prompt_id, text.prompt.text) == (pair.prompt.prompt_id, pair.prompt.text)
            assert (text.chosen, text.rejected) == (pair.chosen.text, pair.rejected.text)
            assert (text.chosen_ends, text.rejected_ends) == (pair.chosen.complete, pair.rejected.complete)


def test_the_context_stands_where_the_trainer_needs_it(pairs: list[Pair], tmp_path: Path) -> None:
    first, _ = written = continued(pairs, False, False)
    (row, question) = rows_of(export_continued(written, "sentinel", tmp_path / "sentinel"))
    assert (row["context"], row["y_win"], row["y_lose"]) == ("It is day.", " A boat.", " A fish.")
    assert (row["chosen_ends"], question["chosen_ends"], question["y_win"]) == (False, True, "Yes.")
    (row, _) = rows_of(export_continued(written, "trl", tmp_path / "trl"))
    assert row["prompt"] == "USER: <image>\nWhat is this? ASSISTANT:It is day."
    assert (row["chosen"], row["rejected"]) == (" A boat.", " A fish.")
    (row, question) = rows_of(export_continued(written, "swift", tmp_path / "swift"))
    assert (row["messages"][1]["content"], row["rejected_response"]) == (first.chosen.text, first.rejected.text)
    assert (row["add_eos"], row["rejected_add_eos"]) == (False, False)
    assert (question["add_eos"], question["rejected_add_eos"]) == (True, True)
    request = "Write only its next sentence, then END if the answer is complete."
    asked = f"What is this?\n\nThe answer begins:\nIt is day.\n\n{request}"
    (row, question) = rows_of(export_continued(written, "llamafactory", tmp_path / "llamafactory"))
    assert row["conversations"] == [{"from": "human", "value": f"<image>{asked}"}]
    assert (row["chosen"]["value"], row["rejected"]["value"]) == ("A boat.", "A fish.")
    assert question["conversations"][0]["value"] == "<image>Is there a boat?"
    ended = Pair(first.prompt, 2, first.chosen, response("It is day."))
    (row,) = rows_of(export_continued([ended], "llamafactory", tmp_path / "ended"))
    assert (row["chosen"]["value"], row["rejected"]["value"]) == ("A boat.", "END")
    (row, _) = rows_of(export_continued(written, "rlaifv", tmp_path / "rlaifv"))
    assert (row["question"], row["text"], row["chosen"]) == (asked, "What is this?", "A boat.")


@pytest.mark.parametrize("form", FORMATS)
def test_images_are_exported_as_the_policy_saw_them(tmp_path: Path, form: str) -> None:
    turned, clear, plain = (tmp_path / name for name in ("turned.jpg", "clear.png", "plain.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((8, 4)).convert("RGB").save(turned, exif=exif)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(clear)
    Image.new("RGB", (4, 4), "red").save(plain)
    written = [
        Pair(Prompt(path.stem, str(path), "Q?"), 1, response("Good."), response("Bad."))
        for path in (turned, clear, plain)
    ]
    for copied in (False, True):
        out = tmp_path / f"out-{copied}"
        rows = rows_of(export(written, form, out, copy_images=copied))
        for row, pair in zip(rows, written, strict=True):
            value = row.get("image", row.get("image_path")) or row["images"]
            value = value[0] if isinstance(value, list) else value
            content = value if isinstance(value, str) else value["bytes"] or value["path"]
            source = io.BytesIO(content) if isinstance(content, bytes) else out / content
            with Image.open(source) as image:  # as other programs do
                assert image.convert("RGB").tobytes() == load_image(pair.prompt.image, 100).tobytes()
            if pair.prompt.prompt_id == "plain" and isinstance(content, bytes):
                assert content == plain.read_bytes()


@pytest.mark.parametrize(
    ("form", "existing"), [("llamafactory", {"mine": {"file_name": "x"}}), ("swift", [{"dataset_path": "mine.jsonl"}])]
)
def test_registered_datasets_are_kept(pairs: list[Pair], tmp_path: Path, form: str, existing: Any) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps(existing))
    for _ in range(2):
        export(pairs, form, tmp_path)
    registry = json.loads((tmp_path / "dataset_info.json").read_text())
    assert len(registry) == 2
    assert registry["mine"] == existing["mine"] if form == "llamafactory" else registry[0] == existing[0]


@pytest.mark.parametrize("form", ["llamafactory", "swift"])
@pytest.mark.parametrize("content", ["{broken", "3"])
def test_a_registry_of_another_form_is_not_overwritten(
    pairs: list[Pair], tmp_path: Path, form: str, content: str
) -> None:
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(CsrError, match="not a valid list of datasets"):
        export(pairs, form, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == ["dataset_info.json"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_missing_image_leaves_no_partial_export(pairs: list[Pair], tmp_path: Path, form: str) -> None:
    Path(pairs[-1].prompt.image).unlink()
    with pytest.raises(CsrError, match=r"blue\.png cannot be read"):
        export(pairs, form, tmp_path / "out", copy_images=True)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_file()]


def test_an_export_to_an_invalid_folder_is_an_error(pairs: list[Pair], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CsrError, match="cannot be written to"):
        export(pairs, "llava", tmp_path / "file")


# Bad pairs


def llava_row(**changes: Any) -> dict[str, Any]:
    talk = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "Good."}]
    other = [talk[0], {"from": "gpt", "value": "Bad."}]
    return {"id": 1, "image": "a.png", "conversations": talk, "rejected_conversations": other} | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected_conversations": llava_row()["conversations"]}, "identical responses"),
        ({"rejected_conversations": []}, "no chosen or no rejected response"),
        ({"rejected_conversations": None}, "no chosen or no rejected response"),
        ({"rejected_conversations": "Bad."}, "no chosen or no rejected response"),
        ({"conversations": llava_row()["conversations"] * 2}, "several turns"),
        ({"conversations": [{"from": "gpt", "value": "Good."}]}, "empty prompt"),
        ({"image": "gone.png"}, "missing"),
        ({"image": "../a.png"}, "image outside the image root"),
        ({"image": None}, "no image"),
        ({"image": "https://example.org/a.png"}, "image is a URL, which is not fetched; download it"),
        (
            {"rejected_conversations": [{"from": "gpt", "value": "\ud800"}]},
            "text or path that cannot be encoded or resolved",
        ),
    ],
)
def test_bad_pairs_are_counted_by_reason(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "p.json").write_text(json.dumps([llava_row(**changes), llava_row()]))
    text_pairs, report = read_back(tmp_path / "p.json", image_root=None)
    assert [(text.chosen, text.rejected) for text in text_pairs] == [("Good.", "Bad.")]
    assert report.dropped == {reason: 1}
    assert report.examples[0].startswith(f"p.json entry 1: {reason}")
    with pytest.raises(CsrError, match="entry 1"):
        read_back(tmp_path / "p.json", image_root=None, on_bad_input="refuse")


def test_a_configured_pair_format_is_enforced(pairs: list[Pair], tmp_path: Path) -> None:
    path = export(pairs, "trl", tmp_path / "out")
    assert not read_back(path, pairs_format="llava")[0]


def test_checking_pairs_writes_nothing(pairs: list[Pair], tmp_path: Path) -> None:
    path = export(pairs, "rlaifv", tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    assert check_pairs(DataConfig(prompts="-", pairs=str(path)), Silent()).accepted == 3
    assert sorted(tmp_path.rglob("*")) == before
    export([], "llava", tmp_path / "none")
    with pytest.raises(CsrError, match="no usable pair") as caught:
        check_pairs(DataConfig(prompts="-", pairs=str(tmp_path / "none" / "pairs.json")), Silent())
    assert caught.value.hint == "the file is empty"


def test_only_the_first_iteration_takes_them() -> None:
    given, none = config(data={"prompts": "p", "pairs": "p"}), config()
    assert [has_offline_pairs(given, number) for number in (1, 2, 3)] == [True, False, False]
    assert not has_offline_pairs(none, 1)


# Pairs of others, in the forms that they publish


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", OTHERS)
def test_pairs_of_others_are_read_as_they_are(tmp_path: Path, name: str, suffix: str) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([OTHERS[name]]), path)
    else:
        path.write_text(json.dumps(OTHERS[name] if suffix == ".jsonl" else [OTHERS[name]]))
    text_pairs, report = read_back(path, image_root=None)
    assert report.dump() == {"accepted": 1, "dropped": {}, "examples": []}
    (pair,) = text_pairs
    assert (pair.prompt.text, pair.chosen, pair.rejected) == ("What is it?", "A boat.", "A fish.")
    assert pair.chosen_ends
    assert pair.rejected_ends


def test_sentinel_pairs_keep_their_context_and_do_not_end(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    row = OTHERS_OF_THEIR_OWN["SENTINEL"]
    (tmp_path / "p.json").write_text(json.dumps([row, row]))
    text_pairs, _ = read_back(tmp_path / "p.json", image_root=None)
    assert [(pair.chosen, pair.rejected, pair.chosen_ends, pair.rejected_ends) for pair in text_pairs] == [
        ("A tree. A boat.", "A tree. A fish.", False, False)
    ] * 2


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("folder", [".", "VG_100K", "VG_100K_2"])
def test_hadpo_descriptions_find_their_images(tmp_path: Path, folder: str, as_list: bool) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    Image.new("RGB", (2, 2)).save(tmp_path / folder / "7.jpg")
    sides = {"chosen": ["A boat.", "A red boat."], "rejected": ["A fish."]}
    content: Any = [{"image_id": 7, **sides}] if as_list else {"7": sides, "8": sides}
    (tmp_path / "desc_data.json").write_text(json.dumps(content, indent=None if folder == "." else 1))
    text_pairs, report = read_back(tmp_path / "desc_data.json", image_root=None)
    assert [(pair.prompt.prompt_id, pair.chosen, pair.rejected) for pair in text_pairs] == [("7", "A boat.", "A fish.")]
    assert text_pairs[0].prompt.text == "Describe this image in detail."
    assert report.dropped == ({} if as_list else {"missing": 1})


def test_rows_without_responses_name_the_keys(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": "a.png", "question": "Q?", "better": "x"}))
    _, report = read_back(tmp_path / "p.jsonl", image_root=None)
    assert report.dropped == {"no chosen or no rejected response": 1}
    assert "y_win and y_lose; the row has image, question, better" in report.examples[0]


@pytest.mark.parametrize("history", [[["Q", "A"]]])
def test_alpaca_history_is_several_turns(tmp_path: Path, history: list[Any]) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text(json.dumps(OTHERS["LLaMA-Factory alpaca"] | {"history": history}))
    assert read_back(tmp_path / "p.jsonl", image_root=None)[1].dropped == {"several turns": 1}
