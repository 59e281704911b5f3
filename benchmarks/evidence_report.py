"""Write the tables and plots of ``docs/evidence`` from the results of ``evidence.py``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from csr_vlm.config.load import scorer_config
from csr_vlm.evaluation.metrics import metric_spec
from csr_vlm.evaluation.statistics import Tally, holm, paired_difference, pooled
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
SHORT = ("chair_s", "chair_i", "recall", "companion_recall", "repeats", "words", "relevance")
SceneTallies = Mapping[str, Mapping[str, Tally]]
"""Scene id to its tallies, by metric."""


def write(jobs: Sequence[Any], out: Path, to: Path) -> None:
    """Write all tables and plots whose jobs have results, and all metrics as ``results.json``."""
    to.mkdir(parents=True, exist_ok=True)
    done = [Result(job, out) for job in jobs]
    done = [result for result in done if result.finished]
    parts = [
        _main(done, to),
        _comparisons(done, out),
        _final_table(
            done,
            "ablations",
            "Ablations of the calibrated preset",
            "500 development scenes, seed 0, after iteration 3.",
        ),
        _final_table(done, "settings", "Other settings", "500 development scenes, seed 0, after iteration 3."),
        _lambdas(out, to),
        _iteration_table(
            done,
            "questions",
            "Without claim questions",
            "The default preset trained on descriptions only; 1,000 test scenes, greedy decoding.",
        ),
        _iteration_table(
            done,
            "generality",
            "Other base models and another world",
            "The default preset, unchanged; 1,000 test scenes, greedy decoding.",
        ),
        _audits(done),
        _scorers(out, to),
        _priors(out, to),
    ]
    commits = sorted({result.info["commit"] for result in done})
    head = (
        "# Evidence\n\nWritten by `benchmarks/evidence.py` (commits " + ", ".join(commits) + "). Every run used one "
        "thread; times are for search and training together. CHAIR and recall are computed against the known contents "
        "of drawn scenes; intervals are 95 % over scenes.\n"
    )
    (to / "README.md").write_text("\n".join([head, *filter(None, parts)]), encoding="utf-8")
    numbers = {f"{r.job.group}/{r.job.name}/{r.job.seed}": r.numbers() for r in done}
    (to / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


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


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def cells(values: Mapping[str, float], names: Iterable[str]) -> list[str]:
    return [metric_spec(name).format(values[name]) for name in names]


def _summed(runs: Sequence[SceneTallies]) -> dict[str, list[Tally]]:
    """Sum each scene's tallies over runs; return them by metric, in the order of the scenes."""
    names = {name for rows in runs for row in rows.values() for name in row}
    return {
        name: [
            (sum(rows[scene][name][0] for rows in runs), sum(rows[scene][name][1] for rows in runs))
            for scene in runs[0]
            if name in runs[0][scene]
        ]
        for name in names
    }


def _main(done: Sequence[Result], to: Path) -> str:
    runs = [result for result in done if result.job.group == "main"]
    if not runs:
        return ""
    parts = [
        f"## The default preset, {len(runs)} seeds of the complete run\n\n1,000 test scenes. {_plot_main(runs, to)}\n"
    ]
    for temperature, decoding in ((0.0, "Greedy decoding"), (1.0, "Sampling at temperature 1")):
        base, last = ([run.rows(i, temperature) for run in runs] for i in (0, 3))
        before, after = _summed(base), _summed(last)
        differences = {name: paired_difference(before[name], after[name]) for name in COLUMNS}
        adjusted = holm([difference.p or 1.0 for difference in differences.values()])
        spread = {name: [run.values(3, temperature)[name] for run in runs] for name in COLUMNS}
        rows = [
            [
                COLUMNS[name],
                f"{d.before:.3f}",
                f"{d.after:.3f}",
                f"{min(spread[name]):.3f} to {max(spread[name]):.3f}",
                f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})",
                "< 0.001" if p < 0.001 else f"{p:.3f}",
            ]
            for (name, d), p in zip(differences.items(), adjusted, strict=True)
        ]
        head = ["metric", "base", "iteration 3, mean", "seeds", "paired difference", "p (Holm)"]
        parts.append(f"{decoding}, base vs. iteration 3:\n\n{table(head, rows)}")
    each = [
        [str(run.job.seed), str(i), *cells(run.values(i), COLUMNS), run.marker(i, "gate").get("verdict", "")]
        for run in runs
        for i in run.job.measured
    ]
    parts.append(
        "Each run, greedy decoding, five iterations:\n\n"
        + table(["seed", "iteration", *COLUMNS.values(), "gate"], each)
    )
    return "\n".join(parts)


def _plot_main(runs: Sequence[Result], to: Path) -> str:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axis, name in zip(axes, ("chair_s", "recall", "companion_recall"), strict=True):
        for run in runs:
            axis.plot(run.job.measured, [run.values(i)[name] for i in run.job.measured], alpha=0.6, marker=".")
        axis.set_title(COLUMNS[name])
        axis.set_xlabel("iteration")
        axis.set_xticks(runs[0].job.measured)
        if name != "chair_s":
            axis.set_ylim(0.9, 1.0)
    figure.savefig(to / "main.png", dpi=110)
    plt.close(figure)
    return "One line per seed:\n\n![CHAIR_S falls while recall is kept](main.png)\n"


def _comparisons(done: Sequence[Result], out: Path) -> str:
    runs = [result for result in done if result.job.group == "comparisons"]
    main = next((r for r in done if r.job.group == "main" and r.job.seed == 0), None)
    if not runs or main is None:
        return ""
    rows = [["base model", *cells(main.values(0), SHORT), ""]]
    cut = pooled(list(_truncate_to_length(main, world_named("harbour")).values()))
    rows.append(
        [
            "base, truncated to the same number of sentences",
            *cells({n: m.value or 0 for n, m in cut.items()}, SHORT),
            "",
        ]
    )
    rows += [[r.job.name, *cells(r.values(3), SHORT), f"{sum(r.info['seconds'][:4]):.0f} s"] for r in [main, *runs]]
    text = (
        "## Comparison with other methods\n\n1,000 test scenes, greedy decoding, seed 0, after iteration 3, with the "
        "same number of prompts. `paper` and `official` have their own learning rate of 1e-7, and ours.\n\n"
    )
    return text + table(["", *(COLUMNS[name] for name in SHORT), "search and training"], rows)


def _truncate_to_length(run: Result, world: World) -> dict[str, dict[str, Tally]]:
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


def _final_table(done: Sequence[Result], group: str, title: str, caption: str) -> str:
    """Format a table of a group's runs after the last iteration, the default preset first."""
    runs = [r for r in done if r.job.group == group or (r.job.group, r.job.name) == ("ablations", "calibrated")]
    if len(runs) < 2:
        return ""
    rows = [
        [
            r.job.name,
            f"`{r.job.overrides}`" if r.job.overrides else "",
            *cells(r.values(3), SHORT),
            f"{sum(r.info['seconds']):.0f} s",
        ]
        for r in runs
    ]
    return f"## {title}\n\n{caption}\n\n" + table(["", "changed", *(COLUMNS[n] for n in SHORT), "time"], rows)


def _iteration_table(done: Sequence[Result], group: str, title: str, caption: str) -> str:
    """Format a table of every measured iteration of a group's runs."""
    runs = [result for result in done if result.job.group == group]
    if not runs:
        return ""
    rows = [[r.job.name, str(r.job.seed), str(i), *cells(r.values(i), COLUMNS)] for r in runs for i in r.job.measured]
    return f"## {title}\n\n{caption}\n\n" + table(["", "seed", "iteration", *COLUMNS.values()], rows)


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
                f"{run.job.name}, {run.job.group}, {run.job.seed}",
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
        ]
        for point in points
    ]
    figure = _curves(
        {"": [(float(row[0]), point["metrics"]["world"]) for row, point in zip(rows, points, strict=True)]}, "lambda"
    )
    figure.savefig(to / "lambda.png", dpi=110)
    text = (
        "## Lambda, from one ledger\n\n`csr sweep`: pairs and training of iteration 1 for each value; 500 "
        "development scenes.\n\n![CHAIR_S and recall against lambda](lambda.png)\n\n"
    )
    return text + table(["lambda", *(COLUMNS[n] for n in SHORT)], rows)


def _curves(curves: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], x_label: str) -> Any:
    """Plot CHAIR_S and recall, one line per name."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, name in zip(axes, ("chair_s", "recall"), strict=True):
        for label, points in curves.items():
            ordered = sorted(points, key=lambda point: point[0])
            axis.plot([x for x, _ in ordered], [m[name]["value"] for _, m in ordered], marker=".", label=label)
        axis.set_title(COLUMNS[name])
        axis.set_xlabel(x_label)
    if any(curves):
        axes[0].legend()
    plt.close(figure)
    return figure


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
        ]
        for row in results
    ]
    curves: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for row in results:
        metrics = {name: {"value": value} for name, value in row["metrics"].items()}
        curves.setdefault(f"lambda {row['lambda']}", []).append((row["auc_absent"], metrics))
    _curves(curves, "AUC of the scorer, absent objects").savefig(to / "scorers.png", dpi=110)
    text = (
        "## Sensitivity to scorer quality\n\nScorers trained for fewer steps; one iteration from one ledger, "
        "descriptions only, 500 development scenes. Agreement is a label-free estimate (`csr audit`): the share of "
        "sentences that score higher with their own image than with others.\n\n"
        "![CHAIR_S and recall by scorer](scorers.png)\n\n"
    )
    return text + table(
        ["training steps", "AUC, absent", "AUC, color", "agreement", "lambda", *(COLUMNS[n] for n in SHORT)], rows
    )


def _priors(out: Path, to: Path) -> str:
    path = out / "priors.json"
    if not path.exists():
        return ""
    results = json.loads(path.read_text())
    rows = [[f"{row['strength']:g}", row["lambda"], *cells(row["metrics"], SHORT)] for row in results]
    curves: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for row in results:
        metrics = {name: {"value": value} for name, value in row["metrics"].items()}
        name = row["lambda"] if row["lambda"] == "base" else f"lambda {row['lambda']}"
        curves.setdefault(name, []).append((row["strength"], metrics))
    _curves(curves, "strength of the prior").savefig(to / "priors.png", dpi=110)
    text = (
        "## Sensitivity to prior strength\n\nBase models with a weaker or stronger co-occurrence prior than the "
        "shipped one (factors on its probabilities); one iteration each, descriptions only, 500 development scenes."
        "\n\n![CHAIR_S and recall by strength of the prior](priors.png)\n\n"
    )
    return text + table(["strength", "lambda", *(COLUMNS[n] for n in SHORT)], rows)
