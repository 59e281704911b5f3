"""Nothing that was changed is used silently: tables, adapters, images, manifests."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Prompt
from csr_vlm.data.images import load_prompt_image, with_hash
from csr_vlm.evaluation.compare import read_documents
from csr_vlm.pipeline import stages
from csr_vlm.report.html import render
from csr_vlm.report.pictures import embed_picture
from csr_vlm.report.provenance import provenance
from csr_vlm.store import files, ledger, tables
from csr_vlm.store.run import Run
from tests.faults.runs import PROMPTS, write_run


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("pristine") / "run")


@pytest.fixture
def run(pristine: Run, tmp_path: Path) -> Run:
    shutil.copytree(pristine.root, tmp_path / "run")
    return Run.open(tmp_path / "run")


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flipped_bits(path: Path, number: int) -> Iterator[int]:
    """Flip one random bit at a time and yield it; the file is whole again at the end."""
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(number):
        bit = draw.randrange(8 * len(content))
        flip(path, bit)
        yield bit
        path.write_bytes(content)


USES: dict[str, tuple[Callable[[Run], Path], Callable[[Run], object]]] = {
    "ledger part": (lambda run: run.ledger_parts(1)[1], lambda run: list(ledger.trees(run, 1))),
    "ledger table": (lambda run: run.ledger_parts(1)[0], lambda run: run.ledger_table(1)),
    "pairs": (lambda run: run.pairs_path(1), lambda run: run.training_paths(1)),
    "ledger part in the report": (lambda run: run.ledger_parts(1)[1], render),
    "pairs in the report": (lambda run: run.pairs_path(1), render),
    "pairs to show": (lambda run: run.pairs_path(1), lambda run: list(run.pairs(1))),
    "questions": (lambda run: run.questions_path(1), lambda run: run.training_paths(1)),
    "adapter": (
        lambda run: run.iteration(1) / "adapter" / "adapter_model.safetensors",
        lambda run: run.adapter_path(1),
    ),
    "final adapter": (
        lambda run: run.iteration(1) / "adapter" / "adapter_config.json",
        lambda run: run.trained_adapter(),
    ),
    "prompts": (lambda run: run.prompts_path, lambda run: stages.check_inputs(run, Silent())),
    "held-out prompts": (lambda run: run.heldout_path, lambda run: stages.check_inputs(run, Silent())),
    "prompts of trees": (lambda run: run.prompts_path, lambda run: list(ledger.trees(run, 1))),
    "held-out prompts in the report": (lambda run: run.heldout_path, render),
    "configuration": (lambda run: run.root / "config.yaml", lambda run: Run.open(run.root)),
}


@pytest.mark.parametrize("name", USES)
def test_every_flipped_bit_is_noticed_at_the_next_use(run: Run, name: str) -> None:
    path_of, use = USES[name]
    path = path_of(run)
    use(run)
    for _ in flipped_bits(path, 10 if use is render else 30):
        with pytest.raises(CsrError, match="was changed after") as error:
            use(run)
        assert str(path) in error.value.message
        assert "restore it" in error.value.hint
    use(run)


@pytest.mark.parametrize(
    "name",
    [name for name in USES if not any(word in name for word in ("prompts", "ledger", "configuration"))],
)
def test_a_missing_file_is_an_error_that_says_what_to_do(run: Run, name: str) -> None:
    path_of, use = USES[name]
    path_of(run).unlink()
    with pytest.raises(CsrError, match="is missing") as error:
        use(run)
    assert "and run again" in error.value.hint


def test_a_changed_value_of_an_evaluation_is_noticed(run: Run) -> None:
    path = run.evaluation_path(1, "heldout")
    content = path.read_text()
    path.write_text(content.replace('"value": 0.5', '"value": 0.1'))
    for use in (render, lambda run: read_documents(run, 1)):
        with pytest.raises(CsrError, match="was changed after it was written") as error:
            use(run)
        assert "csr eval RUN --again" in error.value.hint
    document = json.loads(content)
    del document["digest"]  # as earlier versions, and benchmarks of users, write it
    path.write_text(json.dumps(document))
    render(run)


def test_every_bit_of_a_checksummed_text_counts(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    files.write_checksummed_text(path, "a: 1\nb: null\n")
    for bit in range(8 * path.stat().st_size):
        flip(path, bit)
        with pytest.raises(CsrError, match="was changed after"):
            files.require_text_unchanged(path, "restore it")
        flip(path, bit)
    path.write_text("a: 1\nb: null\n")  # as earlier versions wrote it
    files.require_text_unchanged(path, "restore it")


def test_an_edited_configuration_is_refused_until_its_checksum_is_deleted(run: Run) -> None:
    path = run.root / "config.yaml"
    lines = path.read_text().replace("iterations: 1", "iterations: 2").splitlines(keepends=True)
    path.write_text("".join(lines))
    with pytest.raises(CsrError, match="was changed after it was written") as error:
        Run.open(run.root)
    assert "delete its last line" in error.value.hint
    path.write_text("".join(lines[:-1]))
    assert Run.open(run.root).config.iterations == 2


def without_checksums(run: Run) -> None:
    """Rewrite the markers as version 0.1 wrote them."""
    for marker in run.root.glob("iteration-*/done/*.json"):
        content = {key: value for key, value in files.read_checksummed(marker).items() if key != "files"}
        files.write_checksummed(marker, content)


def test_an_old_run_opens_and_its_missing_pairs_are_still_an_error(run: Run) -> None:
    without_checksums(run)
    assert run.unverified_stages() == ["generate of iteration 1", "pairs of iteration 1", "train of iteration 1"]
    assert len(list(ledger.trees(run, 1))) == PROMPTS - 1
    assert [path.name for path in run.training_paths(1)] == ["pairs.parquet", "questions.parquet"]
    run.questions_path(1).unlink()
    assert [path.name for path in run.training_paths(1)] == ["pairs.parquet"], "it held none"
    result = {**files.read_checksummed(run.iteration(1) / "done" / "pairs.json"), "questions": 3}
    files.write_checksummed(run.iteration(1) / "done" / "pairs.json", result)
    with pytest.raises(CsrError, match=r"questions\.parquet is missing"):
        run.training_paths(1)
    run.pairs_path(1).unlink()
    with pytest.raises(CsrError, match=r"pairs\.parquet is missing"):
        run.training_paths(1)


def test_a_new_run_can_be_verified_entirely(run: Run) -> None:
    assert run.unverified_stages() == []
    recorded = run.result(1, "pairs")["files"]
    assert recorded["iteration-1/pairs.parquet"]["rows"] == tables.count_rows(run.pairs_path(1)) > 0
    assert recorded["iteration-1/questions.parquet"]["rows"] == 0
    assert "files" not in files.read_json(run.manifest_path)["stages"]["iteration-1"]["pairs"]


def test_packing_records_the_new_parts(run: Run) -> None:
    ledger.pack(run, 1, 10**9, Silent().stage("", 0).__enter__())
    (packed,) = run.ledger_parts(1)
    assert len(list(ledger.trees(run, 1))) == PROMPTS - 1
    flip(packed, 1000)
    with pytest.raises(CsrError, match="was changed"):
        list(ledger.trees(run, 1))


def test_a_kill_while_parts_are_replaced_leaves_no_wrong_checksum(run: Run) -> None:
    def rescore(part: Path) -> None:
        nodes = [replace(node, cosines={**node.cosines, "other": 0.5}) for node in tables.read_nodes(part)]
        tables.write_nodes(part, nodes)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ledger.rewriting(run, 1):
        rescore(run.ledger_parts(1)[0])
    assert run.unverified_stages() == ["generate of iteration 1"]
    assert len(list(ledger.trees(run, 1))) == PROMPTS - 1


def test_a_flipped_bit_in_a_page_is_noticed_before_a_marker_exists(run: Run) -> None:
    part = run.ledger_parts(1)[0]
    column = pq.ParquetFile(part).metadata.row_group(0).column(5)  # its pages: header, then token ids
    start = column.dictionary_page_offset or column.data_page_offset
    end = start + column.total_compressed_size
    expected, noticed = list(tables.read_nodes(part)), 0
    for bit in range(8 * (end - 12), 8 * end):
        flip(part, bit)
        try:
            assert list(tables.read_nodes(part)) == expected
        except CsrError:
            noticed += 1
        flip(part, bit)
    assert noticed == 96


# Images


def image_prompt(folder: Path) -> Prompt:
    Image.new("RGB", (4, 4), "red").save(folder / "a.bmp")
    return with_hash(Prompt("a", str(folder / "a.bmp"), "What?"))


def test_an_exchanged_image_stops_the_run_even_with_its_old_size_and_time(tmp_path: Path) -> None:
    prompt = image_prompt(tmp_path)
    path, before = tmp_path / "a.bmp", (tmp_path / "a.bmp").stat()
    load_prompt_image(prompt, 100)
    Image.new("RGB", (4, 4), "lime").save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(CsrError, match="usable when the inputs were checked but is not now: changed"):
        load_prompt_image(prompt, 100)


def test_a_report_shows_no_exchanged_picture(tmp_path: Path) -> None:
    prompt = image_prompt(tmp_path)
    assert embed_picture("a", prompt, 100).uri is not None
    Image.new("RGB", (4, 4), "lime").save(tmp_path / "a.bmp")
    assert embed_picture("a", prompt, 100).uri is None
    assert embed_picture("a", prompt, 100).missing == "image changed"


def test_a_touched_image_is_the_same(tmp_path: Path) -> None:
    prompt = image_prompt(tmp_path)
    os.utime(tmp_path / "a.bmp", (1, 1))
    load_prompt_image(prompt, 100)


def test_the_hash_of_an_image_reaches_prompts_heldout_and_pairs(run: Run) -> None:
    pairs = list(run.pairs(1))
    for prompt in (*run.prompts(), *run.heldout(), *(pair.prompt for pair in pairs)):
        assert prompt.image_sha256 == files.sha256_of(Path(prompt.image))
    in_training = tables.PairFiles(run.training_paths(1))[range(len(pairs))]
    assert all(pair.prompt.image_sha256 for pair in in_training)


# Moved runs


def test_images_in_a_run_move_with_it(tmp_path: Path) -> None:
    inside, outside = tmp_path / "run" / "images" / "a.png", tmp_path / "b.png"
    prompts = [Prompt(path.stem, str(path), "What?") for path in (inside, outside)]
    (tmp_path / "run" / "iteration-1").mkdir(parents=True)
    tables.write_prompts(tmp_path / "run" / "prompts.parquet", prompts, 1, tmp_path / "run")
    tables.write_prompts(tmp_path / "run" / "iteration-1" / "deep.parquet", prompts, 1, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    for name in ("prompts.parquet", "iteration-1/deep.parquet"):
        path = tmp_path / "moved" / name
        read = [prompt.image for group in tables.prompt_groups(path) for prompt in group]
        assert read == [str(tmp_path / "moved" / "images" / "a.png"), str(outside)]
        assert tables.PromptGroups(path)[0][0].image == read[0]
        assert tables.read_whole([path])["image"].to_pylist() == read


# Manifest


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_manifest_is_made_again(run: Run, content: str) -> None:
    stages_before = files.read_json(run.manifest_path)["stages"]
    run.manifest_path.write_text(content)
    assert provenance(run).git is None
    run.restore_manifest()
    assert json.loads(run.manifest_path.read_text())["stages"] == stages_before


def test_a_good_manifest_is_left_alone(run: Run) -> None:
    before = run.manifest_path.read_bytes()
    run.restore_manifest()
    assert run.manifest_path.read_bytes() == before
