"""Intervals against closed forms, and by simulation: covered as often as they promise, and no more promised."""

import math

import numpy as np
import pytest
from scipy import stats

from resunet_jax.metrics.conformal import (
    QUANTITIES,
    Quantity,
    achievable_level,
    conformal_quantile,
    cv_plus_guarantee,
    cv_plus_interval,
    default_level,
    is_covered,
    rank_correlation,
    split_interval,
    worst_third_found,
)

ML = Quantity()


def test_closed_form() -> None:
    residuals = [ML.residual(9, 25), ML.residual(25, 9), ML.residual(5, 5)]
    assert residuals == pytest.approx([2, 2, 0])
    assert split_interval(36, residuals, 0.75, ML) == pytest.approx((16, 64))
    assert split_interval(1, residuals, 0.75, ML) == pytest.approx((0, 9))  # 1 - 2 is no root of a volume
    assert split_interval(36, residuals, 0.25, ML) == pytest.approx((36, 36))
    assert split_interval(81, [2.0], 0.5, QUANTITIES["involvement_percent"]) == (49, 100)
    for level, patients in ((0.7, 9), (0.28, 24)):  # the seventh; of floats, 0.28 · 25 is above 7
        assert conformal_quantile([0.1 * k for k in range(patients)], level) == pytest.approx(0.6)


def test_a_value_is_covered_by_an_interval_that_ends_at_it() -> None:
    low, value = 18.003990105114106, 18.003990105114095  # of the same volume, one by its square root
    assert is_covered((low, 20.0), value)
    assert is_covered((0.0, value), low)
    assert is_covered((0.0, 0.0), 0.0)
    for interval in ((18.1, 20.0), (0.0, 17.9), (math.nan, math.nan)):
        assert not is_covered(interval, value)


def test_a_level_beyond_what_patients_can_promise_is_unbounded() -> None:
    assert achievable_level(5) == 5 / 6
    residuals = [0.1] * 5
    assert conformal_quantile(residuals, 5 / 6) == 0.1
    assert split_interval(30, residuals, 0.84, ML) == (0, math.inf)
    assert split_interval(30, residuals, 0.84, QUANTITIES["involvement_percent"]) == (0, 100)
    assert cv_plus_interval([30.0] * 5, residuals, 0.84, ML) == (0, math.inf)
    assert [default_level(n) for n in (1, 5, 9, 99)] == [0.5, 5 / 6, 0.9, 0.9]


def test_cv_plus_with_models_that_agree_is_the_split_interval() -> None:
    residuals = [0.3, 0.1, 0.2, 0.5]
    for level in (0.5, 0.6, 0.8):
        assert cv_plus_interval([20.0] * 4, residuals, level, ML) == pytest.approx(
            split_interval(20, residuals, level, ML)
        )
    spread = cv_plus_interval([10.0, 20, 40, 80], [0.0] * 4, 0.8, ML)
    assert spread == pytest.approx((10, 80))
    with pytest.raises(ValueError, match="each of 2"):
        cv_plus_interval([1.0], [0.1, 0.2], 0.5, ML)


def test_guarantee_of_cv_plus() -> None:
    assert cv_plus_guarantee(0.9, patients=20, folds=20) == pytest.approx(0.8)
    assert cv_plus_guarantee(0.9, patients=20, folds=5) == pytest.approx(0.8 - min(1.6 / 5, 0.75 / 6))
    assert cv_plus_guarantee(0.5, patients=5, folds=5) == 0


def truths_and_predictions(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Volumes over three orders of magnitude, and predictions that are biased and worse for small ones."""
    truth = np.exp(rng.normal(3.5, 2, count))
    return truth, truth * np.exp(rng.normal(-0.3, 0.5, count)) + rng.exponential(4, count)


@pytest.mark.parametrize("patients", [5, 11, 30])
def test_split_conformal_covers_as_often_as_it_says(patients: int) -> None:
    """Exactly level, rounded up to ranks, over calibration and new patient: within binomial bounds (p = 0.002)."""
    rng, trials, level = np.random.default_rng(0), 4000, default_level(patients)
    covered = 0
    for _ in range(trials):
        truth, predicted = truths_and_predictions(rng, patients + 1)
        residuals = [ML.residual(p, t) for p, t in zip(predicted[:-1], truth[:-1], strict=True)]
        low, high = split_interval(predicted[-1], residuals, level, ML)
        covered += low <= truth[-1] <= high
    exact = math.ceil(level * (patients + 1) - 1e-9) / (patients + 1)
    below, above = stats.binom.ppf([0.001, 0.999], trials, exact)
    assert below <= covered <= above


def test_coverage_breaks_where_patients_are_of_another_kind() -> None:
    rng, trials, covered = np.random.default_rng(1), 500, 0
    for _ in range(trials):
        truth, predicted = truths_and_predictions(rng, 11)
        residuals = [ML.residual(p, t) for p, t in zip(predicted[:-1], truth[:-1], strict=True)]
        low, high = split_interval(predicted[-1] / 5, residuals, 0.9, ML)  # of another kind: more is ill, and missed
        covered += low <= 5 * truth[-1] <= high
    assert covered / trials < 0.7


def test_cv_plus_covers_at_least_its_guarantee() -> None:
    """Each fold's model is the mean of its log volumes, so that models differ much; 10 patients, 5 folds."""
    rng, trials, patients, folds, level = np.random.default_rng(2), 2000, 10, 5, 0.9
    covered, fold_of = 0, np.arange(patients) % folds
    for _ in range(trials):
        scale = np.exp(rng.normal(0, 1))
        truth = np.exp(rng.normal(3, scale, patients + 1))
        models = [np.exp(np.log(truth[:-1][fold_of != k]).mean()) for k in range(folds)]
        predicted = [models[k] for k in fold_of]
        residuals = [ML.residual(p, t) for p, t in zip(predicted, truth[:-1], strict=True)]
        low, high = cv_plus_interval(predicted, residuals, level, ML)
        covered += low <= truth[-1] <= high
    guaranteed = cv_plus_guarantee(level, patients, folds)
    assert covered >= stats.binom.ppf(0.001, trials, guaranteed)
    assert covered >= stats.binom.ppf(0.001, trials, level - 0.03)  # in practice near the level itself


def test_rank_correlation_and_worst_third() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    a, b = np.round(np.random.default_rng(0).random((2, 20)), 1)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)  # with ties
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(rank_correlation([1, 2], [1, 2]))
    assert worst_third_found([0.1, 0.2, 0.8, 0.9, 0.7, 0.3], [0, 0.6, 0.7, 0.8, 0.9, 0.5]) == 0.5
    assert worst_third_found([1, 2, 3], [3, 2, 1]) == 0
    assert worst_third_found([1, 2, 3, 4], [2, 1, 3, 4]) == 1  # a third of four are two


def test_ties_find_what_chance_finds_in_any_order() -> None:
    for quality in ([0.0, 0.5, 0.9], [0.9, 0.5, 0.0]):
        assert worst_third_found([1, 1, 1], quality) == pytest.approx(1 / 3)
    assert worst_third_found([0.1, 0.5, 0.9, 0.95], [0, 0, 0, 0.9]) == pytest.approx(2 / 3)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        score, quality = np.array([0.5, 0.5, 0.8, 0.9])[order], np.array([0.1, 0.2, 0.2, 0.9])[order]
        assert worst_third_found(score, quality) == pytest.approx(0.75)
