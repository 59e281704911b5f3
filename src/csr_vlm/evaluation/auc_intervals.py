r"""Compute intervals for the area under the ROC curve of texts that come in pictures.

Texts of one picture depend on each other, so pictures are the units. With m true and n false
texts, DeLong's components are

    V(x) = mean over false texts y of psi(x, y)   for a true text x
    V(y) = mean over true texts x of psi(x, y)    for a false text y
    psi  = 1 if x > y, 1/2 if x = y, else 0,      AUC = mean V(x) = mean V(y)

and a picture k with m_k true and n_k false texts contributes (Obuchowski 1997)

    d_k = (sum of V(x) in k - m_k AUC) / m + (sum of V(y) in k - n_k AUC) / n

to the variance K / (K - 1) sum_k d_k^2 over K pictures. Two scorers of the same texts are
compared with the difference of their d_k. The interval is symmetric in the log-odds of the AUC,
with Student's t. Where every true text is above every false one (or the reverse), the variance is
0; the interval then is the score interval with Hanley and McNeil's variance (Newcombe 2006,
method 5), with pictures counted in place of texts, so that no interval has zero width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csr_vlm.evaluation.statistics import auc_score_interval, share_below

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Auc:
    """Hold an area under the ROC curve and its 95 % interval over pictures."""

    value: float
    low: float
    high: float
    num_true: int
    num_false: int

    def dump(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class AucDifference:
    """Hold the difference of the AUCs of two scorers of the same texts, and its 95 % interval over pictures."""

    value: float
    low: float
    high: float

    def dump(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Components:
    value: float
    influence: _Array
    """d_k of each picture, of shape (pictures,)."""
    units: tuple[int, int]
    """Number of pictures with a true and with a false text."""
    counts: tuple[int, int]
    """Number of true and of false texts."""

    @property
    def quantile(self) -> float:
        """Return the 97.5 % quantile of Student's t; one degree less than the rarer side has pictures."""
        from scipy.stats import t

        return float(t.ppf(0.975, max(min(self.units) - 1, 1)))


def clustered_auc(scores: Sequence[float], is_true: Sequence[bool], pictures: Sequence[int]) -> Auc | None:
    """Compute P(true > false) + P(true = false) / 2 with its interval; None without a true or a false text.

    Args:
        scores: One score per text.
        is_true: Whether the text is true.
        pictures: The picture that the text is about; texts of one picture depend on each other.

    Example:
        >>> clustered_auc([3.0, 1.0, 2.0, 0.0], [True, True, False, False], [0, 1, 2, 3]).value
        0.75
    """
    parts = _components(scores, is_true, pictures)
    if parts is None:
        return None
    deviation = _standard_error(parts.influence)
    if 0 < parts.value < 1 and deviation > 0:
        odds = np.log(parts.value / (1 - parts.value))
        half = parts.quantile * deviation / (parts.value * (1 - parts.value))
        low, high = (float(1 / (1 + np.exp(-end))) for end in (odds - half, odds + half))
    else:
        low, high = auc_score_interval(parts.value, *parts.units)
    return Auc(parts.value, low, high, *parts.counts)


def auc_difference(
    first: Sequence[float], second: Sequence[float], is_true: Sequence[bool], pictures: Sequence[int]
) -> AucDifference | None:
    """Compute AUC(second) - AUC(first) on the same texts; None without a true or a false text."""
    before, after = _components(first, is_true, pictures), _components(second, is_true, pictures)
    if before is None or after is None:
        return None
    half = before.quantile * _standard_error(after.influence - before.influence)
    value = after.value - before.value
    return AucDifference(value, max(value - half, -1.0), min(value + half, 1.0))


def _components(scores: Sequence[float], is_true: Sequence[bool], pictures: Sequence[int]) -> _Components | None:
    values, truth = np.asarray(scores, dtype=float), np.asarray(is_true, dtype=bool)
    if not truth.any() or truth.all():
        return None
    _, unit = np.unique(np.asarray(pictures), return_inverse=True)
    positive, negative = values[truth], values[~truth]
    above = share_below(negative, positive)
    below = 1.0 - share_below(positive, negative)
    value = float(above.mean())
    number = int(unit.max()) + 1
    influence = np.bincount(unit[truth], above - value, number) / len(positive)
    influence = influence + np.bincount(unit[~truth], below - value, number) / len(negative)
    units = (len(np.unique(unit[truth])), len(np.unique(unit[~truth])))
    return _Components(value, influence, units, (len(positive), len(negative)))


def _standard_error(influence: _Array) -> float:
    number = len(influence)
    return float(np.sqrt(number / max(number - 1, 1) * (influence**2).sum()))
