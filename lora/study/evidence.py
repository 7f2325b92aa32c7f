"""What a set of runs says: intervals, the smallest margin that passes, a verdict.

A comparison is made on the same seeds for both methods; what goes in here are the n
paired differences, one a seed. Student's t throughout (SciPy), so the n values are
taken as independent draws. Chapter 3 of the book builds this file.
"""

from dataclasses import dataclass

import torch
from scipy import stats


@dataclass(frozen=True)
class Verdict:
    """Whether a claim `stands`, and the figure with the interval that it rests on."""

    stands: bool
    mean: float
    low: float
    high: float

    def __str__(self):
        text = f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        return text.replace("-", "\N{MINUS SIGN}")


def interval(values, level=0.95):
    """Mean of n values (n,), n >= 2, and the ends of its confidence interval: 3 floats.

    Raises ValueError unless `values` is one-dimensional and finite, with n >= 2, and
    `level` lies strictly between 0 and 1.
    """
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if values.ndim != 1 or len(values) < 2 or not values.isfinite().all():
        raise ValueError(f"values must be (n,), finite, with n >= 2, got {values}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level!r}")
    mean = values.mean().item()
    half = values.std().item() / len(values) ** 0.5
    half *= stats.t.ppf((1 + level) / 2, len(values) - 1).item()
    return mean, mean - half, mean + half


def smallest_margin(differences, alpha=0.05):
    """The smallest margin m for which two one-sided tests at `alpha` say |mean| < m.

    `differences` are paired, (n,). It is the end farther from zero of their (1 - 2
    alpha) interval (Schuirmann 1987, doi:10.1007/BF01068419): equivalence within any
    larger margin is accepted, within any smaller one it is not. Raises ValueError
    unless 0 < alpha < 0.5, and whatever `interval` raises.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie strictly between 0 and 0.5, got {alpha!r}")
    _, low, high = interval(differences, 1 - 2 * alpha)
    return max(-low, high)
