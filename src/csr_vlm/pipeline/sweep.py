"""Train on one ledger under many settings.

Settings that act after generation (lambda, reward, pair rule, training) are compared on the same
candidates, at the cost of one training each.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from csr_vlm.config.load import load_config
from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import counts
from csr_vlm.core.progress import Reporter
from csr_vlm.pipeline import stages
from csr_vlm.pipeline.policy_evaluation import evaluate_policy
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run, differences

_LEDGER_KEYS = ("seed", "iterations", "model", "data", "generation", "method.search")
"""Settings that determine the ledger; a sweep cannot change them."""
_SCORER_KEYS = ("scorer.path", "scorer.revision", "scorer.vision", "scorer.long_sentences", "scorer.others")
"""Settings that determine a column of the ledger; a sweep can only select another column."""


def points(axes: Sequence[str]) -> Iterator[list[str]]:
    """Yield the overrides of every point in the grid of ``key=value,value,...`` axes.

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
            raise CsrError(
                f"{axis!r} is not a valid sweep axis", "write key=value,value, such as method.lambda=0,0.5,1"
            )
        parsed.append([f"{key}={value}" for value in values.split(",")])
    return (list(point) for point in itertools.product(*parsed))


def sweep(run: Run, axes: Sequence[str], iteration: int, out: Path, reporter: Reporter) -> list[dict[str, Any]]:
    """Train and evaluate every point of a grid on an iteration's ledger; finished points are kept.

    Args:
        run: Run with the ledger.
        axes: Axes of the grid, each ``key=value,value,...``.
        iteration: Iteration of the ledger; training starts from the policy that generated it.
        out: Folder for the results, one directory per point.
        reporter: Receives progress.

    Returns:
        For each point its ``overrides``, the ``iteration``, a summary of its ``pairs``, and its ``metrics``.

    Raises:
        CsrError: A point changes a setting that determines the ledger, or yields no pairs.
    """
    rows = []
    for overrides in points(axes):
        config = load_config(None, overrides, base=run.config.dump())
        key = changed_ledger_key(run.config, config)
        if key in _SCORER_KEYS:
            raise CsrError(
                f"{key} determines the ledger's column {config.scorer.used!r} and cannot be swept",
                "csr score RUN --scorer PATH --name NAME adds a column; then sweep scorer.use",
            )
        if key is not None:
            raise CsrError(f"{key} determines the ledger and cannot be swept", "start a run for each value instead")
        root = out / files.digest({"overrides": overrides, "iteration": iteration})
        rows.append(train_on_ledger(run, config, overrides, iteration, root, reporter))
    return rows


def changed_ledger_key(config: RunConfig, changed: RunConfig) -> str | None:
    """Return a setting that determines the ledger, or its column in use, and differs; None if none does."""
    keys = list(differences(config.dump(), changed.dump()))
    ledger_keys = [key for key in keys if key.startswith(_LEDGER_KEYS)]
    scorer_keys = [key for key in keys if key in _SCORER_KEYS and changed.scorer.used == config.scorer.used]
    return next(iter((*ledger_keys, *scorer_keys)), None)


def train_on_ledger(
    run: Run, config: RunConfig, overrides: Sequence[str], iteration: int, root: Path, reporter: Reporter
) -> dict[str, Any]:
    """Train and evaluate one configuration on an iteration's ledger, unless its result is there.

    Args:
        run: Run with the ledger.
        overrides: What the configuration changes, for the result.
        root: Directory of the result.

    Raises:
        CsrError: The configuration yields no pairs.
    """
    if not (root / "result.json").exists():
        result = _train_point(run, config, iteration, root, " ".join(overrides), reporter)
        files.write_json(root / "result.json", {"overrides": list(overrides), "iteration": iteration, **result})
    found: dict[str, Any] = files.read_json(root / "result.json")
    return found


def _train_point(
    run: Run, config: RunConfig, iteration: int, root: Path, title: str, reporter: Reporter
) -> dict[str, Any]:
    from csr_vlm.training.callback import count_steps
    from csr_vlm.training.dpo import train

    pairs, reasons = stages.derive_pairs(run, iteration, config, reporter)
    if not pairs:
        raise CsrError(f"these settings yield no pairs: {counts(reasons)}", "loosen method.pairs")
    questions = stages.question_pairs(run, iteration, config, reporter)
    paths = [root / "pairs.parquet", root / "questions.parquet"]
    for path, content in zip(paths, (pairs, questions), strict=True):
        tables.write_pairs(path, content)
    with reporter.stage(f"{title}: training", 0) as progress:
        train(
            paths,
            config.model,
            config.training,
            previous=run.adapter_path(iteration - 1),
            adapter=root / "adapter",
            work=root / "trainer",
            seed=config.seed * 1000 + iteration,
            callbacks=[count_steps(progress)],
            max_image_pixels=config.data.max_image_pixels,
        )
    shutil.rmtree(root / "trainer", ignore_errors=True)
    documents = evaluate_policy(config, root / "adapter", run.heldout(), title, reporter)
    return {
        "pairs": {"pairs": len(pairs), **stages.summarize_pairs(pairs)},
        "metrics": {name: document["metrics"] for name, document in documents.items()},
    }
