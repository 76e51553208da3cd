"""Numbers from counts: hard metrics, and the original project's soft ones under their own name."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

COUNTS = ("tp", "fp", "fn", "tn")
HARD_METRICS = ("dice", "iou", "precision", "recall", "specificity", "accuracy")
SOFT_METRICS = ("dice", "precision", "recall", "specificity", "accuracy")
TOLERANCE_MM: Mapping[str, float] = {"lung": 1.0, "infection": 3.0}
"""Of the surface Dice, as in the benchmark of Ma et al., 2021; left and right lung have the lung's."""
_SOFT_EPSILON = 1e-5


def confusion_counts(predicted: Any, reference: Any, axis: tuple[int, ...] | None = None) -> dict[str, Any]:
    """True and false positives ("tp", "fp") and negatives ("fn", "tn"), in voxels; counts add up.

    Args:
      predicted: bool, any shape, NumPy or JAX.
      reference: the same shape and kind.
      axis: to count along; None for all.
    """
    pairs = {
        "tp": predicted & reference,
        "fp": predicted & ~reference,
        "fn": ~predicted & reference,
        "tn": ~(predicted | reference),
    }
    return {name: hits.sum(axis=axis) for name, hits in pairs.items()}


def hard_metrics(counts: Mapping[str, float]) -> dict[str, float]:
    """Dice, IoU, precision, recall, specificity and accuracy from pooled counts, each in [0, 1].

    A metric whose denominator is 0 is undefined, and NaN: precision where nothing is predicted, recall where the
    reference is empty, Dice and IoU where both are, specificity where the reference is everything. Dice and IoU are 0,
    not NaN, where just one of the two is empty.

    Args:
      counts: "tp", "fp", "fn" and "tn", ≥ 0.
    """
    tp, fp, fn, tn = (float(counts[name]) for name in COUNTS)
    values = {**_ratios(tp, fp, fn, tn, epsilon=0.0), "iou": _ratio(tp, tp + fp + fn, 0.0)}
    return {name: values[name] for name in HARD_METRICS}


def empty_masks(counts: Mapping[str, float]) -> str:
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


def _ratio(numerator: float, denominator: float, epsilon: float) -> float:
    denominator += epsilon
    return (numerator + epsilon) / denominator if denominator else float("nan")


def _ratios(tp: float, fp: float, fn: float, tn: float, *, epsilon: float) -> dict[str, float]:
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn, epsilon),
        "precision": _ratio(tp, tp + fp, epsilon),
        "recall": _ratio(tp, tp + fn, epsilon),
        "specificity": _ratio(tn, tn + fp, epsilon),
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn, epsilon),
    }
