"""Left and right lung, told apart in a mask that knows only "lung"."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

_ONE_SIDED = 0.9
_SEARCH = 0.1  # of the body's width, to either side of its middle, where the mediastinum lies
_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)

LEFT, RIGHT = 1, 2
"""Labels of the data set's lung masks."""


def labels_are_exchanged(labels: npt.NDArray[np.uint8]) -> bool:
    """Whether the left lung's label lies to the right of the right lung's.

    Args:
      labels: uint8 (rows, columns, slices), oriented (posterior, left, superior); both labels are in it.
    """
    columns = np.arange(labels.shape[1])
    left, right = (np.average(columns, weights=(labels == side).sum(axis=(0, 2))) for side in (LEFT, RIGHT))
    return bool(left < right)


def split_lungs(mask: npt.NDArray[np.bool_], body_columns: tuple[int, int]) -> dict[str, npt.NDArray[np.bool_]]:
    """Splits a lung mask by position alone, as one has to with a prediction.

    A sagittal plane is laid through the emptiest columns near the middle of the body, which is there also where one
    lung is missing or small. In each slice, a connected component of which nine tenths lie on one side belongs to that
    side as a whole; one that spans both is cut at the plane.

    Args:
      mask: bool (rows, columns, slices), oriented (posterior, left, superior).
      body_columns: first and last column of the body.

    Returns:
      {"left_lung": ..., "right_lung": ...}: the patient's; disjoint, and together the mask.
    """
    left = left_lung(mask, sagittal_plane(mask.sum(axis=(0, 2)), body_columns))
    return {"left_lung": left, "right_lung": mask & ~left}


def left_lung(mask: npt.NDArray[np.bool_], plane: int) -> npt.NDArray[np.bool_]:
    """What of some slices of a lung mask belongs to the left lung.

    Args:
      mask: bool (rows, columns, slices), oriented (posterior, left, superior).
      plane: from `sagittal_plane`.
    """
    left, is_left = np.zeros_like(mask), np.arange(mask.shape[1]) >= plane
    for k in np.flatnonzero(mask.any(axis=(0, 1))):
        one = np.ascontiguousarray(mask[..., k])
        components, count = ndimage.label(one, structure=_EIGHT_NEIGHBOURS)
        size = np.bincount(components.ravel(), minlength=count + 1)
        on_left = np.bincount(components[:, plane:].ravel(), minlength=count + 1)
        share = (on_left / np.maximum(size, 1))[components]
        left[..., k] = one & ((share >= _ONE_SIDED) | (share > 1 - _ONE_SIDED) & is_left)
    return left


def sagittal_plane(profile: npt.NDArray[np.int_], body_columns: tuple[int, int]) -> int:
    """The first column of the left side: middle of the emptiest columns near the middle of the body.

    Args:
      profile: voxels of the lung mask in each column of the whole scan.
      body_columns: first and last column of the body.
    """
    first, last = body_columns
    middle, reach = (first + last + 1) / 2, max(1.0, _SEARCH * (last + 1 - first))
    start, stop = max(0, int(middle - reach)), min(len(profile), int(np.ceil(middle + reach)))
    near = profile[start:stop]
    return int(start + np.median(np.flatnonzero(near == near.min())))
