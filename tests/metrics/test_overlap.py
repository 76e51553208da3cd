import math

import jax.numpy as jnp
import numpy as np
import pytest

from resunet_jax.metrics.overlap import confusion_counts, empty_masks, hard_metrics, soft_metrics
from tests.conftest import REFERENCE


def test_counts_against_a_naive_loop(rng: np.random.Generator) -> None:
    predicted, actual = rng.random((2, 3, 4, 5)) > 0.6
    naive = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
    for p, a in zip(predicted.ravel(), actual.ravel(), strict=True):
        naive[("t" if p == a else "f") + ("p" if p else "n")] += 1
    assert confusion_counts(predicted, actual) == naive
    by_slice = confusion_counts(predicted, actual, axis=(0, 1))
    assert {name: counts.sum() for name, counts in by_slice.items()} == naive
    assert by_slice["fp"].tolist() == [(predicted & ~actual)[..., k].sum() for k in range(5)]
    in_jax = confusion_counts(jnp.array(predicted), jnp.array(actual))
    assert {name: int(count) for name, count in in_jax.items()} == naive


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
    assert empty_masks(counts) == empty
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
