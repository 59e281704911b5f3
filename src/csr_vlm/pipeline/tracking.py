"""Log a whole run to experiment trackers: one run of the tracker, with the iteration as step.

What is logged follows from the markers of finished stages. ``RUN/tracking.json`` records the tracker's run and
the logged iterations, so a resumed run goes on in the same run of the tracker and logs nothing twice. A tracker
that fails is reported and left out; the run goes on.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from csr_vlm.core.errors import reason_of
from csr_vlm.core.memory import COSTS
from csr_vlm.method.audit import PAIR_BOUNDS, RESPONSE_BOUNDS
from csr_vlm.pipeline.trackers import Example, Service, open_service
from csr_vlm.report.before_after import before_after
from csr_vlm.report.evaluations import read_evaluation
from csr_vlm.report.limits import Sample
from csr_vlm.store import files
from csr_vlm.store.run import Run
from csr_vlm.store.stage_names import ITERATION_STAGES

_SKIPPED = ("epoch", "step", "train_runtime")
"""Entries of TRL's log that are no metrics."""


class Tracking:
    """Log the finished iterations of a run to the trackers of its configuration.

    Args:
        run: Run to log; its trackers are opened when the first iteration is finished.
        log: Receives the reason why a tracker is left out.
    """

    def __init__(self, run: Run, log: Callable[[str], None]) -> None:
        self._run = run
        self._log = log
        self._services: dict[str, Service] = {}
        self._failed: set[str] = set()
        self._path = run.root / "tracking.json"
        stored = files.read_document(self._path) if self._path.is_file() else {}
        self._state: dict[str, Any] = {name: stored.get(name, {}) for name in run.config.tracking.to}

    def log_iterations(self) -> None:
        """Log every iteration that is finished and was not logged yet."""
        for iteration in finished_iterations(self._run):
            for name in self._state:
                if iteration not in self._state[name].get("iterations", []):
                    self._attempt(name, partial(self._log_iteration, iteration))
                    if name not in self._failed:
                        self._state[name].setdefault("iterations", []).append(iteration)
                        files.write_json(self._path, self._state)

    def finish(self, report: Path) -> None:
        """Add the report and the examples before and after, and close the trackers."""
        examples = list(read_examples(self._run)) if self._state else []
        for name in self._state:
            digest = files.sha256_of(report)
            if self._state[name].get("report") != digest:
                self._attempt(name, lambda service: service.finish(report, examples, self._run.final))
                if name not in self._failed:
                    self._state[name]["report"] = digest
                    files.write_json(self._path, self._state)
            elif name in self._services:
                self._attempt(name, lambda service: service.close())

    def _log_iteration(self, iteration: int, service: Service) -> None:
        service.log_iteration(iteration, iteration_values(self._run, iteration))
        for step, values in training_values(self._run, iteration):
            service.log_step(step, values)

    def _attempt(self, name: str, use: Callable[[Service], None]) -> None:
        """Use a tracker; one that fails is not tried again in this process."""
        if name in self._failed:
            return
        try:
            if name not in self._services:
                service = open_service(name, self._run, self._state[name].get("id"))
                self._services[name] = service
                if self._state[name].get("id") != service.run_id:
                    # Before anything is logged, so that a run that was killed goes on in the same tracker run.
                    self._state[name]["id"] = service.run_id
                    files.write_json(self._path, self._state)
            use(self._services[name])
        except Exception as error:  # Trackers talk to servers, and may fail in any way.
            self._failed.add(name)
            self._log(f"warning: {name} failed and is left out: {reason_of(error)}")


def finished_iterations(run: Run) -> list[int]:
    """Return the iterations whose last stage is done, or that stopped the run; with 0, the evaluated base model."""
    finished = {*run.iterations_done(ITERATION_STAGES[-1]), *({run.stopped_at} if run.stopped_at else ())}
    return sorted(finished | ({0} if run.is_done(0, "evaluate") else set()))


def iteration_values(run: Run, iteration: int) -> dict[str, float]:
    """Collect the numbers of an iteration's markers under names such as ``world/chair_s``.

    These are the evaluations with the bounds of their intervals, the quality checks with the values that warn
    and stop, the counts and means of the pairs, and the seconds and the peak memory of each stage.
    """
    values: dict[str, float] = {}
    stages = [stage for stage in ("evaluate", *ITERATION_STAGES) if run.is_done(iteration, stage)]
    for stage in dict.fromkeys(stages):
        result = run.result(iteration, stage)
        values |= {f"{cost}/{stage}": result[cost] for cost in COSTS if cost in result}
        if stage == "evaluate":
            values |= dict(_evaluated(result))
        elif stage in ("audit", "gate"):
            values |= {f"{stage}/{name}": value for name, value in result["metrics"].items()}
            values |= dict(_bounds(stage, result["metrics"]))
        elif stage in ("pairs", "generate", "train"):
            values |= {f"{stage}/{name}": value for name, value in result.items() if name not in COSTS}
    return {name: float(value) for name, value in values.items() if _is_number(value)}


def _evaluated(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for evaluation, metrics in result.items():
        for name, metric in metrics.items() if isinstance(metrics, Mapping) else ():
            yield f"{evaluation}/{name}", metric["value"]
            yield f"{evaluation}/{name}/low", metric["low"]
            yield f"{evaluation}/{name}/high", metric["high"]


def _bounds(stage: str, metrics: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Yield from which value on a metric warns and stops."""
    for name, bound in (PAIR_BOUNDS if stage == "audit" else RESPONSE_BOUNDS).items():
        if name in metrics:
            yield f"{stage}/{name}/warn", bound.warn
            yield f"{stage}/{name}/stop", bound.stop


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def training_values(run: Run, iteration: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (training step of the whole run, values) of an iteration's training."""
    if not iteration or not run.is_done(iteration, "train"):
        return
    before = sum(
        max((int(entry["step"]) for entry in run.result(number, "train")["log"]), default=0)
        for number in run.iterations_done("train")
        if number < iteration
    )
    for entry in run.result(iteration, "train")["log"]:
        numbers = {f"train/{name}": float(value) for name, value in entry.items() if _is_number(value)}
        yield (
            before + int(entry["step"]),
            {name: value for name, value in numbers.items() if name.removeprefix("train/") not in _SKIPPED},
        )


def read_examples(run: Run) -> Iterator[Example]:
    """Yield held-out pictures with the responses of the first and of the last policy, as the report shows them."""
    from csr_vlm.world.truth import known_scene

    evaluation = read_evaluation(run)
    number = run.config.tracking.examples
    shown = before_after(run, evaluation, Sample(compared=number), known_scene) if evaluation and number else None
    for card in shown.cards if shown is not None else ():
        texts = [" ".join(str(s.markup.striptags()) for s in each.sentences) for each in (card.before, card.after)]
        yield Example(card.prompt_id, card.question, texts[0], texts[1], card.change.name, _picture(card.picture.uri))


def _picture(uri: str | None) -> Image.Image | None:
    if uri is None:
        return None
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
