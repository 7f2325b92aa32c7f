"""What a set of runs says: intervals, the smallest margin that passes, a verdict.

A comparison is made on the same seeds for both methods; what goes in here are the n
paired differences, one for each seed. Student's t throughout (SciPy), so the n values
are taken as independent draws; where some of them belong together, as the differences
of one query under several seeds do, `clustered` takes the groups so instead. Chapter 3
of the book builds this file.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Verdict:
    """Whether a claim `stands`, and the figure with the interval that it rests on."""

    stands: bool
    mean: float
    low: float
    high: float

    def __str__(self):
        text = f"{self.mean:+z.2f} [{self.low:+z.2f}, {self.high:+z.2f}]"
        return text.replace("-", "\N{MINUS SIGN}")


def interval(values, level=0.95):
    """Mean of n values (n,), n >= 2, and the ends of its confidence interval: 3 floats.

    Where there is no interval, as for one value or with a NaN, its ends are NaN.
    """
    values = np.asarray(values, dtype=float)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(level)
    return float(values.mean()), float(low), float(high)


def shown(mean, low, high):
    """What `interval` gives as a text, "1.5 [1.0, 2.0]", its minus a real one."""
    return f"{mean:z.1f} [{low:z.1f}, {high:z.1f}]".replace("-", "\N{MINUS SIGN}")


def clustered(values, clusters, level=0.95):
    """The mean of n values and its interval where those of a cluster hang together.

    `clusters` holds n labels. Only the g different ones are taken as independent draws,
    however often each recurs: the standard error is that of the sums of residuals by
    cluster (Liang & Zeger 1986, doi:10.1093/biomet/73.1.13), with g - 1 degrees of
    freedom. If no label recurs it is `interval(values)`, if all recur equally often it
    is the interval of the clusters' means.
    """
    values = pd.Series(np.asarray(values, dtype=float))
    mean = values.mean()
    sums = (values - mean).groupby(np.asarray(clusters)).sum()
    return interval(mean + len(sums) / len(values) * sums, level)


def smallest_margin(differences):
    """The smallest margin m for which two one-sided tests at 5% say |mean| < m.

    `differences` are paired, (n,). It is the end farther from zero of their 90%
    interval (Schuirmann 1987, doi:10.1007/BF01068419): equivalence within any larger
    margin is accepted, within any smaller one it is not.
    """
    _, low, high = interval(differences, 0.9)
    return max(-low, high)
