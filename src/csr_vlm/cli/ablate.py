"""Implement ``csr ablate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import Overrides, Target, default_out, read_settings
from csr_vlm.cli.check import runs_beside
from csr_vlm.cli.signals import stoppable
from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import duration

if TYPE_CHECKING:
    from csr_vlm.pipeline.ablation import Variant


def ablate(
    target: Target,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for the runs (default: runs/NAME-OF-RECIPE-ablation).")
    ] = None,
    lambdas: Annotated[
        str, typer.Option("--lambda", metavar="V,V", help="Further values of lambda; empty for none.")
    ] = "0.1,0.5,0.9",
    presets: Annotated[str, typer.Option("--presets", metavar="NAME,NAME", help="Presets to compare with.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the variants and what they cost; write nothing.")
    ] = False,
) -> None:
    """Repeat the paper's ablation on your model.

    Compares the base model, only R_T, only R_I, both, values of lambda, and presets. With iterations=1 and a search
    that the reward does not steer, one ledger serves them all; otherwise each has a run. Rerun to resume.

    Example: csr ablate recipes/llava-1.5-7b.yaml preset=official iterations=1 --dry-run
    """
    if Path(target).is_dir():
        raise CsrError(f"{target} is a run", f"start from a recipe, such as {target}/config.yaml")
    given = list(overrides or ())
    config = read_settings(target, given)
    values, names = _numbers(lambdas), [name.strip() for name in presets.split(",") if name.strip()]
    root = out or default_out(target).with_name(f"{default_out(target).name}-ablation")
    console.quiet_libraries()
    from csr_vlm.pipeline.ablation import ablate as run_ablation
    from csr_vlm.pipeline.ablation import variants
    from csr_vlm.pipeline.estimate import estimate

    offline = not Path(config.model.path).is_dir()
    costs = estimate(config, console.reporter(), out=root, offline=offline, runs=runs_beside(root))
    found = variants(lambda more: read_settings(target, [*given, *more]), values, names, costs)
    if dry_run:
        _print_variants(found, root)
        return
    console.log(f"{len(found)} variants, {_total(found)}; results go to {root}")
    with stoppable(console.reporter(), root) as reporter:
        rows = run_ablation(found, root, reporter)
    _print_rows(rows, root)
    failed = [row["name"] for row in rows if row["failed"]]
    if failed:
        raise CsrError(f"not trained: {', '.join(failed)}", f"{root / 'ablation.json'} has the reasons")


def _numbers(text: str) -> list[float]:
    """Parse values of lambda.

    Raises:
        CsrError: One is not between 0 and 1.
    """
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise CsrError(f"--lambda {text} has a value that is not between 0 and 1", "such as --lambda 0.1,0.5,0.9")
    return list(dict.fromkeys(values))


def _total(found: Sequence[Variant]) -> str:
    known = [variant.hours for variant in found if variant.hours is not None]
    return f"about {duration(3600 * sum(known))} in all" if len(known) == len(found) else "cost not known"


def _print_variants(found: Sequence[Variant], root: Path) -> None:
    if console.mode.json:
        console.print_json(
            {
                "out": str(root),
                "variants": [
                    {"name": one.name, "overrides": one.overrides, "own_run": one.own_run, "hours": one.hours}
                    for one in found
                ],
            }
        )
        return
    rows = [
        [
            one.name,
            " ".join(one.overrides) or "the recipe",
            "a run" if one.own_run or not one.overrides else "a training",
            "-" if one.hours is None else duration(3600 * one.hours),
            one.own_run or "",
        ]
        for one in found
    ]
    console.print_table(
        f"{root}: dry run, nothing is written", ["", "changes", "needs", "likely time", "because"], rows
    )
    print(f"\n{_total(found)}")


def _print_rows(rows: Sequence[dict[str, Any]], root: Path) -> None:
    if console.mode.json:
        console.print_json({"out": str(root), "variants": list(rows)})
        return
    for evaluation in dict.fromkeys(name for row in rows for name in row["metrics"]):
        names = list(dict.fromkeys(key for row in rows for key in row["metrics"].get(evaluation, ())))
        table = [
            [row["name"], *(console.metric_cell(key, row["metrics"].get(evaluation, {}).get(key)) for key in names)]
            for row in rows
        ]
        console.print_table(f"{evaluation}, with half of the 95 % intervals", ["", *names], table)
    console.log(f"{root / 'ablation.json'} has the intervals; next: csr reproduce {root}/*/ for the paper's tables")
