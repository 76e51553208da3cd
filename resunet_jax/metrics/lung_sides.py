"""Splits a lung mask without sides into left and right lung."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

_ONE_SIDED = 0.9
_IN_SLICE = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))], axis=-1)

LEFT, RIGHT = 1, 2
"""Labels of the data set's lung masks."""


def split_lungs(mask: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[np.bool_]]:
    """Splits a lung mask by position alone, as one has to with a prediction.

    A sagittal plane is laid through the emptiest columns between the lungs. In each slice, a connected component
    of which nine tenths lie on one side belongs to that side; one that spans both is cut at the plane.

    Args:
      mask: bool (rows, columns, slices), oriented (posterior, left, superior).

    Returns:
      {"left_lung": ..., "right_lung": ...}: the patient's; disjoint, and together the mask.
    """
    plane = _plane(mask.sum(axis=(0, 2)))
    components, count = ndimage.label(mask, structure=_IN_SLICE)
    size = np.bincount(components.ravel(), minlength=count + 1)
    on_left = np.bincount(components[:, plane:].ravel(), minlength=count + 1)
    fraction = on_left / np.maximum(size, 1)
    is_left = np.arange(mask.shape[1])[None, :, None] >= plane
    of_component = fraction[components]
    left = mask & np.where(of_component >= _ONE_SIDED, True, np.where(of_component <= 1 - _ONE_SIDED, False, is_left))
    return {"left_lung": left, "right_lung": mask & ~left}


def _plane(profile: npt.NDArray[np.int_]) -> int:
    """The first column of the left side: middle of the emptiest columns in the middle half of the mask's area."""
    if not profile.any():
        return len(profile) // 2
    cumulative = np.cumsum(profile) / profile.sum()
    start, stop = np.searchsorted(cumulative, (0.25, 0.75))
    middle = profile[start : stop + 1]
    return int(start + np.median(np.flatnonzero(middle == middle.min())))
