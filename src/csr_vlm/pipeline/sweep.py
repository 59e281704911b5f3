"""One ledger, many settings: pairs are derived and the policy trained anew for each.

What a setting changes after generation (lambda, the reward, the pair rule, training) is
compared on the very same candidates, at the cost of one training run each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from csr_vlm.config.load import load_config
from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter
from csr_vlm.pipeline import stages
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run, differences

_FIXED = ("seed", "iterations", "model", "data", "generation", "method.search")
"""What made the ledger; a point of a sweep cannot change it."""
_OF_SCORES = ("scorer.path", "scorer.revision", "scorer.vision", "scorer.long_sentences", "scorer.others")
"""What made a column of it; a point cannot change it either, but may name another column."""


def points(axes: Sequence[str]) -> Iterator[list[str]]:
    """Yield the overrides of every point: the product of ``key=value,value,...`` axes.

    Example:
        >>> list(points(["method.lambda=0,1", "training.trl.beta=0.1"]))
        [['method.lambda=0', 'training.trl.beta=0.1'], ['method.lambda=1', 'training.trl.beta=0.1']]

    Raises:
        CsrError: An axis has no key or no value.
    """
    parsed = []
    for axis in axes:
        key, separator, values = axis.partition("=")
        if not separator or not key or not values:
            raise CsrError(f"{axis!r} is no axis", "write key=value,value, such as method.lambda=0,0.5,1")
        parsed.append([f"{key}={value}" for value in values.split(",")])
    return (list(point) for point in itertools.product(*parsed))


def sweep(run: Run, axes: Sequence[str], iteration: int, out: Path, reporter: Reporter) -> list[dict[str, Any]]:
    """Train and measure every point on an iteration's ledger; points that are there already are kept.

    Args:
        run: Where the ledger is.
        axes: ``key=value,value,...`` each.
        iteration: Whose ledger; training starts from the iteration before.
        out: Gets a directory a point.

    Returns:
        For each point its ``overrides``, the ``iteration``, what the ``pairs`` are like, and the ``metrics``.

    Raises:
        CsrError: A point changes what made the ledger, or leaves no pairs.
    """
    rows = []
    for overrides in points(axes):
        config = load_config(None, overrides, base=run.config.dump())
        changed = list(differences(run.config.dump(), config.dump()))
        fixed = [key for key in changed if key.startswith(_FIXED)]
        if fixed:
            raise CsrError(f"{fixed[0]} made the ledger and cannot be swept", "start a run for each value instead")
        scored = [key for key in changed if key in _OF_SCORES]
        if scored and config.scorer.used == run.config.scorer.used:
            raise CsrError(
                f"{scored[0]} made the ledger's column {config.scorer.used!r} and cannot be swept",
                "csr score RUN --scorer PATH --name NAME adds a column; then sweep scorer.use",
            )
        root = out / files.digest({"overrides": overrides, "iteration": iteration})
        if not (root / "result.json").exists():
            result = _point(run, config, iteration, root, " ".join(overrides), reporter)
            files.write_json(root / "result.json", {"overrides": overrides, "iteration": iteration, **result})
        rows.append(files.read_json(root / "result.json"))
    return rows


def _point(run: Run, config: RunConfig, iteration: int, root: Path, title: str, reporter: Reporter) -> dict[str, Any]:
    from csr_vlm.training.callback import count_steps
    from csr_vlm.training.dpo import train

    pairs, reasons = stages.derive_pairs(run, iteration, config, reporter)
    if not pairs:
        raise CsrError(f"these settings leave no pairs: {dict(reasons)}", "loosen method.pairs")
    tables.write_pairs(root / "pairs.parquet", pairs)
    with reporter.stage(f"{title}: training", 0) as progress:
        train(
            pairs + stages.ask(run, iteration, config, reporter),
            config.model,
            config.training,
            previous=run.adapter_path(iteration - 1),
            adapter=root / "adapter",
            work=root / "trainer",
            seed=config.seed * 1000 + iteration,
            callbacks=[count_steps(progress)],
        )
    found = stages.measure(config, root / "adapter", run.heldout(), title, reporter)
    return {
        "pairs": {"pairs": len(pairs), **stages.summarise_pairs(pairs)},
        "metrics": {name: document["metrics"] for name, document in found.items()},
    }
