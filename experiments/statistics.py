"""What a comparison over a few seeds can say, and what it could not have seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy
from scipy.optimize import brentq
from scipy.stats import nct, t

from hira.errors import HiraError

LEVEL, POWER = 0.05, 0.8


class Comparison(NamedTuple):
    """Two methods, compared over the same seeds."""

    difference: float
    p: float
    detectable: float


def paired(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Compare b with a by a paired two-sided t-test over seeds.

        d = b - a        t = mean(d) / (s / √n),   s the standard deviation of d, n - 1 degrees of freedom

    The smallest true difference that the test finds with a probability of 0.8 at a level of 0.05 is δ with

        P(T > t₀.₉₇₅) = 0.8,   T noncentral t with n - 1 degrees of freedom and noncentrality δ / (s / √n)

    It takes s for the true standard deviation, which with five seeds is known to a factor of about two. Differences
    that are all equal have s = 0: δ is 0, and p is 0, or 1 where there is no difference at all.

    Args:
        a: a value for each seed, such as a loss.
        b: the other method's value for each seed, in the same order and unit.

    Returns:
        The mean of b - a, the p-value, and δ, in the unit of a and b.

    Raises:
        HiraError: a and b differ in length, have fewer than two values, or one that is not finite.

    Source:
        Cohen, Statistical Power Analysis for the Behavioral Sciences, 2nd edition, 1988, section 2.5.
    """
    if len(a) != len(b) or len(a) < 2:
        raise HiraError(f"a has {len(a)} values and b {len(b)}; a paired test needs as many of each, two at least")
    differences = numpy.subtract(b, a, dtype=float)
    if not numpy.isfinite(differences).all():
        raise HiraError(
            f"a and b need finite values, found a = {list(a)} and b = {list(b)}; leave out runs that diverged"
        )
    freedom = len(a) - 1
    difference = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(len(a))
    if error <= 1e-12 * abs(difference):
        return Comparison(difference, 0.0 if difference else 1.0, 0.0)
    p = 2 * float(t.sf(abs(difference) / error, freedom))
    return Comparison(difference, p, error * _noncentrality(freedom))


def _noncentrality(freedom: int) -> float:
    """The noncentrality at which a two-sided t-test has the power POWER at the level LEVEL."""
    critical = float(t.ppf(1 - LEVEL / 2, freedom))

    # the tail on the other side has less than a millionth there
    return float(brentq(lambda shift: nct.sf(critical, freedom, shift) - POWER, 0.0, 2 * critical + 10))
