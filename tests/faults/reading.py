"""Run the package's readers on bad input, and measure the time and peak memory of each case.

A worker is a fork that reads cases one after another and reports the outcome of each. A
worker that reports nothing for too long is killed, and its case counts as hanging.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from csr_vlm.config.load import load_config
from csr_vlm.config.schema import DataConfig, ModelConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.data.external_pairs import count_pairs, read_text_pairs
from csr_vlm.data.prompts import InputReport, count_rows, read_prompts
from csr_vlm.evaluation.answers import read_evaluation_prompts
from csr_vlm.method.audit import tree_metrics
from csr_vlm.models.checkpoints import checkpoint_tensors, file_tensors, read_tensors
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.prompt_check import ProcessorCheck
from csr_vlm.pipeline import stages
from csr_vlm.store import ledger, tables
from csr_vlm.store.run import Run
from tests.families import checkpoints as families
from tests.faults.case import MOST_PIXELS, Case, WrittenCase

MOST_SECONDS = 20.0
"""Largest accepted CPU time of one case, in seconds."""
LONGEST_SILENCE = 180.0
"""Wall time in seconds after which a worker counts as hanging; depends on other load."""
MOST_MEGABYTES = 700
"""Largest accepted memory increase of one case; a tar member may have 256 MB and is decoded in memory."""


@dataclass
class Outcome:
    case: str
    status: str
    """accepted, dropped or refused; traceback, silent, hang, crash, greedy and misjudged are defects."""
    reason: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0
    """Peak memory minus the memory before."""

    @property
    def is_defect(self) -> bool:
        return self.status not in ("accepted", "dropped", "refused")


@dataclass
class Results:
    outcomes: list[Outcome] = field(default_factory=list)
    growth: float = 0.0
    """Memory growth of a worker in MB, from its hundredth case to its end."""

    @property
    def defects(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.is_defect]

    def summary(self) -> dict[str, Any]:
        return {
            "cases": len(self.outcomes),
            "by status": dict(Counter(outcome.status for outcome in self.outcomes)),
            "distinct reasons": len({outcome.reason for outcome in self.outcomes}),
            "slowest, s": round(max(outcome.seconds for outcome in self.outcomes), 2),
            "highest peak, MB": round(max(outcome.megabytes for outcome in self.outcomes)),
            "held at the end over after 100 cases, MB": round(self.growth, 1),
        }


def prompts(folder: Path, written: WrittenCase) -> Outcome:
    config, report = _data(folder, written), InputReport()
    count_rows(config)
    accepted = list(read_prompts(config, report, images=folder / "images"))
    for prompt in accepted:
        assert Path(prompt.image).is_file()
        assert prompt.text
        json.dumps(vars(prompt)).encode()
    if accepted:  # Accepted prompts can be stored and read back.
        tables.write_prompts(folder / "kept.parquet", accepted, 4)
        assert [prompt for group in tables.prompt_groups(folder / "kept.parquet") for prompt in group] == accepted
    return _counted(report, written)


def pairs(folder: Path, written: WrittenCase) -> Outcome:
    config, report = DataConfig(prompts="none", pairs=str(folder / written.target)), InputReport()
    count_pairs(config)
    for pair in read_text_pairs(config, report, images=folder / "images"):
        f"{pair.prompt.text}{pair.chosen}{pair.rejected}".encode()
    return _counted(report, written)


def evaluation_prompts(folder: Path, written: WrittenCase) -> Outcome:
    found = read_evaluation_prompts(folder / written.target, images=folder / "images")
    assert len(found) == written.rows
    assert all(item.image_id for item in found)
    return Outcome("", "accepted")


def checked_prompts(folder: Path, written: WrittenCase) -> Outcome:
    """Read prompts with a family's processor; what passes must be encoded without an error."""
    encoder = _encoder(written.settings["family"])
    config, report = DataConfig(prompts=str(folder / written.target), max_image_pixels=MOST_PIXELS), InputReport()
    for prompt in read_prompts(config, report, model=ProcessorCheck(encoder, room=8)):
        tokens = encoder.process(prompt)["input_ids"][0].tolist()
        images = [tokens.count(token) for token in encoder.image_token_ids]
        plain = encoder.process(replace(prompt, text="x"))["input_ids"][0].tolist()
        assert images == [plain.count(token) for token in encoder.image_token_ids], "an image that does not exist"
    assert report.accepted, "the good row is accepted"
    return _counted(report, written)


def recipe(folder: Path, written: WrittenCase) -> Outcome:
    config = load_config(folder / written.target, written.settings.get("overrides", ()))
    Run.create(folder / "run", config)
    assert Run.open(folder / "run").config == config
    return Outcome("", "accepted")


def weights(folder: Path, written: WrittenCase) -> Outcome:
    try:
        for _, tensor in read_tensors(file_tensors(folder / written.target)):
            tensor.float().sum()
    finally:
        assert not (folder / "ran").exists(), "code in the weights file was executed"
    return Outcome("", "accepted")


def checkpoint(folder: Path, written: WrittenCase) -> Outcome:
    tensors = checkpoint_tensors(folder / written.target)
    for _ in read_tensors(tensors or {}):
        pass
    return Outcome("", "accepted")


def model(folder: Path, written: WrittenCase) -> Outcome:
    from csr_vlm.models.loading import load_base

    load_base(ModelConfig(path=str(folder), device="cpu"))
    return Outcome("", "accepted")


def adapter(folder: Path, written: WrittenCase) -> Outcome:
    from csr_vlm.models.loading import load_adapter

    load_adapter(deepcopy(_base_model()), folder)
    return Outcome("", "accepted")


def run(folder: Path, written: WrittenCase) -> Outcome:
    """Read everything that is read of a finished run, and raise the first error at the end."""
    from csr_vlm.report.html import render

    refused = []

    def attempt(read: Callable[[], object]) -> None:
        try:
            read()
        except CsrError as error:
            refused.append(error)

    opened = Run.open(folder / written.target)
    attempt(lambda: stages.check_inputs(opened, Silent()))
    attempt(lambda: list(opened.prompts()))
    attempt(opened.heldout)
    attempt(lambda: [tree_metrics(nodes, [], opened.config.method, "clip") for nodes in ledger.trees(opened, 1)])
    attempt(lambda: list(stages.derive_pairs(opened, 1, opened.config)[0]))
    attempt(lambda: list(tables.read_pairs(opened.pairs_path(1))))
    attempt(opened.write_manifest)
    attempt(lambda: "<script>alert(1)" not in render(opened) or 1 / 0)
    if refused:
        raise refused[0]
    return Outcome("", "accepted")


READERS = {
    reader.__name__: reader
    for reader in (
        *(prompts, pairs, evaluation_prompts, checked_prompts),
        *(recipe, weights, checkpoint, model, adapter, run),
    )
}


@cache
def _encoder(family: str) -> PromptEncoder:
    from csr_vlm.models.loading import load_prompt_encoder

    return load_prompt_encoder(ModelConfig(path=str(families.checkpoint(family)), device="cpu"))


@cache
def _base_model() -> Any:
    from csr_vlm.models.loading import load_base
    from csr_vlm.world.demo import assets

    return load_base(ModelConfig(path=str(assets() / "llava"), device="cpu"))[0]


def _data(folder: Path, written: WrittenCase) -> DataConfig:
    target = (
        written.target if Path(written.target).is_absolute() or not written.target else str(folder / written.target)
    )
    try:
        return DataConfig(prompts=target, max_image_pixels=MOST_PIXELS, **written.settings)
    except ValueError:
        raise CsrError("data.prompts names no source") from None


def _counted(report: InputReport, written: WrittenCase) -> Outcome:
    assert written.rows is None or report.accepted + report.dropped.total() == written.rows, report.dump()
    assert len(report.examples) == min(report.dropped.total(), 20)
    for reason in report.dropped:
        assert reason.isprintable(), reason
        assert 0 < len(reason) < 80, reason
        assert len(str(written.target)) < 3 or written.target not in reason, reason
    json.dumps(report.dump(), ensure_ascii=False).encode()
    if report.dropped:
        return Outcome("", "dropped", report.reasons)
    return Outcome("", "accepted" if report.accepted else "dropped", "empty")


def read_case(case: Case, folder: Path) -> Outcome:
    """Write a case, read it, and return the outcome."""
    folder.mkdir(parents=True)
    written = case.write(folder)
    _forget_peak()
    before, started = _megabytes("VmRSS"), time.process_time()
    try:
        outcome = READERS[written.reader](folder, written)
    except CsrError as error:
        explained = error.message.strip() and len(error.message) < 2000
        outcome = Outcome("", "refused" if explained else "silent", error.message[:300])
    except BaseException:
        outcome = Outcome("", "traceback", traceback.format_exc()[-3000:])
    outcome.case, outcome.seconds = (
        f"{case.name} ({written.target[:40]!r}{written.settings})"[:200],
        time.process_time() - started,
    )
    outcome.megabytes = _megabytes("VmHWM") - before
    rejected = outcome.status in ("dropped", "refused")
    if written.expected is not None and not outcome.is_defect and rejected != (written.expected == "rejected"):
        outcome.status, outcome.reason = "misjudged", f"{outcome.status}: {outcome.reason}"
    if outcome.megabytes > MOST_MEGABYTES:
        outcome.status = "greedy"
    return outcome


def read_all(cases: Iterable[Case], folder: Path) -> Results:
    """Read all cases in forked workers."""
    waiting, results = list(cases), Results()
    while waiting:
        number, growth = _one_worker(waiting, folder, results)
        results.growth = max(results.growth, growth)
        waiting = waiting[number:]
    return results


def _one_worker(cases: list[Case], folder: Path, results: Results) -> tuple[int, float]:
    """Let one worker read cases until it ends, hangs or dies; return how many it read, and its memory growth."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    worker = os.fork()
    if worker == 0:
        try:
            os.close(reading)
            _work(cases, folder, writing)
        finally:
            os._exit(0)
    os.close(writing)
    done, growth, status = 0, 0.0, "crash"
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        buffer = b""
        while True:
            ready, _, _ = select.select([pipe], [], [], LONGEST_SILENCE)
            if not ready:
                status = "hang"
                break
            more = os.read(pipe.fileno(), 1 << 16)
            if not more:
                break
            *lines, buffer = (buffer + more).split(b"\n")
            for line in lines:
                message = json.loads(line)
                growth = message.pop("growth")
                results.outcomes.append(Outcome(**message))
                done += 1
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    if done < len(cases):
        results.outcomes.append(Outcome(cases[done].name, status))
        done += 1
    return done, growth


def _work(cases: list[Case], folder: Path, writing: int) -> None:
    # A limit on memory protects the machine from a decompression bomb that a reader fails to detect.
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    early = 0.0
    for number, case in enumerate(cases):
        case_folder = folder / case.seed.replace(":", "-").replace(" ", "-").replace("/", "-")
        outcome = read_case(case, case_folder)
        if outcome.seconds > MOST_SECONDS:
            outcome.status = "hang"
        with suppress(OSError):
            shutil.rmtree(case_folder)
        if number == min(100, len(cases) // 2):
            early = _megabytes("VmRSS")
        message = vars(outcome) | {"growth": _megabytes("VmRSS") - early if early else 0.0}
        os.write(writing, json.dumps(message).encode() + b"\n")


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _megabytes(field_name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return int(line.split()[1]) / 1024
    return 0.0
