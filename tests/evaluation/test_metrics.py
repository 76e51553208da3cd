import math

import numpy as np
import pytest

from resunet_jax.evaluation.metrics import THRESHOLDS, choose_threshold, count, emptiness, hard_metrics, soft_metrics
from tests.conftest import REFERENCE


def test_counts_against_a_naive_loop(rng: np.random.Generator) -> None:
    predicted, actual = rng.random((2, 3, 4, 5)) > 0.6
    naive = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
    for p, a in zip(predicted.ravel(), actual.ravel(), strict=True):
        naive[("t" if p == a else "f") + ("p" if p else "n")] += 1
    assert count(predicted, actual) == naive


def test_closed_form() -> None:
    metrics = hard_metrics({"tp": 3, "fp": 1, "fn": 2, "tn": 4})
    assert metrics == pytest.approx(
        {"dice": 6 / 9, "iou": 3 / 6, "precision": 3 / 4, "recall": 3 / 5, "specificity": 4 / 5, "accuracy": 7 / 10}
    )


@pytest.mark.parametrize(
    ("counts", "empty", "dice", "precision", "recall"),
    [
        ({"tp": 0, "fp": 0, "fn": 0, "tn": 9}, "both", math.nan, math.nan, math.nan),
        ({"tp": 0, "fp": 2, "fn": 0, "tn": 7}, "reference", 0, 0, math.nan),
        ({"tp": 0, "fp": 0, "fn": 2, "tn": 7}, "prediction", 0, math.nan, 0),
        ({"tp": 9, "fp": 0, "fn": 0, "tn": 0}, "neither", 1, 1, 1),
    ],
)
def test_empty_masks_have_a_stated_answer(counts, empty, dice, precision, recall) -> None:
    metrics = hard_metrics(counts)
    assert emptiness(counts) == empty
    names = ("dice", "iou", "precision", "recall")  # where just one is empty, and where both agree, Dice equals IoU
    np.testing.assert_equal([metrics[m] for m in names], [dice, dice, precision, recall])


def test_full_reference_has_no_specificity() -> None:
    assert math.isnan(hard_metrics({"tp": 9, "fp": 0, "fn": 0, "tn": 0})["specificity"])


def test_soft_metrics_are_the_originals() -> None:
    with np.load(REFERENCE / "soft_metrics.npz") as reference:
        for i, (probability, target) in enumerate(zip(reference["prob"], reference["target"], strict=True)):
            metrics = soft_metrics(probability, target)
            for ours, theirs in (
                ("accuracy", "pixel_acc"),
                *((name, name) for name in ("dice", "precision", "recall", "specificity")),
            ):
                np.testing.assert_allclose(metrics[ours], reference[theirs][i], atol=1e-6, rtol=0)


def test_threshold_is_the_best_of_a_naive_search(rng: np.random.Generator) -> None:
    volumes = [((0.3 * rng.random((3, 8, 8)) + 0.5 * (t := rng.random((3, 8, 8)) > 0.7)), t) for _ in range(3)]
    threshold, dice = choose_threshold(volumes)
    naive = {
        value: np.mean([2 * ((p > value) & t).sum() / ((p > value).sum() + t.sum()) for p, t in volumes])
        for value in THRESHOLDS
    }
    assert dice == pytest.approx(max(naive.values()))
    assert naive[threshold] == pytest.approx(dice)
    assert all(abs(threshold - 0.5) <= abs(value - 0.5) for value in THRESHOLDS if naive[value] == naive[threshold])


def test_threshold_weighs_volumes_alike_and_leaves_out_empty_ones() -> None:
    """One big volume wants 0.2, two small ones 0.8: each volume has one vote, an empty one none."""
    big = np.repeat([0.25, 0.1], 500), np.repeat([1, 0], 500)
    small = np.array([0.9, 0.7]), np.array([1, 0])
    assert choose_threshold([big])[0] < 0.25
    assert choose_threshold([big, small, small])[0] < 0.25  # else the big one is missed whole
    empty = np.full(4, 0.9), np.zeros(4)
    assert choose_threshold([small, empty]) == (0.7, 1.0)
    assert choose_threshold([empty]) is None
