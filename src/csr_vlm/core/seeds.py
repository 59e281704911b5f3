"""Keep development seeds and test seeds apart."""

from __future__ import annotations

EVALUATION_SEEDS = {"test": range(10_000), "development": range(10_000, 20_000)}
"""Seeds of evaluation scenes, by split. Settings are chosen on development seeds; test seeds only report."""


def seed_problem(split: str, seed: int) -> str | None:
    """Return why a seed is not one of the split's; None if it is.

    Example:
        >>> seed_problem("test", 7)
        >>> seed_problem("development", 7)
        '7 is not a development seed; expected 10000 to 19999'
    """
    seeds = EVALUATION_SEEDS[split]
    if seed in seeds:
        return None
    return f"{seed} is not a {split} seed; expected {seeds[0]} to {seeds[-1]}"
