"""Distances between the surfaces of two masks, in mm."""

import warnings

import numpy as np
import numpy.typing as npt
import surface_distance

SURFACE_METRICS = ("nsd", "hd95_mm")


def surface_metrics(
    predicted: npt.NDArray[np.bool_],
    reference: npt.NDArray[np.bool_],
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float,
) -> dict[str, float]:
    """Normalized surface Dice and 95 % Hausdorff distance of a volume.

    Both empty: neither is defined, and both are NaN. One of them empty: the surface Dice is 0, for none of the surface
    that there is has a counterpart, and the distance, which would be infinite, is NaN.

    Source: Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
    radiotherapy", 2018, by its authors' package.

    Args:
      predicted: bool (rows, columns, slices).
      reference: the same shape.
      spacing_mm: voxel size along each axis.
      tolerance_mm: how far apart two surfaces may lie and still agree.

    Returns:
      "nsd" in [0, 1], and "hd95_mm" ≥ 0: the larger of the two directions' 95th percentiles.
    """
    if not predicted.any() or not reference.any():
        both = not predicted.any() and not reference.any()
        return {"nsd": float("nan") if both else 0.0, "hd95_mm": float("nan")}
    with warnings.catch_warnings():
        # The package imports from places in scipy that will be gone in its version 2, which we do not admit.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message="Please import")
        distances = surface_distance.compute_surface_distances(reference, predicted, spacing_mm)
    return {
        "nsd": float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm)),
        "hd95_mm": float(surface_distance.compute_robust_hausdorff(distances, 95)),
    }
