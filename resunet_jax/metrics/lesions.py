"""Single lesions: found, missed, invented; and how much of the lung is infected, in three groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from resunet_jax.metrics.bounding_box import crop_to

SMALLEST_LESION_ML = 0.1
"""A connected component below it, a sphere of 6 mm in diameter, does not count as a lesion."""

BURDEN_BINS: Mapping[str, tuple[float, float]] = {
    "under 1 %": (0.0, 0.01),
    "1–10 %": (0.01, 0.1),
    "over 10 %": (0.1, 1.01),
}
"""Groups of volumes by lung involvement (fraction), in [low, high)."""

_NEIGHBOURS = np.ones((3, 3, 3), bool)


def lesion_metrics(
    predicted: npt.NDArray[np.bool_], reference: npt.NDArray[np.bool_], voxel_ml: float
) -> dict[str, float]:
    """Lesions are the connected components (26 neighbours) of a mask, from `SMALLEST_LESION_ML` upwards.

    Args:
      predicted: bool (rows, columns, slices).
      reference: the same shape.
      voxel_ml: volume of a voxel, in ml.

    Returns:
      "lesion_recall", the fraction of the reference's lesions of which a voxel was predicted, NaN where it has none;
      "false_positive_lesions", the number of predicted lesions that no voxel of the reference touches.
    """
    found, lesions = _touched(reference, predicted, voxel_ml)
    true, predictions = _touched(predicted, reference, voxel_ml)
    return {
        "lesion_recall": found / lesions if lesions else float("nan"),
        "false_positive_lesions": float(predictions - true),
    }


def _touched(mask: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_], voxel_ml: float) -> tuple[int, int]:
    """How many lesions of a mask the other mask touches, and how many there are."""
    mask, other = crop_to(mask, mask, other)
    components, count = ndimage.label(mask, structure=_NEIGHBOURS)
    # Slice by slice: `bincount` makes a copy of eight bytes per voxel.
    sizes = sum((np.bincount(labels.ravel(), minlength=count + 1) for labels in components), np.zeros(count + 1, int))
    is_lesion = sizes * voxel_ml >= SMALLEST_LESION_ML
    is_lesion[0] = False
    is_touched = np.bincount(components[other & mask], minlength=count + 1) > 0
    return int(np.count_nonzero(is_lesion & is_touched)), int(np.count_nonzero(is_lesion))


def dice_by_burden(volumes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean Dice of the infection by how much of the lung the reference shows infected.

    Args:
      volumes: rows as in `Evaluation.volumes`; those without a reference for lung and infection are left out.

    Returns:
      for each group of `BURDEN_BINS` that has a volume with a defined Dice, "mean" and "volumes".
    """
    rows = [row for row in volumes if row["structure"] == "infection" and not np.isnan(row["dice"])]
    groups = {
        name: [row["dice"] for row in rows if low <= row["reference_lung_involvement"] < high]
        for name, (low, high) in BURDEN_BINS.items()
    }
    return {name: {"mean": float(np.mean(dice)), "volumes": float(len(dice))} for name, dice in groups.items() if dice}
