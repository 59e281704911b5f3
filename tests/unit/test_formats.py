"""Read the same prompts from every format."""

from __future__ import annotations

import csv
import gc
import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.data import json_array
from csr_vlm.data import prompts as reading
from csr_vlm.data.images import SUFFIXES, load_image, suffix_of
from csr_vlm.data.prompts import InputReport, count_rows, read_prompts
from csr_vlm.data.rows import BadRow, row_text
from csr_vlm.data.sources import PROMPT_FORMATS, detect_format, open_source
from csr_vlm.store import tables
from tests.shared_data import SHARED

CSR_FILE = SHARED / "csr_prompts_200.json"
COLORS = ("red", "green", "blue")
QUESTIONS = ("What is this?", "How many?", "Which color?")


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with three images, a.png to c.png."""
    root = tmp_path / "photos"
    root.mkdir()
    for name, color in zip("abc", COLORS, strict=True):
        (root / f"{name}.png").write_bytes(png(color))
    return root


def read(prompts: Any, seed: int = 0, images: Path | None = None, **settings: Any) -> tuple[list[Prompt], InputReport]:
    report = InputReport()
    config = DataConfig(prompts=prompts, **settings)
    return list(read_prompts(config, report, seed=seed, images=images)), report


def color_of(prompt: Prompt) -> tuple[int, ...]:
    return load_image(prompt.image, 100).getpixel((0, 0))


# Writers of the same three prompts: ids a to c, each with an image and a question.


def as_jsonl(root: Path) -> Path:
    path = root / "rows.jsonl"
    lines = [{"question_id": n, "image": f"{n}.png", "text": q} for n, q in zip("abc", QUESTIONS, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def as_llava(root: Path) -> Path:
    path = root / "rows.json"
    rows = [
        {"id": n, "image": f"{n}.png", "conversations": [{"from": "human", "value": f"{q}\n<image>"}, {"from": "gpt"}]}
        for n, q in zip("abc", QUESTIONS, strict=True)
    ]
    path.write_text(json.dumps(rows, indent=1))
    return path


def as_csr(root: Path) -> Path:
    path = root / "csr.json"
    rows = [{"id": n, "image": f"{n}.png", "input": f"<image>\n{q}"} for n, q in zip("abc", QUESTIONS, strict=True)]
    path.write_text(json.dumps(rows))
    return path


def as_csv_folder(root: Path) -> Path:
    with (root / "metadata.csv").open("w", newline="") as handle:
        table = csv.DictWriter(handle, ["file_name", "id", "question"])
        table.writeheader()
        table.writerows(
            {"file_name": f"{n}.png", "id": n, "question": q} for n, q in zip("abc", QUESTIONS, strict=True)
        )
    return root


def as_imagefolder(root: Path) -> Path:
    lines = [{"file_name": f"{n}.png", "id": n, "prompt": q} for n, q in zip("abc", QUESTIONS, strict=True)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def encoded(root: Path) -> list[dict[str, Any]]:
    return [
        {"id": n, "image": {"bytes": (root / f"{n}.png").read_bytes(), "path": f"{n}.png"}, "question": q, "extra": 1}
        for n, q in zip("abc", QUESTIONS, strict=True)
    ]


def as_parquet(root: Path) -> Path:
    path = root.parent / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(encoded(root)), path)
    return path


def as_parquet_paths(root: Path) -> Path:
    path = root / "paths.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "image": row["image"]["path"]} for row in encoded(root)]), path)
    return path


def as_saved(root: Path) -> Path:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"id": Value("string"), "image": ImageFeature(), "question": Value("string")})
    rows = [{key: row[key] for key in features} for row in encoded(root)]
    Dataset.from_list(rows, features=features).save_to_disk(str(root.parent / "saved"))
    return root.parent / "saved"


def as_tar(root: Path, compressed: bool = False) -> Path:
    path = root.parent / ("rows.tar.gz" if compressed else "rows.tar")
    with tarfile.open(path, "w:gz" if compressed else "w") as archive:
        for n, q in zip("abc", QUESTIONS, strict=True):
            add(archive, f"{n}.png", (root / f"{n}.png").read_bytes())
            add(archive, f"{n}.json", json.dumps({"question": q, "image": "of the web"}).encode())
    return path


def as_gz(root: Path) -> Path:
    return as_tar(root, compressed=True)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


WRITERS: dict[Callable[[Path], Path], str] = {
    as_jsonl: "jsonl",
    as_llava: "llava",
    as_csr: "llava",
    as_csv_folder: "imagefolder",
    as_imagefolder: "imagefolder",
    as_parquet: "parquet",
    as_parquet_paths: "parquet",
    as_saved: "huggingface",
    as_tar: "webdataset",
    as_gz: "webdataset",
}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_prompts(folder: Path, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(folder)
    assert detect_format(str(path)) == WRITERS[write]
    prompts, report = read(str(path), images=tmp_path / "kept")
    assert [(prompt.prompt_id, prompt.text) for prompt in prompts] == list(zip("abc", QUESTIONS, strict=True))
    assert [color_of(prompt) for prompt in prompts] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert report.dump() == {"accepted": 3, "dropped": {}, "examples": []}
    named, _ = read(str(path), images=tmp_path / "kept", format=WRITERS[write])
    assert named == prompts
    assert count_rows(DataConfig(prompts=str(path))) == (0 if WRITERS[write] == "webdataset" else 3)


def test_every_known_format_is_tested() -> None:
    assert {*WRITERS.values(), "images"} == set(PROMPT_FORMATS)


def test_a_folder_of_images_is_read_in_the_order_of_names(folder: Path) -> None:
    (folder / "old").mkdir()
    (folder / "old" / "z.PNG").write_bytes(png("red"))
    (folder / ".hidden.png").write_bytes(png("red"))
    (folder / "notes.txt").write_text("no picture")
    (folder / "bad.png").write_text("no picture")
    prompts, report = read(str(folder))
    assert [prompt.prompt_id for prompt in prompts] == ["a.png", "b.png", "c.png", "old/z.PNG"]
    assert {prompt.text for prompt in prompts} == {"Describe this image in detail."}
    assert report.examples == ["bad.png: not an image"]
    assert count_rows(DataConfig(prompts=str(folder))) == 5


def test_a_folder_says_what_it_passes_over(folder: Path) -> None:
    for name in ("a.svg", "b.MOV", "prompts.jsonl", "notes.txt"):
        (folder / name).write_text("{}")
    prompts, report = read(str(folder))
    assert len(prompts) == 3
    assert report.dropped == {
        "a format that is not read (.svg)": 1,
        "a format that is not read (.mov)": 1,
        "a file in a folder of images (.jsonl)": 1,
    }
    assert "prompts.jsonl: a file in a folder of images (.jsonl): if it holds the prompts" in report.examples[2]


def test_a_folder_that_does_not_exist_is_no_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for name in ("photos/cats", "photo", "./none"):
        with pytest.raises(CsrError, match="there is no file or folder"):
            detect_format(name)
    assert detect_format("owner/photos") == "huggingface"


def test_links_in_a_folder_of_images_are_followed_without_loops(folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "links"
    photos.mkdir()
    (photos / "one.png").symlink_to(folder / "a.png")
    (photos / "shared").symlink_to(folder)
    (folder / "loop").symlink_to(folder)
    assert [prompt.prompt_id for prompt in read(str(photos))[0]] == [
        *("one.png", "shared/a.png", "shared/b.png", "shared/c.png")
    ]
    assert read(str(photos), follow_links=False)[1].dropped == {
        "link out of the image root, with data.follow_links=false": 4
    }


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".heic", ".avif"])
def test_a_picture_is_recognized_by_its_content(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / f"a{suffix}", "JPEG")
    assert len(read(str(tmp_path))[0]) == 1


def test_a_configured_question_replaces_those_of_the_rows(folder: Path) -> None:
    prompts, _ = read(str(as_jsonl(folder)), questions=["<image>Is it red?"])
    assert [(prompt.prompt_id, prompt.text) for prompt in prompts] == [(n, "Is it red?") for n in "abc"]


def test_several_configured_questions_per_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(reading, "load_image", lambda image, most: decoded.append(image))
    prompts, report = read(str(folder), questions=["One?", "Two?"], limit=5)
    assert [(p.prompt_id, p.text) for p in prompts[:3]] == [
        ("a.png#1", "One?"),
        ("a.png#2", "Two?"),
        ("b.png#1", "One?"),
    ]
    assert len(prompts) == report.accepted == 5, "the limit counts prompts, not images"
    assert len(decoded) == 3, "each image is decoded once"


def test_sources_of_different_formats_are_combined(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "d.png").write_bytes(png("white"))
    prompts, _ = read([str(as_csr(folder)), str(other), str(as_tar(folder))], images=tmp_path / "kept")
    # The tar's pictures have bytes of their own, so its rows are no repetitions.
    assert [prompt.prompt_id for prompt in prompts] == ["a", "b", "c", "d.png", "a#2", "b#2", "c#2"]
    _, report = read([str(as_csr(folder)), str(as_jsonl(folder))])
    assert report.dropped == {"duplicate id": 3}, "ids are unique over all sources"


def test_globs_and_ranges_of_shards_are_expanded(folder: Path, tmp_path: Path) -> None:
    for number in (0, 1, 2):
        with tarfile.open(tmp_path / f"shard-{number:03d}.tar", "w") as archive:
            add(archive, f"p{number}.png", png("red"))
            add(archive, f"p{number}.txt", b"What is it?")
    for path in ("shard-*.tar", "shard-{000..002}.tar"):
        prompts, _ = read(str(tmp_path / path))
        assert [(prompt.prompt_id, prompt.text) for prompt in prompts] == [(f"p{n}", "What is it?") for n in range(3)]
    with pytest.raises(CsrError, match="no file matches"):
        read(str(tmp_path / "none-*.tar"))
    with pytest.raises(CsrError, match=r"shard-003\.tar cannot be opened"):
        read(str(tmp_path / "shard-{002..003}.tar"))


# Bytes


def test_images_that_come_as_bytes_are_stored_once_under_their_hash(folder: Path, tmp_path: Path) -> None:
    rows = [{"id": n, "image": png("red"), "text": "Q"} for n in ("one", "two")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "same.parquet")
    kept = tmp_path / "kept"
    prompts, _ = read(str(tmp_path / "same.parquet"), images=kept)
    assert prompts[0].image == prompts[1].image
    (file,) = [path for path in kept.rglob("*") if path.is_file()]
    assert file.read_bytes() == png("red")
    assert file == kept / file.name[:2] / file.name
    assert file.suffix == ".png"
    before = file.stat().st_mtime_ns
    again, _ = read(str(tmp_path / "same.parquet"), images=kept)
    assert (again, file.stat().st_mtime_ns) == (prompts, before), "reading again writes nothing"


def test_without_a_folder_bytes_are_checked_but_not_stored(folder: Path, tmp_path: Path) -> None:
    half = {"id": "x", "image": {"bytes": png("red")[:40], "path": None}, "question": "Q"}
    pq.write_table(pa.Table.from_pylist([half, *encoded(folder)]), tmp_path / "r.parquet")
    before = sorted(tmp_path.rglob("*"))
    prompts, report = read(str(tmp_path / "r.parquet"))
    assert len(prompts) == 3
    assert prompts[0].image.startswith("sha256:")
    assert report.dropped.total() == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_suffix_of_an_encoded_image(form: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, form)
    assert suffix_of(buffer.getvalue()) in SUFFIXES
    assert suffix_of(b"text") == ""


# Field names and texts


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Hi <image> there"},
        {"question": "Hi  there"},
        {"input": "<image>\nHi  there"},
        {"prompt": "Hi  there\n<image>", "conversations": [{"from": "human", "value": "no"}]},
        {"text": float("nan"), "question": " ", "prompt": [{"role": "user", "content": "Hi  there"}]},
        {"instruction": "<image>Hi  there", "input": ""},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi  there"}]}]},
        {"conversations": [{"from": "human", "value": "<image>Hi  there"}, {"from": "gpt", "value": "no"}]},
    ],
)
def test_the_text_is_found_in_every_supported_field(row: dict[str, Any]) -> None:
    assert row_text(row) == "Hi  there"


@pytest.mark.parametrize(
    "row", [{}, {"text": ["Hi"]}, {"conversations": [{"from": "gpt", "value": "Hi"}]}, {"conversations": [None, 3]}]
)
def test_a_row_without_a_question_has_an_empty_text(row: dict[str, Any]) -> None:
    assert row_text(row) == ""


def test_several_images_are_rejected_but_a_list_of_one_is_not(folder: Path) -> None:
    rows = [{"id": 1, "images": ["a.png"], "text": "Q"}, {"id": 2, "images": ["a.png", "b.png"], "text": "Q"}]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts, report = read(str(folder / "r.jsonl"))
    assert len(prompts) == 1
    assert report.dropped == {"several images": 1}


def test_rows_without_ids_are_numbered(folder: Path, tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("image", "question")} for row in encoded(folder)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    prompts, _ = read(str(tmp_path / "train.parquet"))
    assert [prompt.prompt_id for prompt in prompts] == ["train-1", "train-2", "train-3"]


# COCO


@pytest.mark.parametrize("stored_name", ["000000123456.jpg", "COCO_train2014_000000123456.jpg"])
@pytest.mark.parametrize("below", ["", "train2014", "train2017"])
@pytest.mark.parametrize(
    "name",
    [
        "COCO_train2014_000000123456.jpg",
        "000000123456.jpg",
        "train2017/000000123456.jpg",
        "coco/train2017/000000123456.jpg",
        "train2014/COCO_train2014_000000123456.jpg",
    ],
)
def test_a_coco_image_is_found_under_any_of_its_names(tmp_path: Path, stored_name: str, below: str, name: str) -> None:
    file = tmp_path / "root" / below / stored_name
    file.parent.mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(file)
    (tmp_path / "p.json").write_text(json.dumps([{"id": 1, "image": name, "input": "Q"}]))
    prompts, _ = read(str(tmp_path / "p.json"), image_root=str(tmp_path / "root"))
    assert [prompt.image for prompt in prompts] == [str(file.resolve())]


def test_an_image_with_another_name_or_number_is_missing(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "000000123456.jpg")
    names = ["COCO_train2014_000000123457.jpg", "photo_000000123456.jpg", "../000000123456.jpg"]
    (tmp_path / "p.json").write_text(json.dumps([{"id": n, "image": n, "input": "Q"} for n in names]))
    prompts, report = read(str(tmp_path / "p.json"))
    assert not prompts
    assert report.dropped == {"missing": 2, "image outside the image root": 1}


def test_a_coco_name_cannot_leave_the_root(tmp_path: Path) -> None:
    (tmp_path / "root" / "train2017").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.jpg")
    (tmp_path / "root" / "train2017" / "000000123456.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "p.json").write_text(json.dumps([{"id": 1, "image": "000000123456.jpg", "input": "Q"}]))
    root = str(tmp_path / "root")
    _, report = read(str(tmp_path / "p.json"), image_root=root, follow_links=False)
    assert report.dropped == {"link out of the image root, with data.follow_links=false": 1}
    assert len(read(str(tmp_path / "p.json"), image_root=root)[0]) == 1


@pytest.mark.skipif(not CSR_FILE.is_file(), reason="the sample of the published prompt file is missing")
def test_the_published_prompt_file_is_read(tmp_path: Path) -> None:
    rows = json.loads(CSR_FILE.read_text())
    (tmp_path / "train2014").mkdir()
    for row in rows[:-1]:
        (tmp_path / "train2014" / f"COCO_train2014_{row['image']}").write_bytes(png("red"))
    prompts, report = read(str(CSR_FILE), image_root=str(tmp_path))
    assert len(prompts) == 199
    assert report.dropped == {"missing": 1}
    assert prompts[0].prompt_id == rows[0]["id"]
    assert not any("<image>" in prompt.text or prompt.text != prompt.text.strip() for prompt in prompts)


# Damage


def dropped(path: Path, **settings: Any) -> tuple[list[str], dict[str, int]]:
    prompts, report = read(str(path), **settings)
    return [prompt.prompt_id for prompt in prompts], dict(report.dropped)


def test_a_truncated_json_array_keeps_the_entries_before_the_break(folder: Path) -> None:
    path = as_csr(folder)
    text = path.read_text()
    path.write_text(text[: text.index('"c"')])
    assert dropped(path) == (["a", "b"], {"broken JSON": 1})
    path.write_text(text.replace('"id": "b"', '"id": b'))
    assert dropped(path) == (["a"], {"broken JSON": 1})
    path.write_text(text[:-1])
    assert dropped(path) == (["a", "b", "c"], {"broken JSON": 1})
    with pytest.raises(CsrError, match=r"csr\.json entry 4: broken JSON"):
        read(str(path), on_bad_input="refuse")


def test_entries_that_are_not_objects_do_not_affect_others(folder: Path) -> None:
    good = json.loads(as_csr(folder).read_text())
    (folder / "m.json").write_text(json.dumps([1, good[0], None, "x", [good[1]], good[2], 12345]))
    assert dropped(folder / "m.json") == (["a", "c"], {"not a JSON object": 5})


def test_invalid_utf_8_affects_only_its_entry(folder: Path) -> None:
    path = as_csr(folder)
    path.write_bytes(path.read_bytes().replace(b"How many", b"How \xff many"))
    assert dropped(path) == (["a", "c"], {"text or path that cannot be encoded or resolved": 1})


def test_a_damaged_parquet_file_does_not_affect_others(folder: Path, tmp_path: Path) -> None:
    path = as_parquet(folder)
    whole = path.read_bytes()
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "0.parquet").write_bytes(whole[: len(whole) // 2])
    (shards / "1.parquet").write_bytes(whole)
    (shards / "2.parquet").write_bytes(b"PAR1" + whole[4:60] + bytes(len(whole) - 200) + whole[-140:])
    ids, reasons = dropped(shards)
    assert ids == ["a", "b", "c"]
    assert reasons == {"damaged Parquet file": 2}


@pytest.mark.parametrize("write", [as_tar, as_gz])
def test_a_truncated_tar_keeps_the_members_before_the_break(folder: Path, write: Callable[[Path], Path]) -> None:
    path = write(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if write is as_gz else 512 * 5 + 20])
    ids, reasons = dropped(path)
    assert ids in (["a"], [])
    assert reasons["damaged tar file"] == 1


def test_a_tar_is_never_extracted(tmp_path: Path) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "../../escaped.png", png("red"))
        add(archive, "../../escaped.txt", b"What?")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        add(archive, "plain.png", png("red"))
        add(archive, "plain.json", b"{broken")
        add(archive, "alone.txt", b"What?")
        add(archive, "mute.png", png("red"))
    kept = tmp_path / "kept"
    prompts, report = read(str(path), images=kept)
    assert [prompt.prompt_id for prompt in prompts] == ["../../escaped"]
    assert Path(prompts[0].image).is_relative_to(kept)
    assert report.dropped == {"broken JSON": 1, "no image": 1, "empty prompt": 1}
    assert not list(tmp_path.parent.rglob("escaped*"))


def test_a_split_of_a_saved_dataset_is_selected(folder: Path, tmp_path: Path) -> None:
    from datasets import DatasetDict, load_from_disk

    DatasetDict({"test": load_from_disk(str(as_saved(folder)))}).save_to_disk(str(tmp_path / "splits"))
    prompts, _ = read(str(tmp_path / "splits"), split="test", images=tmp_path / "kept")
    assert [prompt.prompt_id for prompt in prompts] == ["a", "b", "c"]
    with pytest.raises(CsrError, match="no split 'train'") as caught:
        read(str(tmp_path / "splits"))
    assert "expected one of: test" in caught.value.hint


def test_a_dataset_is_streamed(folder: Path, tmp_path: Path) -> None:
    """A local copy of a hub repository is opened like the hub, without network access."""
    (tmp_path / "repo" / "data").mkdir(parents=True)
    as_parquet(folder).rename(tmp_path / "repo" / "data" / "train-0.parquet")
    config = {"format": "huggingface", "images": tmp_path / "kept"}
    prompts, _ = read(str(tmp_path / "repo"), **config)
    assert [(p.prompt_id, p.text) for p in prompts] == list(zip("abc", QUESTIONS, strict=True))
    assert [color_of(prompt) for prompt in prompts] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert count_rows(DataConfig(prompts=str(tmp_path / "repo"), format="huggingface")) == 0
    with pytest.raises(CsrError, match="cannot be opened"):
        read(str(tmp_path / "repo"), split="nowhere", **config)


def test_bad_lines_of_an_imagefolder_are_dropped(folder: Path) -> None:
    rows = [{"file_name": "a.png", "question": "Q"}, {"images": ["a.png", "b.png"]}, {"question": "Q"}]
    (folder / "metadata.jsonl").write_text("\n".join([*map(json.dumps, rows), "{"]))
    ids, reasons = dropped(folder)
    assert ids == ["a.png"]
    assert reasons == {"several images": 1, "no image": 1, "not a JSON object": 1}


def test_an_imagefolder_may_have_metadata_in_subfolders(folder: Path) -> None:
    (folder / "train").mkdir()
    (folder / "a.png").rename(folder / "train" / "a.png")
    lines = [{"file_name": "a.png", "question": "Q"}, {"file_name": "../b.png", "question": "Q"}]
    lines.append({"file_name": "../../rows.jsonl", "question": "Q"})
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert dropped(folder) == (["train/a.png", "train/../b.png"], {"image outside the image root": 1})


def test_a_folder_of_shards_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    as_gz(folder).rename(tmp_path / "shards" / "0.tgz")
    (tmp_path / "shards" / "README.md").write_text("Shards.")
    assert detect_format(str(tmp_path / "shards")) == "webdataset"
    assert dropped(tmp_path / "shards") == (["a", "b", "c"], {})


# Detection of formats


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("pope.json", b'{"question_id": 1}\n{"question_id": 2}\n', "jsonl"),
        ("rows.txt", b'\xef\xbb\xbf \n[{"id": 1}]', "llava"),
        ("broken.json", b"nothing", "llava"),
        ("first-line-broken.jsonl", b"nothing", "jsonl"),
        ("data", b"PAR1....", "parquet"),
        ("0.tar.bz2", b"BZh", "webdataset"),
    ],
)
def test_the_format_is_detected_by_content_before_the_name(
    tmp_path: Path, name: str, content: bytes, form: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert detect_format(str(tmp_path / name)) == form


def test_an_unknown_format_is_rejected_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(CsrError, match="unknown format"):
        read(str(tmp_path / "prompts.jsonl.gz"))
    (tmp_path / "prompts.jsonl.gz").unlink()
    (tmp_path / "prompts.xml").write_text("<prompts/>")
    with pytest.raises(CsrError) as caught:
        read(str(tmp_path / "prompts.xml"))
    assert "b'<prompts/>'" in caught.value.message
    for known in ("JSON Lines", "Parquet", "WebDataset", "ImageFolder", "hub id", "data.format"):
        assert known in caught.value.hint
    with pytest.raises(CsrError, match=r"it holds prompts\.xml"):
        read(str(tmp_path))


def test_a_hub_id_is_recognized_unless_it_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert detect_format("openbmb/RLAIF-V-Dataset") == "huggingface"
    (source,) = open_source("openbmb/RLAIF-V-Dataset", "auto", "train", None)
    assert source.root is None
    for missing in ("data/prompts.jsonl", "./data", "data", "a/b/c"):
        with pytest.raises(CsrError, match=r"cannot be opened|there is no file or folder"):
            detect_format(missing)
    (tmp_path / "my" / "photos").mkdir(parents=True)
    (tmp_path / "my" / "photos" / "a.png").write_bytes(png("red"))
    assert detect_format("my/photos") == "images"


def test_a_configured_format_that_does_not_fit_is_rejected(folder: Path) -> None:
    with pytest.raises(CsrError, match="is not a folder"):
        read(str(as_jsonl(folder)), format="images")


# Samples


@pytest.fixture
def many(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png("red"))
    rows = [{"id": n, "image": "a.png", "text": "Q"} for n in range(200)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "many.jsonl"


def ids(*arguments: Any, **settings: Any) -> list[str]:
    return [prompt.prompt_id for prompt in read(*arguments, **settings)[0]]


def test_a_sample_has_its_size_and_keeps_the_order(many: Path) -> None:
    sample = ids(str(many), sample=30)
    assert len(set(sample)) == 30
    assert sample == sorted(sample, key=int)
    assert sample == ids(str(many), sample=30)
    assert sample != ids(str(many), sample=30, seed=1)
    assert ids(str(many), sample=30, seed=1) == ids(str(many), sample=30, sample_seed=1)
    assert len(ids(str(many), sample=500)) == 200
    assert ids(str(many), sample=30, limit=10) == sample[:10]


def test_samples_are_nested_and_independent_of_the_order(many: Path) -> None:
    assert set(ids(str(many), sample=30)) < set(ids(str(many), sample=60))
    backwards = many.with_name("back.jsonl")
    backwards.write_text("\n".join(reversed(many.read_text().splitlines())))
    assert set(ids(str(backwards), sample=30)) == set(ids(str(many), sample=30))


def test_sampling_is_uniform(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "load_image", lambda image, most: None)
    sampled = [int(n) for seed in range(60) for n in ids(str(many), sample=20, seed=seed)]
    assert len(sampled) == 60 * 20
    halves = sum(n < 100 for n in sampled)
    assert abs(halves - 600) < 4 * (1200 * 0.25) ** 0.5
    assert len(set(sampled)) > 190


def test_a_duplicate_is_sampled_once(many: Path) -> None:
    doubled = many.with_name("doubled.jsonl")
    doubled.write_text(many.read_text() + "\n" + many.read_text())
    prompts, report = read(str(doubled), sample=30)
    assert [prompt.prompt_id for prompt in prompts] == ids(str(many), sample=30)
    assert report.dropped == {"duplicate id": 30}


def test_a_sample_with_several_questions_counts_prompts(many: Path) -> None:
    sample = ids(str(many), sample=50, questions=["A?", "B?"])
    assert len(sample) == 50
    assert {name[-2:] for name in sample} == {"#1", "#2"}


# JSON arrays


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(json_values, max_size=5), st.sampled_from([None, 1]), st.integers(1, 9), st.booleans())
def test_a_json_array_read_in_chunks_equals_the_array(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any], indent: int | None, chunk: int, ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_CHUNK", chunk)
        if any("\ud800" <= char <= "\udfff" for char in path.read_text("utf-8", "surrogatepass")):
            return
        rows = [row for _, row in json_array.rows(path)]
    for number, row in enumerate(rows, start=1):
        assert isinstance(row, BadRow) or row.pop("__key__") == f"array-{number}"
    expected = [item if isinstance(item, dict) else BadRow for item in items]
    assert [BadRow if isinstance(row, BadRow) else row for row in rows] == expected


# Memory


def write_rows(kind: str, path: Path, number: int) -> Path:
    """Write a source with ``number`` small rows, all with the same image."""
    rows = ({"id": f"row-{n:06d}", "image": "a.png", "text": f"Question {n} about it?"} for n in range(number))
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "llava":
        json_array.write(path, rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=1000)
    else:
        with tarfile.open(path, "w") as archive:
            for row in rows:
                add(archive, f"{row['id']}.png", b"no picture")
                add(archive, f"{row['id']}.txt", row["text"].encode())
    return path


def peak(work: Callable[[], object]) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def exhaust(items: Iterator[object]) -> None:
    for _ in items:
        pass


@pytest.mark.parametrize("kind", ["jsonl", "llava", "parquet", "webdataset"])
def test_memory_is_independent_of_the_number_of_rows(tmp_path: Path, kind: str) -> None:
    peaks = []
    for number in (500, 5000) if kind == "webdataset" else (2000, 20000):
        path = write_rows(kind, tmp_path / f"{number}.{kind}", number)
        (source,) = open_source(str(path), kind, "train", None)
        exhaust(source.rows())  # Exclude imports and caches from the measurement.
        peaks.append(peak(lambda source=source: exhaust(source.rows())))
    assert peaks[1] < peaks[0] * 1.1 + 20_000


@pytest.mark.slow
def test_memory_of_written_prompts_grows_by_one_hash_per_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the source to prompts.parquet, only the hash per id takes memory that grows."""
    monkeypatch.setattr(reading, "load_image", lambda image, most: None)
    (tmp_path / "a.png").write_bytes(png("red"))

    def prompts(number: int) -> Iterator[Prompt]:
        return read_prompts(DataConfig(prompts=str(tmp_path / f"{number}.jsonl")), InputReport())

    def check(number: int) -> None:
        tables.write_prompts(tmp_path / "prompts.parquet", prompts(number), 64)

    for number in (1000, 2000, 8000):
        write_rows("jsonl", tmp_path / f"{number}.jsonl", number)
    check(1000)  # Exclude imports and caches from the measurement.
    few, many = peak(lambda: check(2000)), peak(lambda: check(8000))
    a_row = (many - few) / 6000
    assert pq.read_metadata(tmp_path / "prompts.parquet").num_rows == 8000
    assert a_row < 200, "the hash, and its place in the set"
    a_row_held = (peak(lambda: list(prompts(2000))) - peak(lambda: list(prompts(1000)))) / 1000
    assert a_row_held > 2 * a_row, "which a list of all prompts would exceed"


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json", "prompts"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_rejected_by_name(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(('\ufeff{"id": 1}\n' * 2).encode(encoding))
    with pytest.raises(CsrError, match="is in UTF-16") as rejected:
        detect_format(str(tmp_path / name))
    assert rejected.value.hint == "save it as UTF-8"
