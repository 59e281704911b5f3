"""Run the paper's benchmarks through lmms-eval, refusing or documenting its known pitfalls.

lmms-eval (0.7) can return a number without meaning: LLaVA-in-the-wild without a judge is 100.0,
MMBench without one guesses letters, a failed judge counts as a score, and ``pope`` compares
lower-case strings. Such a task is refused before the first model is loaded, or its result is
refused afterwards. What cannot be refused is recorded in the protocol.

To add a benchmark that lmms-eval has, add an entry to :data:`BENCHMARKS`: its task, its folder and
which of its metrics to read. ``published.yaml`` has the paper's numbers for the same metric names.
A task outside lmms-eval can be run with ``csr eval lmms --include FOLDER`` and needs no entry.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.core.installing import install_command, is_installed
from csr_vlm.evaluation.statistics import Metric, Tally, ratio
from csr_vlm.store.files import sha256_of

_KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}
"""Kind of judge (API_TYPE) to the environment variable that holds its key."""
_LETTER_GUESSING = ("mmbench_en", "mmbench_cn", "mmbench_ko", "mmbench_ru")
"""Prefixes of tasks that guess a letter where their judge does not answer."""
_ROUNDED = 0.06
"""Largest difference between a number above 1 and the ratio of its questions' sums: LLaVA-W is rounded to 0.1."""


@dataclass(frozen=True)
class BenchmarkMetric:
    """Map a metric's name in stored evaluations to its name in lmms-eval's results."""

    name: str
    """Name in stored evaluations, which ``published.yaml`` refers to."""
    lmms_name: str
    """Name in lmms-eval's results, without the filter suffix."""
    tally: Callable[[Any], Tally] | None = None
    """Returns what a question's score adds to the metric, where it is no number and the metric is a ratio of sums."""


@dataclass(frozen=True)
class LmmsBenchmark:
    """Describe one of the paper's benchmarks as a task of lmms-eval."""

    task: str
    folder: str
    """Folder below lmms_eval/tasks. Only the folders in use are indexed: indexing all takes 20 seconds."""
    metrics: tuple[BenchmarkMetric, ...]
    judged: bool = False
    """Whether a language model scores the answers: it needs a key, and the result depends on the judge."""
    skips: bool = False
    """Whether it has questions without exactly one image, which ``metrics`` leave out."""
    note: str = ""
    """Remark on how it is measured, for the protocol."""


def _letters_agree(score: Mapping[str, Any]) -> Tally:
    """Return SEED-Bench's: whether the answered letter is the right one."""
    return float(score["pred"].lower().strip() == score["answer"].lower().strip()), 1.0


def _against_the_reference(score: Mapping[str, Any]) -> Tally:
    """Return LLaVA-in-the-wild's: 100 times the answer's points, over those of the reference answer."""
    reference, answer = score["scores"]
    return 100.0 * answer, float(reference)


def _points_of_hundred(score: Mapping[str, Any]) -> Tally:
    """Return MM-Vet's: the share of the points that the judge gives."""
    return 100.0 * score["score"], 1.0


BENCHMARKS: Mapping[str, LmmsBenchmark] = {
    "mme": LmmsBenchmark(
        "mme",
        "mme",
        (BenchmarkMetric("mme_p", "mme_perception_score"), BenchmarkMetric("mme_c", "mme_cognition_score")),
    ),
    "seed": LmmsBenchmark(
        "seedbench",
        "seedbench",
        (BenchmarkMetric("seed_image", "seed_image", _letters_agree),),
        skips=True,
        note="images only, videos left out",
    ),
    "llava_w": LmmsBenchmark(
        "llava_in_the_wild",
        "llava-in-the-wild",
        (BenchmarkMetric("llava_w", "gpt_eval_llava_all", _against_the_reference),),
        judged=True,
        note="the judge is named as it was asked for: lmms-eval does not keep the name in the replies",
    ),
    "mmb": LmmsBenchmark(
        "mmbench_en_dev_static",
        "mmbench",
        (BenchmarkMetric("mmb", "gpt_eval_score"),),
        note="English development split; letters read by rule, no judge",
    ),
    "mm_vet": LmmsBenchmark(
        "mmvet",
        "mmvet",
        (BenchmarkMetric("mm_vet", "gpt_eval_score", _points_of_hundred),),
        judged=True,
        note="the question is preceded by a request to think step by step",
    ),
    "sqa": LmmsBenchmark("scienceqa_img", "scienceqa", (BenchmarkMetric("sqa", "exact_match"),)),
    "vizwiz": LmmsBenchmark(
        "vizwiz_vqa_val",
        "vizwiz_vqa",
        (BenchmarkMetric("vizwiz_val", "exact_match"),),
        note="validation split, scored locally",
    ),
    "gqa": LmmsBenchmark("gqa", "gqa", (BenchmarkMetric("gqa", "exact_match"),)),
}


def select_benchmarks(names: Sequence[str], include: Path | None) -> dict[str, LmmsBenchmark]:
    """Look up benchmarks and refuse those whose result would be meaningless.

    Args:
        names: Keys of :data:`BENCHMARKS`, or tasks in ``include``.
        include: Folder with further lmms-eval tasks; the code in it is executed.

    Raises:
        CsrError: lmms-eval is not installed, a name is unknown, or a task would be scored wrongly.
    """
    selected: dict[str, LmmsBenchmark] = {}
    for name in names:
        if name == "pope":
            raise CsrError(
                "lmms-eval's pope compares strings and computes its yes ratio from the labels", "use csr eval pope"
            )
        if name.startswith(_LETTER_GUESSING) and not name.endswith("_static"):
            raise CsrError(f"{name} guesses letters where its judge does not answer", "use --tasks mmb")
        if name not in BENCHMARKS and include is None:
            raise CsrError(
                f"{name!r} is not a valid benchmark",
                f"expected one of: {', '.join(BENCHMARKS)}; or pass --include with the folder of your own task",
            )
        selected[name] = BENCHMARKS.get(name) or LmmsBenchmark(name, "", ())
        if selected[name].judged:
            _require_judge(name)
    if not is_installed("lmms_eval"):
        raise CsrError("lmms-eval is not installed", install_command("eval"))
    return selected


def _require_judge(name: str) -> None:
    variable = _KEY_VARIABLES.get(os.environ.get("API_TYPE", "openai").lower())
    if variable is not None and not os.environ.get(variable):
        raise CsrError(
            f"{name} is scored by a language model and {variable} is not set", f"set {variable}, or omit {name}"
        )


def run_benchmarks(
    model: Any, benchmarks: Mapping[str, LmmsBenchmark], *, include: Path | None, limit: int | None
) -> dict[str, Any]:
    """Run benchmarks and convert the results to an evaluation document.

    Args:
        model: A :class:`~csr_vlm.evaluation.lmms_model.PolicyModel`.
        limit: Number of questions per benchmark, from its start; recorded in the protocol.

    Returns:
        ``metrics``, ``protocol`` (by benchmark) and ``rows`` (one per question).

    Raises:
        CsrError: A benchmark cannot be loaded, or its result is not trustworthy.
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
        raise CsrError(f"lmms-eval has no task {unknown[0]!r}", f"expected one of: {', '.join(manager.all_tasks[:8])}")
    # Tasks print to stdout and write submission files to the output path.
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(sys.stderr),
        unscored_answers() as unscored,
    ):
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
    if unscored:
        raise CsrError(
            f"the judge gave no score to {len(unscored)} answers, which would count as 0", "use another judge model"
        )
    document = read_results(results, benchmarks, model.unanswered, model.limits, limit)
    for name, benchmark in benchmarks.items():
        if benchmark.folder:  # the task's code has its prompts, for the policy and for the judge
            document["protocol"][name]["task_code"] = sha256_of(home / benchmark.folder / "utils.py")
    return document


@contextlib.contextmanager
def unscored_answers() -> Iterator[list[str]]:
    """Collect what lmms-eval logs about answers to which a judge gave no score; MM-Vet then counts 0."""
    from loguru import logger

    found: list[str] = []

    def note(message: str) -> None:
        if "failed to get a score" in message:
            found.append(message)

    sink = logger.add(note, level="INFO", format="{message}")
    try:
        yield found
    finally:
        logger.remove(sink)


def read_results(
    results: Mapping[str, Any],
    benchmarks: Mapping[str, LmmsBenchmark],
    unanswered: Mapping[str, int],
    limits: Mapping[str, int],
    limit: int | None,
) -> dict[str, Any]:
    """Convert lmms-eval's results to metrics, protocol and rows.

    Args:
        unanswered: Task to the number of questions that were not put to the policy.
        limits: Task to its max_new_tokens.
        limit: Number of questions per benchmark, or None for all.

    Raises:
        CsrError: Questions went unanswered, a judge failed, or a metric is missing.
    """
    metrics: dict[str, Any] = {}
    protocol: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name, benchmark in benchmarks.items():
        task = benchmark.task
        samples = results["samples"][task]
        _refuse_untrustworthy(name, benchmark, samples, unanswered.get(task, 0))
        values = results["results"][task]
        task_metrics = benchmark.metrics or _all_metrics(name, values)
        columns = {metric.name: _tallies(samples, metric) for metric in task_metrics}
        for metric in task_metrics:
            value = values.get(f"{metric.lmms_name},none")
            if not isinstance(value, int | float):
                raise CsrError(
                    f"lmms-eval returned no {metric.lmms_name} for {name}",
                    f"install lmms-eval 0.7: {install_command('eval')}",
                )
            counted = [sample for sample in samples if sample.get(metric.lmms_name) is not None]
            metrics[metric.name] = _metric(float(value), columns[metric.name], len(counted)).dump()
        protocol[name] = _protocol(benchmark, results, limits.get(task), limit, unanswered.get(task, 0))
        protocol[name] |= _judge_names(benchmark, samples)
        for index, sample in enumerate(samples):
            tallies = {key: column[index] for key, column in columns.items() if index in column}
            rows.append({"id": f"{name}/{sample['doc_id']}", "text": _answer(sample), "tallies": tallies})
    return {"metrics": metrics, "protocol": protocol, "rows": rows}


def _refuse_untrustworthy(
    name: str, benchmark: LmmsBenchmark, samples: Sequence[Mapping[str, Any]], unanswered: int
) -> None:
    if unanswered and not benchmark.skips:
        raise CsrError(
            f"{name}: {unanswered} questions do not have exactly one image and were not answered",
            f"a policy takes one image per prompt; omit {name}",
        )
    scores = [sample.get(metric.lmms_name) for sample in samples for metric in benchmark.metrics]
    num_failed = sum(_judge_failed(score) for score in scores if isinstance(score, Mapping))
    if num_failed:
        raise CsrError(
            f"{name}: the judge failed on {num_failed} answers, which would count as scores", "try again later"
        )


def _judge_failed(score: Mapping[str, Any]) -> bool:
    """Check whether the judge gave no score: -1 in LLaVA-in-the-wild, an empty judge name in MM-Vet."""
    return -1 in score.get("scores", ()) or score.get("eval_model") == ""


def _all_metrics(name: str, values: Mapping[str, Any]) -> tuple[BenchmarkMetric, ...]:
    """Return every number of a task without an entry in ``BENCHMARKS``, under lmms-eval's own names."""
    metrics = [key.removesuffix(",none") for key, value in values.items() if key.endswith(",none")]
    return tuple(
        BenchmarkMetric(f"{name}_{metric}", metric)
        for metric in metrics
        if not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered"))
        and isinstance(values[f"{metric},none"], int | float)
    )


def _tallies(samples: Sequence[Mapping[str, Any]], metric: BenchmarkMetric) -> dict[int, Tally]:
    """Return the tally of each question that has the metric; empty if the metric is no ratio of sums."""
    values = {index: sample.get(metric.lmms_name) for index, sample in enumerate(samples)}
    found = {index: value for index, value in values.items() if value is not None}
    if metric.tally is not None:
        try:
            return {index: metric.tally(value) for index, value in found.items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}  # another version's form of a score
    if not all(isinstance(value, int | float) for value in found.values()):
        return {}
    return {index: (float(value), 1.0) for index, value in found.items()}


def _metric(value: float, tallies: Mapping[int, Tally], number: int) -> Metric:
    """Attach an interval to the value where it equals the ratio of the questions' sums, up to a rounded digit."""
    if tallies:
        mean = ratio([a for a, _ in tallies.values()], [b for _, b in tallies.values()])
        if mean.value is not None and abs(mean.value - value) <= (_ROUNDED if value > 1 else 1e-6):
            return Metric(value, mean.low, mean.high, number)
    return Metric(value, None, None, number)


def _judge_names(benchmark: LmmsBenchmark, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the judge's name as the scores state it; empty without a judge."""
    if not benchmark.judged:
        return {}
    scores = [sample.get(metric.lmms_name) for sample in samples for metric in benchmark.metrics]
    names = {score.get("eval_model") for score in scores if isinstance(score, Mapping)} - {None}
    return {"judge": ", ".join(sorted(map(str, names))) or "not stated"}


def _protocol(
    benchmark: LmmsBenchmark,
    results: Mapping[str, Any],
    max_new_tokens: int | None,
    limit: int | None,
    unanswered: int,
) -> dict[str, Any]:
    protocol: dict[str, Any] = {
        "task": benchmark.task,
        "lmms_eval": metadata.version("lmms-eval"),
        "version": results.get("versions", {}).get(benchmark.task),
        "max_new_tokens": max_new_tokens,
        "decoding": "as the task asks, through the run's own engine",
    }
    if limit is not None:
        protocol["limit"] = f"the first {limit} questions only"
    if unanswered:
        protocol["left_out"] = unanswered
    if benchmark.note:
        protocol["note"] = benchmark.note
    return protocol


def _answer(sample: Mapping[str, Any]) -> str:
    """Return the first answer as it was scored."""
    answer: Any = sample.get("filtered_resps") or sample.get("resps") or ""
    while isinstance(answer, list) and answer:
        answer = answer[0]
    return str(answer) if answer else ""


def benchmark_protocol(document: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """Return the protocol of the benchmark that a metric belongs to; empty if it has no entry in ``BENCHMARKS``."""
    for name, benchmark in BENCHMARKS.items():
        if any(known.name == metric for known in benchmark.metrics):
            protocol: Mapping[str, Any] = document["protocol"].get(name, {})
            return protocol
    return {}


def merge_documents(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """Add newly measured benchmarks to the stored ones; a benchmark in both is taken from ``new``."""
    if old is None:
        return dict(new)
    replaced = new["protocol"].keys()
    kept = [row for row in old["rows"] if row["id"].partition("/")[0] not in replaced]
    return {
        "metrics": {**old["metrics"], **new["metrics"]},
        "protocol": {**old["protocol"], **new["protocol"]},
        "rows": kept + list(new["rows"]),
    }
