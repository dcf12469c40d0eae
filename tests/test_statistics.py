"""The paired test of experiments/statistics.py, against published values and a simulation."""

from __future__ import annotations

import math

import numpy
import pytest
from experiments.statistics import paired
from scipy.stats import ttest_rel

from hira import HiraError

# extra hours of sleep with two drugs: Student, The Probable Error of a Mean, 1908
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def unit_differences(n: int) -> tuple[list[float], list[float]]:
    """Two samples whose differences have the standard deviation 1."""
    values = numpy.random.default_rng(0).normal(size=n)
    return [0.0] * n, list((values - values.mean()) / values.std(ddof=1))


def test_student_s_own_example():
    difference, p, _ = paired(FIRST, SECOND)
    assert difference == pytest.approx(1.58)
    assert p == pytest.approx(0.002833, abs=5e-7)
    assert p == pytest.approx(ttest_rel(SECOND, FIRST).pvalue)


@pytest.mark.parametrize(("size", "n"), [(1.0, 10), (0.5, 34), (0.2, 199)])
def test_published_sample_sizes(size, n):
    """So many pairs are needed to find a difference of so many standard deviations: tables of Cohen and of G*Power."""
    assert paired(*unit_differences(n)).detectable <= size < paired(*unit_differences(n - 1)).detectable


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_power_is_as_stated(n):
    """At few seeds too, by simulation: about 0.8 of samples with the detectable difference are found."""
    detectable = paired(*unit_differences(n)).detectable
    samples = numpy.random.default_rng(1).normal(detectable, 1, size=(20000, n))
    found = ttest_rel(samples, numpy.zeros_like(samples), axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.012)  # four standard errors


def test_the_order_gives_the_sign_and_the_unit_scales():
    there, back = paired(FIRST, SECOND), paired(SECOND, FIRST)
    assert (back.difference, back.p, back.detectable) == pytest.approx((-there.difference, there.p, there.detectable))
    scaled = paired([100 * x for x in FIRST], [100 * x for x in SECOND])
    assert scaled.p == pytest.approx(there.p)
    assert scaled.detectable == pytest.approx(100 * there.detectable)


def test_equal_differences():
    assert paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (0, 1, 0)
    assert paired([1.0, 2.0, 3.1], [1.1, 2.1, 3.2]) == (pytest.approx(0.1), 0, 0)


@pytest.mark.parametrize(
    ("a", "b", "named"), [([1], [1], "1 values"), ([1, 2], [1, 2, 3], "2 values"), ([1, math.inf], [1, 2], "inf")]
)
def test_bad_input(a, b, named):
    with pytest.raises(HiraError, match=named):
        paired(a, b)
