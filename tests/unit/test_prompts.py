"""Accept, drop and count the rows of a prompt file."""

from __future__ import annotations

import base64
import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.data.prompts import InputReport, count_rows, read_prompts


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(root / "images" / f"{name}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    return root


def row(prompt_id: Any = "1", image: Any = "images/a.png", text: Any = "What is this?", **more: Any) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "image": image, "text": text} | more


def read(folder: Path, *rows: Any, **settings: Any) -> tuple[list[Prompt], InputReport]:
    """Write rows (bytes unchanged, everything else as JSON) and read them."""
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in rows]
    (folder / "prompts.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    report = InputReport()
    prompts = list(read_prompts(DataConfig(prompts=str(folder / "prompts.jsonl"), **settings), report))
    return prompts, report


def reason(folder: Path, bad: Any) -> str:
    """Read a bad row between two good ones; return the reason for which it was dropped."""
    prompts, report = read(folder, row("first"), bad, row("last"))
    assert [prompt.prompt_id for prompt in prompts] == ["first", "last"]
    assert report.accepted == 2
    assert report.dropped.total() == 1
    (text,) = report.dropped
    assert report.examples[0].startswith(f"prompts.jsonl line 2: {text}")
    with pytest.raises(CsrError, match="line 2"):
        read(folder, row("first"), bad, row("last"), on_bad_input="refuse")
    return text


def test_a_good_row_is_accepted(folder):
    prompts, report = read(folder, row("x"))
    assert prompts == [Prompt("x", str((folder / "images" / "a.png").resolve()), "What is this?")]
    assert report.dump() == {"accepted": 1, "dropped": {}, "examples": []}


def test_an_id_may_be_named_id_and_may_be_a_number(folder):
    prompts, _ = read(folder, {"id": 42, "image": "images/a.png", "text": "Q"}, row(None, id="seven"))
    assert [prompt.prompt_id for prompt in prompts] == ["42", "seven"]


def test_the_image_placeholder_is_removed(folder):
    prompts, _ = read(folder, row(text="<image>\nWhat is this? "))
    assert prompts[0].text == "What is this?"


def test_a_repeated_id_is_numbered_and_a_repeated_row_is_dropped(folder):
    assert reason(folder, row("first")) == "duplicate id"
    rows = [row("x"), row("x", text="Another?"), row("x", image="images/b.png"), row("x", text="Another?"), row("x#2")]
    prompts, report = read(folder, *rows)
    assert [prompt.prompt_id for prompt in prompts] == ["x", "x#2", "x#3", "x#2#2"]
    assert report.dropped == {"duplicate id": 1}
    sampled, _ = read(folder, *rows, sample=2)
    assert len(sampled) == 2
    assert set(sampled) <= set(prompts)


def test_a_number_and_its_digits_are_the_same_id(folder):
    prompts, report = read(folder, row(1), row("1"))
    assert len(prompts) == 1
    assert report.dropped == {"duplicate id": 1}


def test_the_id_of_a_dropped_row_can_be_used_again(folder):
    prompts, report = read(folder, row("x", text=""), row("x"))
    assert len(prompts) == 1
    assert report.dropped == {"empty prompt": 1}


@pytest.mark.parametrize("text", ["", "  \n", "<image>", " <image>\n<image> ", None, 7, ["What?"]])
def test_empty_prompts_are_dropped(folder, text):
    assert reason(folder, row(text=text)) == "empty prompt"


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt_id": "x", "text": "Q"},
        row(image=None),
        row(image=""),
        row(image=float("nan")),
    ],
)
def test_rows_without_an_image_are_dropped_and_the_keys_are_named(folder, bad):
    assert reason(folder, bad) == "no image"
    _, report = read(folder, bad)
    assert "expected one of image, images, file_name, image_path; the row has prompt_id" in report.examples[0]


@pytest.mark.parametrize("prompt_id", [["x"], {"a": 1}, True])
def test_an_id_must_be_text_or_a_number(folder, prompt_id):
    assert reason(folder, row(prompt_id)) == "id that is neither text nor a number"


def test_rows_without_an_id_are_numbered_and_floats_are_whole_numbers(folder):
    rows = [row(None), row(""), row(float("nan")), row(7.0), row(7.5)]
    assert [prompt.prompt_id for prompt in read(folder, *rows)[0]] == [
        "prompts-1",
        "prompts-2",
        "prompts-3",
        "7",
        "7.5",
    ]


def test_empty_values_do_not_hide_later_fields(folder):
    rows = [
        {"id": 1, "image": "", "image_path": "images/a.png", "text": "", "question": "Q?"},
        {"id": 2, "image": float("nan"), "file_name": "images/a.png", "text": float("nan"), "question": "Q?"},
        {"id": 3, "image": "images/a.png", "text": "<image>", "input": "Q?"},
    ]
    prompts, report = read(folder, *rows)
    assert [prompt.text for prompt in prompts] == ["Q?"] * 3
    assert not report.dropped


def test_an_image_is_found_in_every_form(folder):
    content = (folder / "images" / "a.png").read_bytes()
    encoded = base64.b64encode(content).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "text", "text": "Q"},
    ]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "images/a.png"}, {"type": "text", "text": "Q"}]}
    ]
    rows = [
        row("backslash", "images\\a.png"),
        row("file", (folder / "images" / "a.png").as_uri()),
        row("data", f"data:image/png;base64,{encoded}"),
        row("base64", encoded),
        row("dict", {"bytes": None, "path": "images/a.png"}),
        {"id": "messages", "messages": messages},
        {"id": "openai", "messages": [{"role": "user", "content": parts}]},
    ]
    prompts, report = read(folder, *rows)
    assert not report.dropped
    path, stored = str((folder / "images" / "a.png").resolve()), f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert [prompt.image for prompt in prompts] == [path, path, stored, stored, path, path, stored]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("https://example.org/a.jpg", "image is a URL, which is not fetched; download it"),
        ("s3://bucket/a.jpg", "image is a URL, which is not fetched; download it"),
        ("data:image/png;base64,***", "image is a data URI that cannot be decoded"),
        ("data:image/png,abc", "image is a data URI that cannot be decoded"),
        ("/9j/4AAQSkZJRg==", "unreadable (damaged)"),
        (["images/a.png", "images/b.png"], "several images"),
    ],
)
def test_an_image_that_cannot_be_read_has_a_reason_of_its_own(folder, image, expected):
    assert reason(folder, row(image=image)) == expected


def test_text_that_is_a_json_object_is_unpacked(folder):
    pair = {"question": "What is it?", "chosen": "A boat.", "rejected": "A fish."}
    assert read(folder, row(text=json.dumps(pair)))[0][0].text == "What is it?"
    assert (
        reason(folder, row(text=json.dumps({"chosen": "A", "rejected": "B"})))
        == "text is a JSON object without a question"
    )
    literal = '{"a": 1} is which format?'
    assert read(folder, row(text=literal))[0][0].text == literal


def test_a_system_message_and_alpaca_input_are_kept(folder):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>What is it?"}]
    rows = [
        {"image": "images/a.png", "messages": talk},
        {"image": "images/a.png", "instruction": "Count.", "input": "Boats."},
    ]
    assert [prompt.text for prompt in read(folder, *rows)[0]] == ["Be brief.\n\nWhat is it?", "Count.\nBoats."]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"not json",
        b"[1, 2]",
        b'"text"',
        b"null",
        b'{"prompt_id": "\xff"}',
        b"9" * 5000,
        b"[" * 100_000,
    ],
    ids=["open", "words", "list", "string", "null", "not utf-8", "endless number", "endless nesting"],
)
def test_a_line_that_is_not_a_json_object_is_dropped(folder, line):
    assert reason(folder, line) == "not a JSON object"


@pytest.mark.parametrize("path", ["../outside.png", "images/../../outside.png", "/etc/passwd"])
def test_paths_that_leave_the_image_root_are_dropped(folder, path):
    assert reason(folder, row(image=path)) == "image outside the image root"


def test_links_out_of_the_image_root_are_followed_unless_an_option_forbids_it(folder):
    (folder.parent / "shared").mkdir()
    Image.new("RGB", (4, 4)).save(folder.parent / "shared" / "c.png")
    (folder / "images" / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "coco").symlink_to(folder.parent / "shared")
    rows = [row(1, "images/link.png"), row(2, "coco/c.png")]
    assert [Path(prompt.image).name for prompt in read(folder, *rows)[0]] == ["outside.png", "c.png"]
    prompts, report = read(folder, *rows, follow_links=False)
    assert not prompts
    assert report.dropped == {"link out of the image root, with data.follow_links=false": 2}
    assert read(folder, row(3, "coco/../../outside.png"))[1].dropped.total() == 1, "a link hides no dots"


def test_paths_that_stay_in_the_image_root_are_accepted(folder):
    (folder / "images" / "link.png").symlink_to(folder / "images" / "a.png")
    absolute = str(folder / "images" / "a.png")
    prompts, _ = read(folder, row(1, "images/link.png"), row(2, "images/../images/a.png"), row(3, absolute))
    assert len(prompts) == 3
    assert len({prompt.image for prompt in prompts}) == 1


def test_a_folder_with_a_common_prefix_is_outside(folder):
    (folder.parent / "data-private").mkdir()
    Image.new("RGB", (4, 4)).save(folder.parent / "data-private" / "a.png")
    assert reason(folder, row(image="../data-private/a.png")) == "image outside the image root"


@pytest.mark.parametrize("field", ["prompt_id", "image", "text"])
def test_half_a_surrogate_pair_is_dropped(folder, field):
    assert "cannot be encoded" in reason(folder, row() | {field: "x\ud800"})


def test_invalid_paths_are_dropped(folder):
    (folder / "one").symlink_to(folder / "two")
    (folder / "two").symlink_to(folder / "one")
    for path in ("images/a\0.png", "one"):
        reason(folder, row(image=path))
    assert reason(folder, row(image="x" * 5000)) == "unreadable (File name too long)"


def test_unusable_images_are_dropped(folder):
    (folder / "images" / "text.png").write_text("no image")
    whole = (folder / "images" / "a.png").read_bytes()
    (folder / "images" / "half.png").write_bytes(whole[:45])
    assert reason(folder, row(image="images/none.png")) == "missing"
    assert reason(folder, row(image="images/text.png")) == "not an image"
    assert reason(folder, row(image="images/half.png")) == "unreadable (damaged)"
    assert reason(folder, row(image="images")) == "unreadable (Is a directory)"


def test_the_pixel_limit_is_applied(folder):
    _, report = read(folder, row(), max_image_pixels=15)
    assert report.dropped == {"too large (over 15 pixels)": 1}
    prompts, _ = read(folder, row(), max_image_pixels=16)
    assert len(prompts) == 1


def test_blank_lines_are_not_rows_but_are_counted_as_lines(folder):
    prompts, report = read(folder, b"", row("a"), b"   ", b"{", b"", row("b"))
    assert len(prompts) == 2
    assert report.examples == ["prompts.jsonl line 4: not a JSON object"]


def test_a_byte_order_mark_is_ignored(folder):
    prompts, report = read(folder, b"\xef\xbb\xbf" + json.dumps(row("first")).encode(), row("second"))
    assert [prompt.prompt_id for prompt in prompts] == ["first", "second"]
    assert not report.dropped


def test_the_limit_counts_accepted_prompts(folder):
    rows = [row("a"), b"{", row("b"), row("c"), b"{"]
    prompts, report = read(folder, *rows, limit=2)
    assert [prompt.prompt_id for prompt in prompts] == ["a", "b"]
    assert report.accepted == 2
    assert report.dropped.total() == 1, "rows after the limit are not read"
    assert len(read(folder, *rows, limit=50)[0]) == 3


def test_all_drops_are_counted_and_the_first_twenty_are_examples(folder):
    prompts, report = read(folder, *[row(str(i), text="") for i in range(30)], row("x", image="gone.png"), row("good"))
    assert len(prompts) == report.accepted == 1
    assert report.dropped == {"empty prompt": 30, "missing": 1}
    assert report.examples == [f"prompts.jsonl line {i}: empty prompt: no question in text" for i in range(1, 21)]
    assert json.loads(json.dumps(report.dump()))["dropped"] == {"empty prompt": 30, "missing": 1}


def test_a_refused_row_is_located_in_the_error(folder):
    with pytest.raises(CsrError) as caught:
        read(folder, row("a"), row("b", text=""), on_bad_input="refuse")
    assert caught.value.message == "prompts.jsonl line 2: empty prompt: no question in text"
    assert "on_bad_input=skip" in caught.value.hint


@pytest.mark.parametrize("how", ["skip", "refuse"])
def test_a_missing_prompt_file_is_an_error(tmp_path, how):
    config = DataConfig(prompts=str(tmp_path / "none.jsonl"), on_bad_input=how)
    with pytest.raises(CsrError, match=r"none\.jsonl"):
        list(read_prompts(config, InputReport()))
    with pytest.raises(CsrError, match="holds nothing"):
        list(read_prompts(DataConfig(prompts=str(tmp_path)), InputReport()))


def test_the_image_root_can_be_elsewhere(folder, tmp_path):
    prompts, _ = read(folder, row(image="a.png"), image_root=str(folder / "images"))
    assert prompts[0].image == str((folder / "images" / "a.png").resolve())
    _, report = read(folder, row(image="../outside.png"), image_root=str(folder))
    assert report.dropped == {"image outside the image root": 1}


def test_rows_are_read_one_by_one(folder):
    read(folder, row("a"), row("b"), row("c"))
    report = InputReport()
    stream = read_prompts(DataConfig(prompts=str(folder / "prompts.jsonl"), on_bad_input="refuse"), report)
    assert [prompt.prompt_id for prompt in islice(stream, 2)] == ["a", "b"]
    assert report.accepted == 2


def test_tick_is_called_once_per_row(folder):
    read(folder, row("a"), b"{", b"", row("b"))
    ticks: list[None] = []
    config = DataConfig(prompts=str(folder / "prompts.jsonl"))
    list(read_prompts(config, InputReport(), tick=lambda: ticks.append(None)))
    assert len(ticks) == count_rows(config) == 3
    assert count_rows(DataConfig(prompts=str(folder / "prompts.jsonl"), limit=2)) == 2
