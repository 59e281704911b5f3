"""Weigh the evidence for each claim of a prompt's tree, in nats.

A sentence's cosine answers for everything in it, and a few words decide whether it is true. So
each claim is scored alone, as "a photo of a fork". Its contrast is compared with what the same
words get on images that are not about them:

    z(c) = (cos(image, c) - mean cos(negative images, c)) / sigma

sigma is the median over the tree's claims of the spread over negative images, below their median,
since some of them may show the claim too. Absent things have a z of about mean 0 and standard
deviation 1; the mean over the n distinct things that the
policy sees in the image is the effect of the scorer, as its posterior mean under a prior N(0, 1):

    delta = max(0, sum of z / (n + 1))

The evidence is the log-likelihood ratio of z under N(delta, 1), present, and N(0, 1), absent:

    e(c) = delta z(c) - delta^2 / 2 + kappa min(delta, 1) log(m(c) / mean m)

The last term is self-consistency: m(c) is the number of sampled sentences that make the claim, and
kappa is ``method.reward.consistency``. From the second iteration on, m(c) is 1/2 plus the number of
those of all iterations before: a false claim that the scorer believes becomes more frequent by
training, and the trained policy's own samples would confirm it. A scorer that sees nothing has delta
near 0, and gives no evidence for or against anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median

from csr_vlm.config.schema import RewardConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import EARLIER_COLUMN, Node, negatives_column, spread_column

_OF = "/"
"""Separates a thing from its color in the name of a claim."""


def claim_key(name: str, color: str = "") -> str:
    """Return the name of a claim in the ledger: the thing, or the thing and its color.

    Example:
        >>> claim_key("boat"), claim_key("boat", "red")
        ('boat', 'boat/red')
    """
    return f"{name}{_OF}{color}" if color else name


def thing_of(claim: str) -> str:
    """Return the thing that a claim is about, without its color."""
    return claim.partition(_OF)[0]


def words_of(claim: str) -> str:
    """Return a claim as one says it.

    Example:
        >>> words_of("boat/red")
        'red boat'
    """
    name, _, color = claim.partition(_OF)
    return f"{color} {name}".strip()


@dataclass(frozen=True)
class Evidence:
    """Hold what a scorer and the policy's other samples say about the claims of one prompt's tree."""

    scores: Mapping[str, Mapping[str, float]]
    """Claim to its cosines by ledger column."""
    mentions: Mapping[str, int]
    """Thing to the number of sampled sentences that mention it."""
    scorer: str
    """Scorer, or several as A+B, whose mean evidence counts."""
    config: RewardConfig
    earlier: Mapping[str, float] = field(default_factory=dict)
    """Thing to the number of sampled sentences of all iterations before that mention it; empty in the first."""

    @classmethod
    def of(cls, nodes: Sequence[Node], config: RewardConfig, scorer: str) -> Evidence:
        """Collect the claims of a tree, duplicates and filtered candidates included: they are samples as well."""
        scores = {claim: columns for node in nodes for claim, columns in node.claims.items()}
        mentions = Counter(thing for node in nodes for thing in {thing_of(claim) for claim in node.claims})
        earlier = {thing: scores[thing][EARLIER_COLUMN] for thing in mentions if EARLIER_COLUMN in scores[thing]}
        return cls(scores, mentions, scorer, config, earlier)

    @cached_property
    def effects(self) -> Mapping[str, float]:
        """Return delta of each scorer, at least 0; 0 without claims."""
        return {name: self._effect(name) for name in self.scorer.split("+")}

    @cached_property
    def nats(self) -> Mapping[str, float]:
        """Return the evidence for each thing that the tree claims, and for each thing with its color."""
        return {
            claim: self.weigh(columns) + self._consistency * self.log_frequencies[thing_of(claim)]
            for claim, columns in self.scores.items()
        }

    @cached_property
    def log_frequencies(self) -> Mapping[str, float]:
        """Return log(m / mean m) of each thing."""
        made = {thing: self.earlier.get(thing, 0) + 0.5 for thing in self.mentions} if self.earlier else self.mentions
        mean = fmean(made.values()) if made else 1.0
        return {thing: math.log(number / mean) for thing, number in made.items()}

    @property
    def zero_line(self) -> float | None:
        """Return the contrast at which the scorers have no evidence, delta sigma / 2; None if they see nothing."""
        lines = [effect * self._sigmas[name] / 2 for name, effect in self.effects.items() if effect > 0]
        return fmean(lines) if lines else None

    def weigh(self, columns: Mapping[str, float]) -> float:
        """Return the evidence that the scorers give for a claim, in nats.

        Raises:
            CsrError: The claim was not scored, or a score is not finite.
        """
        return fmean(
            effect * self.significance(columns, name) - effect**2 / 2 if effect else 0.0
            for name, effect in self.effects.items()
        )

    def significance(self, columns: Mapping[str, float], name: str) -> float:
        """Return z of a claim by one scorer."""
        return _contrast(columns, name) / self._sigmas[name]

    @property
    def _consistency(self) -> float:
        return self.config.consistency * min(1.0, *self.effects.values())

    def _effect(self, name: str) -> float:
        if not self.mentions:
            return 0.0
        total = sum(self.mentions.values())
        mean = sum(n * self.significance(self.scores[thing], name) for thing, n in self.mentions.items()) / total
        effective = total**2 / sum(n**2 for n in self.mentions.values())
        return max(0.0, mean * effective / (effective + 1))

    @cached_property
    def _sigmas(self) -> Mapping[str, float]:
        return {
            name: max(median(columns.get(spread_column(name), 0.0) for columns in self.scores.values()), _SMALLEST)
            for name in self.scorer.split("+")
            if self.scores
        }


_SMALLEST = 1e-6
"""Standard deviation below which all images look alike to a scorer."""


def _contrast(columns: Mapping[str, float], name: str) -> float:
    own, others = columns.get(name), columns.get(negatives_column(name))
    if own is None or others is None:
        raise CsrError(
            f"the claims have no score by {name!r}", "score the run first; claims require scorer.others above 0"
        )
    if not math.isfinite(own - others):
        raise CsrError(f"a claim's score by {name!r} is {own - others}", "check the scorer's weights")
    return own - others
