"""Statistics over cases equal their definitions, read literally, and what scipy computes."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from scipy.stats import rankdata, wilcoxon

from nnunet_semiseg.evaluation.statistics import (
    bootstrap_means,
    cases_needed,
    decide,
    holm,
    paired_test,
    signed_rank_p,
    summarize,
)


def test_summary_equals_the_definitions():
    values = np.random.RandomState(0).rand(12, 2, 3)
    values[:4, 1] = np.nan
    summary = summarize(values)
    for metric in range(3):
        means = []
        for k, column in enumerate((values[:, 0, metric], values[4:, 1, metric])):
            mean = sum(column) / len(column)
            assert summary.mean[k, metric] == pytest.approx(mean)
            assert summary.sd[k, metric] == pytest.approx(math.sqrt(sum((column - mean) ** 2) / (len(column) - 1)))
            assert summary.cases[k, metric] == len(column)
            means.append(mean)
        # The mean of the classes' means, and not that of the cases' means, which differs where values are left out.
        assert summary.mean[2, metric] == pytest.approx(sum(means) / 2)
        of_cases = [np.mean([v for v in case[:, metric] if not np.isnan(v)]) for case in values]
        assert summary.sd[2, metric] == pytest.approx(np.std(of_cases, ddof=1))
        assert summary.cases[2, metric] == 12


def test_interval_equals_that_of_scipy():
    values = np.random.RandomState(3).gamma(2, size=40)
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile").confidence_interval
    summary = summarize(values[:, None, None])
    width = expected.high - expected.low
    assert summary.low[0, 0] == pytest.approx(expected.low, abs=0.05 * width)
    assert summary.high[0, 0] == pytest.approx(expected.high, abs=0.05 * width)


def test_bootstrap_draws_whole_cases():
    # The second value of each case is the first plus one: in every draw, so are the means.
    first = np.random.RandomState(0).rand(9)
    means = bootstrap_means(np.stack((first, first + 1), axis=1))
    assert np.allclose(means[:, 1] - means[:, 0], 1) and means[:, 0].std() > 0
    # Two cases: a quarter of the draws is one of them twice.
    share = (bootstrap_means(np.array([0.0, 1.0])) == 0).mean()
    assert share == pytest.approx(0.25, abs=0.03)


def test_summary_of_left_out_classes_and_of_one_case():
    summary = summarize(np.array([[[0.5], [np.nan]], [[0.7], [np.nan]]]))
    assert np.isnan(summary.mean[1, 0]) and summary.cases[:, 0].tolist() == [2, 0, 2]
    assert summary.mean[2, 0] == pytest.approx(0.6)
    alone = summarize(np.array([[[0.5]]]))
    assert alone.mean[0, 0] == 0.5 and np.isnan([alone.sd[0, 0], alone.low[0, 0], alone.high[0, 0]]).all()


# ------------------------------------------------------------------------------------------------------- paired tests


@pytest.mark.parametrize(
    "others, verdict",
    [
        # 20 cases of which 4 differ: no p below 2 / 2^4.
        ([np.r_[np.zeros(16), np.ones(4)]], "too few cases"),
        # All the same is no lack of cases, unless there are few.
        ([np.zeros(20)], "no difference shown"),
        ([np.zeros(3)], "too few cases"),
        ([np.full(3, np.nan)], "too few cases"),
        # Holm multiplies the second p by 1 only, so that 6 cases suffice, although 7 are needed for the smallest of 2.
        ([np.ones(6), np.ones(20)], "worse"),
    ],
)
def test_verdicts_by_the_cases_that_differ(others, verdict):
    tests = [paired_test("a", "b", "HD", "x", np.zeros(len(b)), b) for b in others]
    decide(tests)
    assert tests[0].verdict == verdict


def slow_wilcoxon(differences):
    """Two-sided p: the share of all assignments of signs whose rank sum is as far from its mean or farther."""
    differences = [d for d in differences if d != 0]
    ranks = rankdata(np.abs(differences))
    mean = ranks.sum() / 2
    found = abs(sum(r for r, d in zip(ranks, differences) if d > 0) - mean)
    sums = [sum(r for r, sign in zip(ranks, signs) if sign) for signs in itertools.product((0, 1), repeat=len(ranks))]
    return sum(abs(s - mean) >= found - 1e-9 for s in sums) / len(sums)


@pytest.mark.parametrize("seed", range(3))
def test_paired_test_equals_the_definition(seed):
    random = np.random.RandomState(seed)
    a, b = random.rand(2, 17)
    b += 0.2
    a[0] = np.nan
    b[1] = np.nan
    b[2] = a[2]
    test = paired_test("first", "other", "Dice", "x", a, b)
    pairs = [(x, y) for x, y in zip(a, b) if not (np.isnan(x) or np.isnan(y))]
    assert (test.pairs, test.left_out) == (15, 2)
    assert test.p == pytest.approx(slow_wilcoxon([y - x for x, y in pairs]))
    assert test.first_mean == pytest.approx(np.mean([x for x, _ in pairs]))
    assert test.difference == pytest.approx(np.mean([y - x for x, y in pairs]))
    assert test.low < test.difference < test.high and test.sign == 1
    assert paired_test("other", "first", "Dice", "x", b, a).p == test.p


@pytest.mark.parametrize("seed", range(3))
def test_p_is_exact_with_ties(seed):
    differences = np.random.RandomState(seed).choice([-2, -1, 1, 2, 3], 13)
    assert signed_rank_p(differences) == pytest.approx(slow_wilcoxon(differences))


@pytest.mark.parametrize("cases", [20, 50, 51])
def test_p_equals_that_of_scipy_without_ties(cases):
    differences = np.random.RandomState(cases).normal(0.3, 1, cases)
    assert signed_rank_p(differences) == pytest.approx(wilcoxon(differences).pvalue)


def test_equal_models_and_classes_without_pairs():
    values = np.random.RandomState(0).rand(6)
    same = paired_test("a", "b", "Dice", "x", values, values)
    assert (same.p, same.sign, same.difference) == (1, 0, 0)
    none = paired_test("a", "b", "Dice", "x", np.full(3, np.nan), np.arange(3.0))
    assert (none.p, none.pairs, none.left_out) == (1, 0, 3) and np.isnan(none.difference)


def test_holm_equals_the_definition():
    p = [0.04, 0.001, 0.03, 0.9, 0.03]
    # In ascending order, the i-th of m is multiplied by m - i + 1, and is never below the one before.
    order, largest, expected = sorted(range(5), key=lambda i: p[i]), 0.0, [0.0] * 5
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p[i] * (5 - rank)))
        expected[i] = largest
    assert holm(p) == pytest.approx(expected) and holm(p) == pytest.approx([0.12, 0.005, 0.12, 0.9, 0.12])


@pytest.mark.parametrize("tests", [1, 2, 6, 40])
def test_cases_needed_is_the_least_number_that_can_be_significant(tests):
    needed = cases_needed(tests)
    smallest = [tests * slow_wilcoxon(range(1, n + 1)) for n in (needed - 1, needed)] if needed < 14 else None
    if smallest:
        assert smallest[0] > 0.05 >= smallest[1]
    assert tests * 2 / 2**needed <= 0.05 < tests * 2 / 2 ** (needed - 1)
