"""Compare the claims of a tree with other images and other cues: the signs of the audit by claim.

Each sign is a fraction whose null, 0.5, is what a scorer gives that sees nothing of the image. Only a
second scorer is independent of the pairs: the other signs share with their rewards the cosine with the
image, or the number of samples that make a claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from csr_vlm.config.schema import MethodConfig
from csr_vlm.core.records import Node, Pair, Response, nearest_column, negatives_column
from csr_vlm.method.claim_evidence import Evidence
from csr_vlm.method.reward import sentence_rewards


@dataclass(frozen=True)
class ClaimSigns:
    """Hold (successes, cases) of the signs that are computed from the claims of one tree; ties count 1/2."""

    others: tuple[float, int]
    """Things whose cosine exceeds the mean over negative images."""
    nearest: tuple[float, int]
    """Things whose cosine exceeds the mean over the most similar images."""
    cues: tuple[float, int]
    """Pairs of things of which the more frequent one has the higher evidence by the scorer."""
    second: tuple[float, int]
    """Pairs of sides of which the second scorer prefers the chosen one."""
    values: tuple[tuple[float, float], ...] = ()
    """For each thing the scorers' mean z, and the logarithm of how often it is made, relative to the average."""


def claim_signs(nodes: Sequence[Node], pairs: Sequence[Pair], method: MethodConfig, scorer: str) -> ClaimSigns:
    """Compute the signs of one tree; those about pairs only where a second scorer scored the claims.

    Raises:
        CsrError: A cosine is missing or not finite.
    """
    evidence = Evidence.of(nodes, method.reward, scorer)
    names = scorer.split("+")
    things = {thing: evidence.scores[thing] for thing in evidence.mentions}
    frequent = fmean(evidence.mentions.values()) if things else 0.0

    def above(column: Callable[[str], str], least: float = 0.0) -> tuple[float, int]:
        gaps = {
            thing: sum(row[name] - row[column(name)] for name in names)
            for thing, row in things.items()
            if evidence.mentions[thing] >= least and all(column(name) in row for name in names)
        }
        return _successes(gap for thing, gap in gaps.items() for _ in range(evidence.mentions[thing]))

    often = evidence.log_frequencies
    compared = [
        (often[a] - often[b]) * (evidence.weigh(things[a]) - evidence.weigh(things[b]))
        for a, b in combinations(sorted(things), 2)
        if often[a] != often[b]
    ]
    columns = {column for row in things.values() for column in row if ":" not in column}
    second = sorted(columns - set(names))
    gaps: list[float] = []
    if second and pairs:
        judged = sentence_rewards(nodes, method, second[0])

        def value(response: Response) -> float:
            return judged[response.node_id].image if response.node_id in judged else 0.0

        gaps = [value(pair.chosen) - value(pair.rejected) for pair in pairs]
    values = tuple(
        (fmean(evidence.significance(row, name) for name in names), often[thing])
        for thing, row in sorted(things.items())
    )
    return ClaimSigns(
        above(negatives_column), above(nearest_column, frequent), _successes(compared), _successes(gaps), values
    )


def _successes(gaps: Iterable[float]) -> tuple[float, int]:
    """Return the number of positive gaps, ties counting 1/2, and the number of all."""
    values = list(gaps)
    return sum((gap > 0) + (gap == 0) / 2 for gap in values), len(values)
