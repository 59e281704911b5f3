"""Estimate without labels how well a scorer separates true claims from false ones.

Two cues that err independently tell how good each of them is. The scorer's significance z and the
number of samples that make the claim are modeled as a mixture of two classes, true and false, in each
of which both cues are normal and independent (a Gaussian mixture with diagonal covariance, fitted by
expectation maximization). The AUC follows from the two distributions of z:

    AUC = Phi((mean_true - mean_false) / sqrt(var_true + var_false))

Errors that both cues share, such as habits that the scorer has learned too, are not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

FEWEST_CLAIMS = 100
"""Number of claims below which there is no estimate."""
_MOST_CLAIMS = 20_000
_STEPS = 200
_LEAST_VARIANCE = 1e-3


def estimated_auc(cues: Sequence[tuple[float, float]]) -> float | None:
    """Return the estimated probability that a true claim scores higher than a false one.

    Args:
        cues: For each claim the scorer's z and the logarithm of how often the policy makes it,
            relative to its average claim about the image.

    Returns:
        The estimate; None for fewer than ``FEWEST_CLAIMS`` claims, or if all are made equally often.
    """
    import numpy as np

    values = np.array(cues[:: max(1, -(-len(cues) // _MOST_CLAIMS))], dtype=np.float64).reshape(-1, 2)
    spread = values.std(axis=0) if len(values) else np.zeros(2)
    if len(values) < FEWEST_CLAIMS or not spread.all():
        return None
    # What is said more often than the median starts as true.
    true = 1 / (1 + np.exp(-2 * (values[:, 1] - np.median(values[:, 1])) / spread[1]))
    for _ in range(_STEPS):
        shares = np.stack([true, 1 - true])
        totals = shares.sum(axis=1, keepdims=True)
        means = shares @ values / totals
        variances = shares @ values**2 / totals - means**2 + _LEAST_VARIANCE
        squares = (values - means[:, None]) ** 2 / variances[:, None]
        densities = np.log(totals[:, 0]) - (squares + np.log(variances)[:, None]).sum(axis=2).T / 2
        true = 1 / (1 + np.exp(np.clip(densities[:, 1] - densities[:, 0], -50, 50)))
    gap, variance = means[0, 0] - means[1, 0], variances[:, 0].sum()
    return NormalDist().cdf(float(gap / np.sqrt(variance)))
