"""Accept, drop and count the rows of a prompt file."""

from __future__ import annotations

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
    assert report.examples == [f"prompts.jsonl line 2: {text}"]
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


def test_duplicate_ids_are_dropped(folder):
    assert reason(folder, row("first", text="Another question.")) == "duplicate id"
    assert reason(folder, row("first", image="images/b.png")) == "duplicate id"


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
        {"image": "images/a.png", "text": "Q"},
        {"prompt_id": "x", "text": "Q"},
        row(image=None),
        row(image=3),
        row(prompt_id=""),
        row(prompt_id=["x"]),
    ],
)
def test_rows_without_id_or_image_are_dropped(folder, bad):
    assert reason(folder, bad) == "no prompt_id or no image"


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


@pytest.mark.parametrize("path", ["../outside.png", "images/../../outside.png", "/etc/passwd", "images/link.png"])
def test_paths_that_leave_the_image_root_are_dropped(folder, path):
    (folder / "images" / "link.png").symlink_to(folder.parent / "outside.png")
    assert reason(folder, row(image=path)) == "image outside the image root"


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
    assert report.examples == [f"prompts.jsonl line {i}: empty prompt" for i in range(1, 21)]
    assert json.loads(json.dumps(report.dump()))["dropped"] == {"empty prompt": 30, "missing": 1}


def test_a_refused_row_is_located_in_the_error(folder):
    with pytest.raises(CsrError) as caught:
        read(folder, row("a"), row("b", text=""), on_bad_input="refuse")
    assert caught.value.message == "prompts.jsonl line 2: empty prompt"
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
