"""The paper's benchmarks through lmms-eval, with its traps refused or named.

lmms-eval (0.7) can return a number that means nothing: LLaVA-in-the-wild without a judge is
100.0, MMBench without one guesses letters, a failed judge counts as a score, ``pope`` compares
lower-case strings. Such a task is refused before the first model is loaded, or its number
afterwards; what cannot be refused is written into the protocol.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.statistics import Metric, Tally, ratio

_KEYS = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}
"""Kind of judge (API_TYPE) to the variable that holds its key."""
_GUESSING = ("mmbench_en", "mmbench_cn", "mmbench_ko", "mmbench_ru")


@dataclass(frozen=True)
class Reading:
    """Where a number of ours stands in lmms-eval's results."""

    name: str
    """Its name in our records, as the published tables look for it."""
    metric: str
    """lmms-eval's name."""


@dataclass(frozen=True)
class Benchmark:
    """One of the paper's benchmarks as lmms-eval runs it."""

    task: str
    folder: str
    """Below lmms_eval/tasks: only these are indexed, all of them take 20 seconds."""
    readings: tuple[Reading, ...]
    judged: bool = False
    """A language model scores the answers, so a key is needed and the number depends on the judge."""
    skips: bool = False
    """Has questions without exactly one image, which the metric read here leaves out."""
    note: str = ""


BENCHMARKS: Mapping[str, Benchmark] = {
    "mme": Benchmark("mme", "mme", (Reading("mme_p", "mme_perception_score"), Reading("mme_c", "mme_cognition_score"))),
    "seed": Benchmark(
        "seedbench", "seedbench", (Reading("seed", "seed_image"),), skips=True, note="images only, videos left out"
    ),
    "llava_w": Benchmark(
        "llava_in_the_wild", "llava-in-the-wild", (Reading("llava_w", "gpt_eval_llava_all"),), judged=True
    ),
    "mmb": Benchmark(
        "mmbench_en_dev_static",
        "mmbench",
        (Reading("mmb", "gpt_eval_score"),),
        note="English development split; letters read by rule, no judge",
    ),
    "mm_vet": Benchmark("mmvet", "mmvet", (Reading("mm_vet", "gpt_eval_score"),), judged=True),
    "sqa": Benchmark("scienceqa_img", "scienceqa", (Reading("sqa", "exact_match"),)),
    "vizwiz": Benchmark(
        "vizwiz_vqa_val", "vizwiz_vqa", (Reading("vizwiz", "exact_match"),), note="validation split, scored locally"
    ),
    "gqa": Benchmark("gqa", "gqa", (Reading("gqa", "exact_match"),)),
}


def chosen(names: Sequence[str], include: Path | None) -> dict[str, Benchmark]:
    """Look the benchmarks up and refuse what would give a number without a meaning.

    Args:
        names: Names of ours, or of tasks in ``include``.
        include: Folder with further lmms-eval tasks; their code is run.

    Raises:
        CsrError: lmms-eval is absent, a name is unknown, or a task would be scored wrongly.
    """
    found: dict[str, Benchmark] = {}
    for name in names:
        if name == "pope":
            raise CsrError(
                "lmms-eval's pope compares strings and counts labels for its yes ratio", "use: csr eval pope"
            )
        if name.startswith(_GUESSING) and not name.endswith("_static"):
            raise CsrError(f"{name} guesses letters where its judge does not answer", "use: --tasks mmb")
        if name not in BENCHMARKS and include is None:
            raise CsrError(
                f"there is no benchmark {name!r}", f"known are {', '.join(BENCHMARKS)}; --include takes own tasks"
            )
        found[name] = BENCHMARKS.get(name) or Benchmark(name, "", ())
        if found[name].judged:
            _require_judge(name)
    if util.find_spec("lmms_eval") is None:
        raise CsrError("lmms-eval is not installed", "pip install 'csr-vlm[eval]'")
    return found


def _require_judge(name: str) -> None:
    kind = os.environ.get("API_TYPE", "openai").lower()
    variable = _KEYS.get(kind)
    if variable is not None and not os.environ.get(variable):
        raise CsrError(f"{name} is scored by a language model and {variable} is not set", "set it, or leave it out")


def run(model: Any, benchmarks: Mapping[str, Benchmark], *, include: Path | None, limit: int | None) -> dict[str, Any]:
    """Run benchmarks and read the results into an evaluation document.

    Args:
        model: A :class:`~csr_vlm.evaluation.lmms_model.PolicyModel`.
        limit: Use the first so many questions of each; the protocol says so.

    Returns:
        ``metrics``, ``protocol`` (by benchmark) and ``rows`` (one a question).

    Raises:
        CsrError: A benchmark cannot be loaded, or its number is not to be trusted.
    """
    import lmms_eval
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    home = Path(lmms_eval.__file__).parent / "tasks"
    folders = [str(home / benchmark.folder) for benchmark in benchmarks.values() if benchmark.folder]
    folders += [str(include.resolve())] if include is not None else []
    manager = TaskManager("ERROR", include_path=folders, include_defaults=False)
    tasks = [benchmark.task for benchmark in benchmarks.values()]
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise CsrError(f"lmms-eval has no task {unknown[0]}", f"found are {', '.join(manager.all_tasks[:8])}")
    # Tasks print, and leave submission files where the command was started.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        results = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
            process_docs_parallel=1,
            cli_args=Namespace(output_path=scratch, process_with_media=True),
        )
    return read_results(results, benchmarks, model.unanswered, model.limits, limit)


def read_results(
    results: Mapping[str, Any],
    benchmarks: Mapping[str, Benchmark],
    unanswered: Mapping[str, int],
    limits: Mapping[str, int],
    limit: int | None,
) -> dict[str, Any]:
    """Turn lmms-eval's results into metrics, protocol and rows.

    Raises:
        CsrError: Questions went unanswered, a judge failed, or a number is missing.
    """
    metrics: dict[str, Any] = {}
    protocol: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name, benchmark in benchmarks.items():
        task = benchmark.task
        samples = results["samples"][task]
        _refuse_untrustworthy(name, benchmark, samples, unanswered.get(task, 0))
        found = results["results"][task]
        readings = benchmark.readings or _all_readings(name, found)
        tallies = {reading.name: _tallies(samples, reading.metric) for reading in readings}
        for reading in readings:
            value = found.get(f"{reading.metric},none")
            if not isinstance(value, int | float):
                raise CsrError(f"lmms-eval gave no {reading.metric} for {name}", "is its version 0.7?")
            metrics[reading.name] = _metric(float(value), tallies[reading.name], len(samples)).dump()
        protocol[name] = _protocol(benchmark, results, limits.get(task), limit, unanswered.get(task, 0))
        for place, sample in enumerate(samples):
            mine = {key: column[place] for key, column in tallies.items() if column is not None}
            rows.append({"id": f"{name}/{sample['doc_id']}", "text": _answer(sample), "tallies": mine})
    return {"metrics": metrics, "protocol": protocol, "rows": rows}


def _refuse_untrustworthy(
    name: str, benchmark: Benchmark, samples: Sequence[Mapping[str, Any]], unanswered: int
) -> None:
    if unanswered and not benchmark.skips:
        raise CsrError(
            f"{name}: {unanswered} questions have no image or several and were not answered",
            "a policy takes one image; leave this benchmark out",
        )
    scored = [sample.get(reading.metric) for sample in samples for reading in benchmark.readings]
    failed = sum(_judge_failed(found) for found in scored if isinstance(found, Mapping))
    if failed:
        raise CsrError(f"{name}: the judge failed on {failed} answers, which would count as scores", "try again later")


def _judge_failed(found: Mapping[str, Any]) -> bool:
    """Whether an answer has no verdict: -1 in LLaVA-in-the-wild, 0 by a judge without a name in MM-Vet."""
    return -1 in found.get("scores", ()) or found.get("eval_model") == ""


def _all_readings(name: str, found: Mapping[str, Any]) -> tuple[Reading, ...]:
    """Every number of a task that is not one of ours, under lmms-eval's own names."""
    metrics = [key.removesuffix(",none") for key, value in found.items() if key.endswith(",none")]
    return tuple(
        Reading(f"{name}_{metric}", metric)
        for metric in metrics
        if not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered"))
        and isinstance(found[f"{metric},none"], int | float)
    )


def _tallies(samples: Sequence[Mapping[str, Any]], metric: str) -> list[Tally] | None:
    """Each question's share of a metric that is a mean over questions; None for any other."""
    values = [sample.get(metric) for sample in samples]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    return [(float(value), 1.0) for value in values if isinstance(value, int | float)]


def _metric(value: float, tallies: Sequence[Tally] | None, number: int) -> Metric:
    """Give the value an interval where it is the mean that the questions' own scores add up to."""
    if tallies is not None:
        mean = ratio([a for a, _ in tallies], [b for _, b in tallies])
        if mean.value is not None and abs(mean.value - value) < 1e-6:
            return mean
    return Metric(value, None, None, number)


def _protocol(
    benchmark: Benchmark, results: Mapping[str, Any], max_new_tokens: int | None, limit: int | None, unanswered: int
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "task": benchmark.task,
        "lmms_eval": metadata.version("lmms-eval"),
        "version": results.get("versions", {}).get(benchmark.task),
        "max_new_tokens": max_new_tokens,
        "decoding": "as the task asks, through the run's own engine",
    }
    if benchmark.judged:
        found["judge"] = os.environ.get("MODEL_VERSION", "the default of lmms-eval")
    if limit is not None:
        found["limit"] = f"the first {limit} questions only"
    if unanswered:
        found["left_out"] = unanswered
    if benchmark.note:
        found["note"] = benchmark.note
    return found


def _answer(sample: Mapping[str, Any]) -> str:
    """The first answer as it was scored."""
    found: Any = sample.get("filtered_resps") or sample.get("resps") or ""
    while isinstance(found, list) and found:
        found = found[0]
    return str(found) if found else ""


def protocol_of(document: Mapping[str, Any], reading: str) -> Mapping[str, Any]:
    """The protocol of the benchmark that a number belongs to; empty where it is not one of the paper's."""
    for name, benchmark in BENCHMARKS.items():
        if any(known.name == reading for known in benchmark.readings):
            found: Mapping[str, Any] = document["protocol"].get(name, {})
            return found
    return {}


def joined(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """Put newly measured benchmarks beside those that a policy already has."""
    if old is None:
        return dict(new)
    fresh = new["protocol"].keys()
    kept = [row for row in old["rows"] if row["id"].partition("/")[0] not in fresh]
    return {
        "metrics": {**old["metrics"], **new["metrics"]},
        "protocol": {**old["protocol"], **new["protocol"]},
        "rows": kept + list(new["rows"]),
    }
