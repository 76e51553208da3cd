"""Numbers from counts: hard metrics, and the original project's soft ones under their own name."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

COUNTS = ("tp", "fp", "fn", "tn")
HARD_METRICS = ("dice", "precision", "recall", "specificity", "accuracy")
_SOFT_EPSILON = 1e-5


def count(predicted: npt.NDArray[np.bool_], actual: npt.NDArray[np.bool_]) -> dict[str, int]:
    """Voxels that are true and false positives ("tp", "fp") and negatives ("fn", "tn"); counts of parts add up."""
    tp = int(np.count_nonzero(predicted & actual))
    fp = int(np.count_nonzero(predicted)) - tp
    fn = int(np.count_nonzero(actual)) - tp
    return {"tp": tp, "fp": fp, "fn": fn, "tn": predicted.size - tp - fp - fn}


def hard_metrics(counts: Mapping[str, float]) -> dict[str, float]:
    """Dice, precision, recall, specificity and accuracy from pooled counts, each in [0, 1].

    A metric whose denominator is 0 is undefined, and NaN: precision where nothing is predicted, recall where the
    reference is empty, Dice where both are, specificity where the reference is everything. Dice is 0, not NaN, where
    just one of the two is empty.

    Args:
      counts: "tp", "fp", "fn" and "tn", ≥ 0.
    """
    return _ratios(*(float(counts[name]) for name in COUNTS), epsilon=0.0)


def emptiness(counts: Mapping[str, float]) -> str:
    """Which of the two masks is empty: "both", "reference", "prediction" or "neither"."""
    reference, prediction = counts["tp"] + counts["fn"] == 0, counts["tp"] + counts["fp"] == 0
    if reference and prediction:
        return "both"
    return "reference" if reference else "prediction" if prediction else "neither"


def soft_metrics(probability: npt.NDArray[Any], target: npt.NDArray[Any]) -> dict[str, float]:
    """The original project's metrics of one batch: soft counts over all its pixels, 1e-5 added above and below.

    Not comparable with `hard_metrics`: a batch without any target has a Dice near 0 as soon as probabilities are not
    exactly 0, however good the model.

    Args:
      probability: any shape, in [0, 1].
      target: same shape, 0 or 1.
    """
    p, t = np.asarray(probability, np.float64), np.asarray(target, np.float64)
    tp, fp, fn, tn = (float(np.sum(x)) for x in (p * t, p * (1 - t), (1 - p) * t, (1 - p) * (1 - t)))
    return _ratios(tp, fp, fn, tn, epsilon=_SOFT_EPSILON)


def _ratios(tp: float, fp: float, fn: float, tn: float, *, epsilon: float) -> dict[str, float]:
    def ratio(numerator: float, denominator: float) -> float:
        denominator += epsilon
        return (numerator + epsilon) / denominator if denominator else float("nan")

    return {
        "dice": ratio(2 * tp, 2 * tp + fp + fn),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
    }
