"""Statistics over cases: means with intervals, and paired tests of two models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, wilcoxon

from nnunet_semiseg.evaluation.metrics import DISTANCES

RESAMPLES = 5000
SIGNIFICANT = 0.05
EXACT = 50


@dataclass(frozen=True)
class Summary:
    """Statistics over cases, (K + 1, M) each: for K classes, and last for the mean over the classes.

    Args:
        mean: Over cases; in the last row the mean of the classes' means, as nnU-Net's foreground_mean.
        sd: Standard deviation over cases (N - 1); in the last row, of the cases' means over their classes.
        low, high: 95 % percentile bootstrap interval of the mean (Efron 1979), cases or patients being drawn.
        cases: How many have a value.
    """

    mean: np.ndarray
    sd: np.ndarray
    low: np.ndarray
    high: np.ndarray
    cases: np.ndarray


def summarize(values: np.ndarray, patients: Sequence[str] | None = None) -> Summary:
    """Of (N, K, M) values of N cases, K classes and M metrics; NaN is a value that is left out.

    Args:
        patients: Of the N cases; they are drawn instead of the cases.
    """
    with warnings.catch_warnings():
        # Every value of a class may be left out.
        warnings.simplefilter("ignore", RuntimeWarning)

        def with_mean(by_class: np.ndarray) -> np.ndarray:
            return np.concatenate((by_class, np.nanmean(by_class, axis=-2, keepdims=True)), axis=-2)

        every = with_mean(values)
        low, high = np.nanpercentile(with_mean(bootstrap_means(values, patients)), (2.5, 97.5), axis=0)
        cases = np.isfinite(every).sum(0)
        sd = np.nanstd(every, axis=0, ddof=1)
        # One case or patient says nothing about others.
        groups = _groups(len(values), patients)
        drawn = sum(np.isfinite(every[groups == group]).any(0).astype(int) for group in np.unique(groups))
        low, high = (np.where(drawn > 1, bound, np.nan) for bound in (low, high))
        return Summary(with_mean(np.nanmean(values, axis=0)), sd, low, high, cases)


def bootstrap_means(values: np.ndarray, patients: Sequence[str] | None = None) -> np.ndarray:
    """(R, ...) means of (N, ...) values over R random draws with replacement; NaN is left out.

    Args:
        patients: Of the N cases. As many patients as there are are drawn, each with all its cases; None draws N cases.
    """
    flat = values.reshape(len(values), -1)
    known = np.isfinite(flat)
    groups = _groups(len(flat), patients)
    count = groups.max() + 1
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(float)[:, groups]
    with np.errstate(invalid="ignore"):
        means = drawn @ np.where(known, flat, 0) / (drawn @ known)
    return means.reshape(-1, *values.shape[1:])


def _groups(cases: int, patients: Sequence[str] | None) -> np.ndarray:
    """(N,) number of each case's patient, from 0."""
    return np.arange(cases) if patients is None else np.unique(patients, return_inverse=True)[1]


@dataclass
class PairedTest:
    """A paired test of one metric and class: ``other`` against ``first``.

    Args:
        pairs: Cases, or patients, that both models have a value for.
        changed: Pairs whose values differ.
        left_out: Cases, or patients, that only one or none of the models has a value for.
        first_mean, other_mean: Over the pairs.
        difference, low, high: Mean of other - first, with its 95 % percentile bootstrap interval.
        p: Two-sided, of Wilcoxon's signed-rank test.
        sign: Of the sum of the signed ranks of other - first.
        p_holm: ``p`` after Holm's correction for all tests of the call.
    """

    first: str
    other: str
    metric: str
    class_name: str
    pairs: int
    changed: int
    left_out: int
    first_mean: float
    other_mean: float
    difference: float
    low: float
    high: float
    p: float
    sign: int
    p_holm: float = math.nan
    verdict: str = ""


def comparable(values: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """The values that all models have, so that none gains by what it lacks; NaN where one of them has none.

    Args:
        values: (models, N, K, metrics) of N cases and K classes.
        patients: Of the N cases.

    Returns:
        (models, P, K + 1, metrics): of each patient the mean over its cases. Last comes the mean of each case over its
        classes, unless there is only one.
    """
    values = np.where(np.isfinite(values).all(0), values, np.nan)
    with warnings.catch_warnings():
        # A case may have no class, and a patient no value.
        warnings.simplefilter("ignore", RuntimeWarning)
        if values.shape[2] > 1:
            values = np.concatenate((values, np.nanmean(values, axis=2, keepdims=True)), axis=2)
        groups = [np.flatnonzero(np.array(patients) == patient) for patient in dict.fromkeys(patients)]
        return np.stack([np.nanmean(values[:, group], axis=1) for group in groups], axis=1)


def paired_test(first: str, other: str, metric: str, class_name: str, a: np.ndarray, b: np.ndarray) -> PairedTest:
    """Of the values ``a`` of ``first`` and ``b`` of ``other``; pairs with a NaN are left out.

    Differences of zero are left out of the ranks (Wilcoxon 1945).
    """
    known = np.isfinite(a) & np.isfinite(b)
    difference = b[known] - a[known]
    changed = difference[difference != 0]
    low = high = math.nan
    if len(difference) > 1:
        low, high = np.percentile(bootstrap_means(difference), (2.5, 97.5))
    return PairedTest(
        first,
        other,
        metric,
        class_name,
        pairs=len(difference),
        changed=len(changed),
        left_out=int((~known).sum()),
        first_mean=_mean(a[known]),
        other_mean=_mean(b[known]),
        difference=_mean(difference),
        low=float(low),
        high=float(high),
        p=signed_rank_p(changed),
        sign=int(np.sign((rankdata(np.abs(changed)) * np.sign(changed)).sum())),
    )


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of differences other than zero.

    Exact up to EXACT differences, with ties too: ranks are what they are, signs are by chance. scipy's, which is the
    normal approximation, beyond; for ties scipy has that from 14 differences on.
    """
    if len(differences) > EXACT:
        return float(wilcoxon(differences).pvalue)
    # Twice the ranks are whole numbers: tied ones end in a half at most.
    ranks = np.rint(2 * rankdata(np.abs(differences))).astype(int)
    chance = np.ones(1)  # of each sum of the ranks with a positive sign
    for rank in ranks:
        chance = (np.pad(chance, (0, rank)) + np.pad(chance, (rank, 0))) / 2
    found = ranks[differences > 0].sum()
    return float(min(1, 2 * min(chance[: found + 1].sum(), chance[found:].sum())))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def holm(p: list[float]) -> np.ndarray:
    """p-values after Holm's step-down correction (Holm 1979), in the given order."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate((len(p) - np.arange(len(p))) * np.asarray(p)[order]).clip(max=1)
    return adjusted


def cases_needed(tests: int) -> int:
    """From which number of pairs that differ on the smallest of so many p can be significant after Holm's correction.

    The smallest two-sided p of n pairs is 2 / 2^n: all differences have one sign. The smallest p is multiplied by the
    number of tests.
    """
    return math.ceil(1 + math.log2(tests / SIGNIFICANT))


def decide(tests: list[PairedTest]) -> None:
    for test, p in zip(tests, holm([test.p for test in tests])):
        test.p_holm = float(p)
        if p <= SIGNIFICANT:
            test.verdict = "better" if (test.sign < 0) == (test.metric in DISTANCES) else "worse"
        # Equal values are left out of the test. Where all are equal, they do say something.
        elif (test.changed or test.pairs) < cases_needed(len(tests)):
            test.verdict = "too few cases"
        else:
            test.verdict = "no difference shown"
