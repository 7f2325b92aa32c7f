"""`study.evidence` against SciPy's paired t-test, one-sided t-tests and coverage."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from lora.study.evidence import Verdict, clustered, interval, shown, smallest_margin

RNG = np.random.default_rng(0)
SAMPLES = [RNG.normal(mean, 2, n) for mean, n in [(0, 2), (3, 10), (-1, 40), (-9, 7)]]


@pytest.mark.parametrize("level", [0.95, 0.9, 0.5])
@pytest.mark.parametrize("values", SAMPLES, ids=len)
def test_interval_is_that_of_a_paired_t_test(values, level):
    other = RNG.normal(size=len(values))
    theirs = stats.ttest_rel(values + other, other)
    expected = [values.mean(), *theirs.confidence_interval(level)]
    for given in (values, torch.tensor(values), values.tolist()):
        np.testing.assert_allclose(interval(given, level), expected, rtol=1e-11)


def test_interval_is_of_95_percent_and_of_plain_floats():
    got = interval([1, 2, 4])
    assert got == interval([1.0, 2.0, 4.0], level=0.95)
    assert [type(v) for v in got] == [float] * 3


def test_interval_covers_the_mean_as_often_as_it_says():
    draws = RNG.normal(5, 3, (4_000, 6))
    hits = [low <= 5 <= high for _, low, high in (interval(d, 0.8) for d in draws)]
    assert abs(np.mean(hits) - 0.8) < 4 * (0.8 * 0.2 / len(draws)) ** 0.5


def test_texts_have_a_real_minus_and_no_minus_before_zero():
    assert shown(-0.04, -1.5, 0.3) == "0.0 [−1.5, 0.3]"
    assert str(Verdict(True, -0.004, -1.5, 0.25)) == "+0.00 [−1.50, +0.25]"


# --- Values that hang together ---


def test_clusters_of_one_are_plain_values_and_equal_ones_are_their_means():
    values = RNG.normal(2, 3, 24)
    alone = clustered(values, RNG.permutation(24), 0.9)
    np.testing.assert_allclose(alone, interval(values, 0.9), rtol=1e-12)
    labels = np.repeat([f"name {i}" for i in range(6)], 4)
    means = values.reshape(6, 4).mean(1)
    np.testing.assert_allclose(clustered(values, labels), interval(means), rtol=1e-12)
    mixed = RNG.permutation(24)
    again = clustered(values[mixed], labels[mixed])
    np.testing.assert_allclose(again, interval(means), rtol=1e-12)


def test_unequal_clusters_by_hand():
    """Residuals of the mean 3 are -2, -1 | 3: the variance is 2/1 · (9 + 9) / 3²."""
    mean, low, high = clustered([1, 2, 6], ["a", "a", "b"])
    assert mean == 3
    half = stats.t.ppf(0.975, 1) * 2
    assert (low, high) == pytest.approx((3 - half, 3 + half), rel=1e-12)


def test_the_clustered_interval_covers_as_often_as_it_says():
    """Names that recur: each has an effect of its own, five seeds draw 40 of 60."""
    draws, hits, plain = 2_000, 0, 0
    for _ in range(draws):
        names = np.concatenate([RNG.permutation(60)[:40] for _ in range(5)])
        values = 5 + RNG.normal(0, 3, 60)[names] + RNG.normal(0, 1, 200)
        hits += np.searchsorted(clustered(values, names, 0.8)[1:], 5) == 1
        plain += np.searchsorted(interval(values, 0.8)[1:], 5) == 1
    assert abs(hits / draws - 0.8) < 4 * (0.8 * 0.2 / draws) ** 0.5
    assert plain / draws < 0.6, "taken as 200 independent values it is too narrow"


@pytest.mark.parametrize("values", SAMPLES, ids=len)
def test_smallest_margin_is_where_two_one_sided_tests_turn(values):
    def equivalent(margin):
        above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(values, margin, alternative="less").pvalue
        return max(above, below) < 0.05

    margin = smallest_margin(values)
    assert margin > abs(values.mean())
    assert equivalent(margin * (1 + 1e-9)) and not equivalent(margin * (1 - 1e-9))
    assert smallest_margin(-values) == pytest.approx(margin, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Precision loss occurred")
def test_equal_runs_have_no_width():
    assert interval([2.5] * 3) == (2.5, 2.5, 2.5)
    assert smallest_margin([-2.5] * 3) == 2.5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("values", [[1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_values_that_have_no_interval_show_nan_and_pass_no_margin(values):
    assert all(math.isnan(end) for end in interval(values)[1:])
    assert not smallest_margin(values) < 1e9


def test_several_runs_at_once_are_refused():
    with pytest.raises(TypeError):
        interval([[1.0, 2.0], [3.0, 5.0]])


def test_verdict_reads_as_a_figure_with_its_interval():
    verdict = Verdict(True, *interval([-0.1, 0.05, 0.02, -0.06]))
    assert str(verdict) == "−0.02 [−0.13, +0.09]"
    assert verdict.stands and verdict == Verdict(
        True, *interval([-0.1, 0.05, 0.02, -0.06])
    )
    assert str(Verdict(False, 0, 0, 12.345)) == "+0.00 [+0.00, +12.35]"
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.stands = False
