"""Masks cut to what they show, so that time and memory follow the structure and not the scan."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt


def crop_to(mask: npt.NDArray[np.bool_], *arrays: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Views of arrays of the mask's shape, within its bounding box; of an empty mask, without any voxel."""
    box = []
    for axis in range(mask.ndim):
        along = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(along[0], along[-1] + 1) if along.size else slice(0, 0))
    return (array[tuple(box)] for array in arrays)
