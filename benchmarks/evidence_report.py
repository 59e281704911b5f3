"""Write the tables and plots of ``docs/evidence`` from the results of ``evidence.py``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import baseline
import seed_ledger
from evidence_plots import Line, draw
from evidence_tables import (
    LEGEND,
    Runs,
    SceneTallies,
    base_cell,
    cell,
    difference,
    interval,
    levels,
    seeds_cell,
    seeds_needed,
    table,
)

from csr_vlm.config.load import scorer_config
from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.metrics import metric_spec
from csr_vlm.evaluation.statistics import Metric, established, holm
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.world.dataset import write_images
from csr_vlm.world.demo import assets
from csr_vlm.world.scene_evaluation import Described, sentence_relevance, tallies
from csr_vlm.world.scenes import World, parse_scene_id, world_named
from csr_vlm.world.truth import judge

_KEYS = (
    "chair_s", "chair_i", "recall", "companion_recall", "attributes_right", "repeats", "words", "relevance",
    "yes_no_present", "yes_no_absent", "yes_no_companion",
)  # fmt: skip
COLUMNS = {key: metric_spec(key).label for key in _KEYS}
_CURVES = ("chair_s", "recall")
"""Metrics that are plotted against a setting."""
SHORT = ("chair_s", "chair_i", "recall", "companion_recall", "repeats", "words", "relevance")
ROOT = Path(__file__).resolve().parents[1]
ALONE = "1 seed, no interval over runs"


def write(jobs: Sequence[Any], out: Path, to: Path, *, rerun: bool = False, ledger: Path = seed_ledger.LEDGER) -> None:
    """Write all tables and plots whose jobs have results, and all metrics as ``results.json``.

    Raises:
        CsrError: Another table reports the test seed and ``rerun`` is false, or results mix seeds.
    """
    done = [result for result in (Result(job, out) for job in jobs) if result.finished]
    if not done:
        raise CsrError(f"{out} has no results", f"run first: python benchmarks/evidence.py run --out {out}")
    numbers = {result.job.key: result.numbers() for result in done}
    note = _report_test_seed(done, numbers, out, to, rerun=rerun, ledger=ledger)
    to.mkdir(parents=True, exist_ok=True)
    steps = LEGEND.format(reference="iteration 0")
    parts = [
        _main(done, to),
        _prose(done),
        _comparisons(done),
        _final_table(done, "ablations", "What each part is worth"),
        _final_table(done, "settings", "Other settings"),
        _lambdas(out, to),
        _iteration_table(
            done,
            "questions",
            "Without claim questions",
            f"The default preset trained on descriptions only; 1,000 test scenes, greedy decoding. {steps}",
        ),
        _iteration_table(
            done,
            "generality",
            "Other base models and another world",
            f"The default preset, unchanged; 1,000 test scenes, greedy decoding. {steps}",
        ),
        _audits(done),
        _scorers(out, to),
        _priors(out, to),
    ]
    commits = sorted({result.info["commit"] for result in done})
    head = (
        "# Evidence\n\nWritten by `benchmarks/evidence.py` (commits " + ", ".join(commits) + "). Every run used one "
        "thread; times are for search and training together. CHAIR and recall are computed against the known contents "
        "of drawn scenes. Intervals are 95 %, over scenes and over runs (Student t over seeds). A difference is "
        f"established only if both intervals exclude 0. {note}\n"
    )
    (to / "README.md").write_text("\n".join([head, *filter(None, parts)]), encoding="utf-8")
    (to / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def _report_test_seed(
    done: Sequence[Result], numbers: Mapping[str, Any], out: Path, to: Path, *, rerun: bool, ledger: Path
) -> str:
    """Check that the results are of the folder's test seed, record the table in the ledger, and return its note."""
    tested = [result for result in done if result.job.split == "test"]
    if not tested:
        return "No test scenes were used."
    seed = seed_ledger.seed_of(out)
    for result in tested:
        found = result.seeds()
        if found - {seed}:
            raise CsrError(
                f"{result.job.key} was measured on test seed {min(found - {seed})}, not on {seed}",
                f"delete {result.root} and run again",
            )
    of_test = {result.job.key: numbers[result.job.key] for result in tested}
    name = str(to.resolve().relative_to(ROOT)) if to.resolve().is_relative_to(ROOT) else to.name
    note = seed_ledger.report(ledger, seed, f"{name}/README.md", of_test, rerun=rerun)
    return f"Test scenes are those of seed {seed}. {note}".strip()


def write_baseline(rows: Sequence[baseline.Row], jobs: Sequence[Any], out: Path, to: Path) -> None:
    """Write ``baseline.md`` and ``baseline.json``: presets as they are, on the profiles and on a world."""
    done = [result for result in (Result(job, out) for job in jobs) if result.finished]
    commits = sorted({row["commit"] for row in rows} | {result.info["commit"] for result in done})
    pictures = rows[0]["key"][-1]
    head = (
        "# Baseline\n\nWhat the presets do as they are. Only the profile `world` is like the scenes "
        "on which the default was chosen. Written by `python benchmarks/evidence.py baseline` (commits "
        f"{', '.join(commits)}).\n\n"
        f"## Profiles\n\n{pictures} pictures for each profile and seed, {baseline.NUM_SEEDS} seeds. Intervals are "
        "95 % Student t over seeds; each seed draws its own pictures, so they are over pictures too. Right "
        "decisions are true > false, END > false, true > END and true > mood; wrong ones are the reverse; a share "
        "of 0.5 is chance. END stands for ending the response.\n"
    )
    parts = [head, baseline.profile_tables(rows)]
    for group in dict.fromkeys(result.job.group for result in done):
        world = group.removeprefix("baseline-")
        parts.append(
            _iteration_table(
                done,
                group,
                f"World {world}",
                f"{done[0].job.scenes} development scenes, greedy decoding. {LEGEND.format(reference='iteration 0')}",
            )
        )
    to.mkdir(parents=True, exist_ok=True)
    (to / "baseline.md").write_text("\n".join(parts), encoding="utf-8")
    kept = [{name: value for name, value in row.items() if name not in ("checks", "decisions")} for row in rows]
    lines = ",\n".join(json.dumps(row) for row in kept)
    runs = json.dumps({result.job.key: result.numbers() for result in done})
    (to / "baseline.json").write_text(f'{{"profiles": [\n{lines}\n],\n"runs": {runs}}}\n', encoding="utf-8")


class Result:
    """Read the results of a job."""

    def __init__(self, job: Any, out: Path) -> None:
        from evidence import directory_of

        self.job = job
        self.root = directory_of(job, out)
        self.finished = (self.root / "result.json").exists()
        self.info: dict[str, Any] = json.loads((self.root / "result.json").read_text()) if self.finished else {}

    def rows(self, iteration: int, temperature: float = 0.0) -> SceneTallies:
        path = self.root / f"iteration-{iteration}" / "eval" / f"world-{temperature:g}.json"
        return {row["id"]: row["tallies"] for row in json.loads(path.read_text())["rows"]} if path.exists() else {}

    def texts(self, iteration: int) -> dict[str, str]:
        path = self.root / f"iteration-{iteration}" / "eval" / "world-0.json"
        return {row["id"]: row["text"] for row in json.loads(path.read_text())["rows"]}

    def values(self, iteration: int, temperature: float = 0.0) -> dict[str, float]:
        rows = self.rows(iteration, temperature).values()
        sums: dict[str, list[float]] = {}
        for row in rows:
            for name, (top, bottom) in row.items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += top
                total[1] += bottom
        return {name: top / bottom for name, (top, bottom) in sums.items() if bottom}

    def seeds(self) -> set[int]:
        """Return the seeds of the scenes that the run was evaluated on."""
        paths = sorted(self.root.glob("iteration-*/eval/world-*.json"))
        return {json.loads(path.read_text())["protocol"]["seed"] for path in paths}

    def marker(self, iteration: int, stage: str) -> dict[str, Any]:
        path = self.root / f"iteration-{iteration}" / "done" / f"{stage}.json"
        result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return result

    def numbers(self) -> dict[str, Any]:
        return {
            "overrides": self.job.overrides,
            "seconds": [round(second, 1) for second in self.info["seconds"]],
            "greedy": {f"iteration {i}": self.values(i) for i in self.job.measured},
            "sampled": {f"iteration {i}": self.values(i, 1.0) for i in self.job.sampled},
            "metrics": {
                f"iteration {i}": self.marker(i, "audit").get("metrics", {}) | self.marker(i, "gate").get("metrics", {})
                for i in range(1, self.job.iterations + 1)
            },
        }


def cells(values: Mapping[str, float], names: Iterable[str]) -> list[str]:
    return [metric_spec(name).format(values[name]) if name in values else "-" for name in names]


def _by_name(done: Iterable[Result], group: str) -> dict[str, dict[int, Result]]:
    """Return the runs of a group by name and seed."""
    found: dict[str, dict[int, Result]] = {}
    for result in done:
        if result.job.group == group:
            found.setdefault(result.job.name, {})[result.job.seed] = result
    return found


def _at(runs: Mapping[int, Result], iteration: int, temperature: float = 0.0) -> Runs:
    """Return what each run made of the scenes at an iteration, by seed."""
    return {seed: run.rows(iteration, temperature) for seed, run in runs.items()}


def _main(done: Sequence[Result], to: Path) -> str:
    runs = {result.job.seed: result for result in done if result.job.group == "main"}
    if not runs:
        return ""
    scenes = next(iter(runs.values())).job.scenes
    return _headline(runs, "The default preset", f"{scenes} test scenes. {_plot_main(list(runs.values()), to)}")


def _prose(done: Sequence[Result]) -> str:
    parts = []
    for name, runs in _by_name(done, "prose").items():
        job = next(iter(runs.values())).job
        caption = f"{job.prompts} pictures, {job.scenes} test scenes, the default preset"
        caption += f" with `{job.overrides}`." if job.overrides else " unchanged."
        parts.append(_headline(runs, f"Captions in the manner of LLaVA: world {name}", f"{caption}\n"))
    return "\n".join(parts)


def _headline(runs: Mapping[int, Result], title: str, caption: str) -> str:
    """Format the runs of one configuration: the base model against iteration 3, and every iteration of each run."""
    job = next(iter(runs.values())).job
    parts = [f"## {title}\n\n{caption}"]
    for temperature, decoding in ((0.0, "Greedy decoding"), (1.0, "Sampling at temperature 1")):
        if temperature and not job.sampled:
            continue
        seeds = seeds_cell(len(runs), seeds_needed(job.group))
        rows = _main_rows(_at(runs, 0, temperature), _at(runs, 3, temperature), seeds)
        head = ["metric", "seeds", "base", "iteration 3, mean", "over scenes", "over runs"]
        head += ["paired difference", "over scenes", "over runs", "p over scenes (Holm)", "established"]
        parts.append(f"{decoding}, base vs. iteration 3, paired by seed:\n\n{table(head, rows)}")
    each = [
        [f"{seed} alone", str(i), *cells(run.values(i), COLUMNS), run.marker(i, "gate").get("verdict", "")]
        for seed, run in runs.items()
        for i in run.job.measured
    ]
    parts.append("Each run, greedy decoding:\n\n" + table(["seed", "iteration", *COLUMNS.values(), "gate"], each))
    return "\n".join(parts)


def _main_rows(before: Runs, after: Runs, seeds: str) -> list[list[str]]:
    """Format one row per metric: levels, difference, both intervals, and whether the difference is established."""
    found = {name: (*levels(after, name), *difference(before, after, name)) for name in COLUMNS}
    adjusted = holm([1.0 if scenes.p is None else scenes.p for *_, scenes, _ in found.values()])
    return [
        [
            COLUMNS[name],
            seeds,
            "-" if change.before is None else f"{change.before:.3f}",
            "-" if over.value is None else f"{over.value:.3f}",
            interval(scenes),
            interval(over),
            "-" if change.value is None else f"{change.value:+.3f}",
            interval(change, "{:+.3f}"),
            interval(change_over, "{:+.3f}"),
            "< 0.001" if p < 0.001 else f"{p:.3f}",
            "yes" if established(change, change_over) else "no",
        ]
        for (name, (scenes, over, change, change_over)), p in zip(found.items(), adjusted, strict=True)
    ]


def _plot_main(runs: Sequence[Result], to: Path) -> str:
    names, measured = ("chair_s", "recall", "companion_recall"), runs[0].job.measured
    by_seed = {run.job.seed: run for run in runs}
    lines = [
        Line("one seed" if index == 0 else "", [(i, _values(run.values(i))) for i in measured], faint=True)
        for index, run in enumerate(runs)
    ]
    over_seeds = [(i, {name: _over_seeds(*levels(_at(by_seed, i), name)) for name in names}) for i in measured]
    base = {name: levels(_at(by_seed, 0), name)[0] for name in names}
    draw(to / "main.png", names, [*lines, Line("mean", over_seeds)], "iteration", base=base, x_ticks=measured)
    bars = f"over {len(runs)} seeds" if len(runs) > 1 else "over scenes, since there is one seed"
    return f"Bars: 95 % intervals {bars}.\n\n![CHAIR_S and recall by iteration](main.png)\n"


def _over_seeds(scenes: Metric, runs: Metric) -> Metric:
    """Return the interval over runs, or over scenes if there is one run."""
    return scenes if runs.low is None else runs


def _values(values: Mapping[str, float]) -> dict[str, Metric]:
    return {name: Metric(value, None, None, 0) for name, value in values.items()}


def _comparisons(done: Sequence[Result]) -> str:
    others, main = _by_name(done, "comparisons"), _by_name(done, "main").get("calibrated")
    if not others or not main:
        return ""
    reference, world, needed = _at(main, 3), world_named("harbour"), seeds_needed("comparisons")
    cut = {seed: _truncate_to_length(run, world) for seed, run in main.items()}
    base = next(iter(_at(main, 0).values()))
    rows = [
        ["base model", "-", *(base_cell(base, name) for name in SHORT), ""],
        [
            "base, truncated to the same number of sentences",
            seeds_cell(len(cut), needed),
            *(cell(cut, name, reference) for name in SHORT),
            "",
        ],
        ["calibrated", seeds_cell(len(main), needed), *(cell(reference, name) for name in SHORT), _seconds(main)],
    ]
    rows += [_final_row(name, runs, reference) for name, runs in others.items()]
    text = (
        "## Comparison with other methods\n\n1,000 test scenes, greedy decoding, after iteration 3, with the "
        "same number of prompts. `paper` and `official` have their own learning rate of 1e-7, and ours. "
        f"{LEGEND.format(reference='calibrated')}\n\n"
    )
    return text + table(["", "seeds", *(COLUMNS[name] for name in SHORT), "search and training"], rows)


def _final_row(name: str, runs: Mapping[int, Result], reference: Runs) -> list[str]:
    """Format a row of some runs after iteration 3."""
    job = next(iter(runs.values())).job
    last = _at(runs, 3)
    seeds = seeds_cell(len(runs), seeds_needed(job.group))
    return [name, seeds, *(cell(last, metric, reference) for metric in SHORT), _seconds(runs)]


def _seconds(runs: Mapping[int, Result]) -> str:
    """Format the mean time of search and training until iteration 3."""
    return f"{fmean(sum(run.info['seconds'][:4]) for run in runs.values()):.0f} s"


def _truncate_to_length(run: Result, world: World) -> SceneTallies:
    """Truncate each response of the base model to the number of sentences in the aligned policy's response."""
    aligned, short = run.texts(3), {}
    for scene_id, text in run.texts(0).items():
        sentences = [part.strip() + "." for part in text.split(".") if part.strip()]
        kept = sentences[: sum(bool(part.strip()) for part in aligned[scene_id].split("."))]
        short[scene_id] = " ".join(kept)
    scenes = [parse_scene_id(world, scene_id) for scene_id in short]
    scorer = load_scorer(scorer_config(path=str(assets() / "clip")), "cpu")
    with tempfile.TemporaryDirectory() as directory:
        relevance = sentence_relevance(scorer, write_images(scenes, Path(directory)), list(short.values()))
    return {
        scene.scene_id: tallies(world, Described(scene, text, True, judge(world, scene, text), scores), {})
        for scene, text, scores in zip(scenes, short.values(), relevance, strict=True)
    }


def _final_table(done: Sequence[Result], group: str, title: str) -> str:
    """Format a table of a group's runs after the last iteration, the default preset first."""
    others = _by_name(done, group)
    reference = others.pop("calibrated", None)
    if not others or reference is None:
        return ""
    rows, job = [], next(iter(reference.values())).job
    if 0 in job.measured:
        base = next(iter(_at(reference, 0).values()))
        rows.append(["base model", "", "", *(base_cell(base, metric) for metric in SHORT), ""])
    for name, runs in {"calibrated": reference, **others}.items():
        overrides = next(iter(runs.values())).job.overrides
        first, *rest = _final_row(name, runs, {} if name == "calibrated" else _at(reference, 3))
        rows.append([first, f"`{overrides}`" if overrides else "", *rest])
    caption = (
        f"World {job.world}, {job.prompts} images, {job.scenes} {job.split} scenes, after iteration 3. "
        f"{LEGEND.format(reference='calibrated')}"
    )
    head = ["", "changed", "seeds", *(COLUMNS[name] for name in SHORT), "time"]
    return f"## {title}\n\n{caption}\n\n" + table(head, rows)


def _iteration_table(done: Sequence[Result], group: str, title: str, caption: str) -> str:
    """Format a table of every measured iteration of a group's runs, means over seeds."""
    rows = []
    for name, runs in _by_name(done, group).items():
        base, seeds = _at(runs, 0), seeds_cell(len(runs), seeds_needed(group))
        for iteration in next(iter(runs.values())).job.measured:
            if iteration:
                shown = [cell(_at(runs, iteration), metric, base) for metric in COLUMNS]
            else:
                shown = [base_cell(next(iter(base.values())), metric) for metric in COLUMNS]
            rows.append([name, seeds if iteration else "base model", str(iteration), *shown])
    if not rows:
        return ""
    return f"## {title}\n\n{caption}\n\n" + table(["", "seeds", "iteration", *COLUMNS.values()], rows)


def _audits(done: Sequence[Result]) -> str:
    runs = [r for r in done if r.job.group in ("main", "comparisons", "ablations")]
    if not runs:
        return ""
    rows = []
    for run in runs:
        after = run.values(3)
        verdicts = [
            "/".join(run.marker(i, stage).get("verdict", "-") for stage in ("audit", "gate"))
            for i in range(1, min(run.job.iterations, 3) + 1)
        ]
        metrics = run.marker(1, "audit").get("metrics", {})
        shown = [
            f"{metrics.get(name, float('nan')):.2f}"
            for name in ("relevance_win", "omission_gap", "repeat_gap", "length_correlation")
        ]
        rows.append(
            [
                f"{run.job.name}, {run.job.group}, seed {run.job.seed} alone",
                *shown,
                *verdicts,
                *cells(after, ("chair_s", "recall", "repeats")),
            ]
        )
    head = ["run", "relevance win", "omission gap", "repeat gap", "length correlation", "1: pairs/policy", "2", "3"]
    text = (
        "## Do label-free quality checks separate good runs from bad ones?\n\nMetrics of iteration 1's pairs, the "
        "decisions of the checks before and after each training, and the final metrics.\n\n"
    )
    return text + table([*head, "CHAIR_S", "recall", "repeats"], rows)


def _lambdas(out: Path, to: Path) -> str:
    path = out / "lambda.json"
    if not path.exists():
        return ""
    points = json.loads(path.read_text())["points"]
    rows = [
        [
            point["overrides"][0].partition("=")[2],
            *cells({n: m["value"] for n, m in point["metrics"]["world"].items()}, SHORT),
            ALONE,
        ]
        for point in points
    ]
    curve = [
        (float(row[0]), {name: Metric(**point["metrics"]["world"][name]) for name in _CURVES})
        for row, point in zip(rows, points, strict=True)
    ]
    draw(to / "lambda.png", _CURVES, [Line("iteration 1", curve)], "lambda")
    text = (
        "## Lambda, from one ledger\n\n`csr sweep`: pairs and training of iteration 1 for each value; 500 "
        "development scenes.\n\n![CHAIR_S and recall against lambda](lambda.png)\n\n"
    )
    return text + table(["lambda", *(COLUMNS[n] for n in SHORT), "seeds"], rows)


def _scorers(out: Path, to: Path) -> str:
    path = out / "scorers.json"
    if not path.exists():
        return ""
    results = json.loads(path.read_text())
    rows = [
        [
            str(row["steps"]),
            f"{row['auc_absent']:.3f}",
            f"{row['auc_attribute']:.3f}",
            f"{row['agreement']:.3f}",
            row["lambda"],
            *cells(row["metrics"], SHORT),
            ALONE,
        ]
        for row in results
    ]
    curves: dict[str, list[tuple[float, Mapping[str, Metric]]]] = {}
    for row in results:
        curves.setdefault(f"lambda {row['lambda']}", []).append((row["auc_absent"], _values(row["metrics"])))
    lines = [Line(name, points) for name, points in curves.items()]
    draw(to / "scorers.png", _CURVES, lines, "AUC of the scorer, absent objects")
    text = (
        "## Sensitivity to scorer quality\n\nScorers trained for fewer steps; one iteration from one ledger, "
        "descriptions only, 500 development scenes. Agreement is a label-free estimate (`csr audit`): the share of "
        "sentences that score higher with their own image than with others.\n\n"
        "![CHAIR_S and recall by scorer](scorers.png)\n\n"
    )
    head = ["training steps", "AUC, absent", "AUC, color", "agreement", "lambda"]
    return text + table([*head, *(COLUMNS[n] for n in SHORT), "seeds"], rows)


def _priors(out: Path, to: Path) -> str:
    path = out / "priors.json"
    if not path.exists():
        return ""
    results = json.loads(path.read_text())
    rows = [[f"{row['strength']:g}", row["lambda"], *cells(row["metrics"], SHORT), ALONE] for row in results]
    curves: dict[str, list[tuple[float, Mapping[str, Metric]]]] = {}
    for row in results:
        name = "base model" if row["lambda"] == "base" else f"lambda {row['lambda']}"
        curves.setdefault(name, []).append((row["strength"], _values(row["metrics"])))
    draw(to / "priors.png", _CURVES, [Line(name, points) for name, points in curves.items()], "strength of the prior")
    text = (
        "## Sensitivity to prior strength\n\nBase models with a weaker or stronger co-occurrence prior than the "
        "shipped one (factors on its probabilities); one iteration each, descriptions only, 500 development scenes."
        "\n\n![CHAIR_S and recall by strength of the prior](priors.png)\n\n"
    )
    return text + table(["strength", "lambda", *(COLUMNS[n] for n in SHORT), "seeds"], rows)
