"""Schedules of a loss weight. All are functions of progress, the share of the run that is done, in [0, 1]."""

import math


def gaussian_ramp_up(x: float) -> float:
    """exp(-5 (1 - clip(x, 0, 1))^2): e^-5 at 0, 1 from 1 on (Laine and Aila 2017; every paper here uses it)."""
    return math.exp(-5.0 * (1.0 - min(max(x, 0.0), 1.0)) ** 2)


def ramp_up_between(progress: float, start: float, length: float) -> float:
    """The Gaussian ramp over [start, start + length] of the run: 0 before ``start``, 1 after; a step if length is 0."""
    if progress < start:
        return 0.0
    return 1.0 if length <= 0 else gaussian_ramp_up((progress - start) / length)
