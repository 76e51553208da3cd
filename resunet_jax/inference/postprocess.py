"""From the probabilities of a whole scan to its masks: small components of the lung, slices without lung."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from resunet_jax.data.volume import FloatArray

_FINEST = 128  # pixels on a side on which components are labelled: labels take four bytes a pixel


def large_components(mask: npt.NDArray[np.bool_], min_fraction: float) -> npt.NDArray[np.bool_]:
    """The mask without its small components.

    Components are connected by the sides of voxels, within and across slices. Slices of more than 128 pixels are looked
    at in blocks, of which one is inside where any of its pixels is.

    Args:
      mask: bool (slices, S, S).
      min_fraction: size that a component must have to stay, as a fraction of the largest, in [0, 1]; 0 keeps all.

    Returns:
      bool, the same shape; the largest component always stays.
    """
    if min_fraction == 0 or not mask.any():
        return mask
    slices, size, _ = mask.shape
    block = max(1, size // _FINEST)
    while size % block:
        block -= 1
    coarse = mask.reshape(slices, size // block, block, size // block, block).any(axis=(2, 4))
    components, count = ndimage.label(coarse)
    # Slice by slice: `bincount` makes a copy of eight bytes a pixel.
    sizes = np.zeros(count + 1, np.int64)
    for labels in components:
        sizes += np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    stays = sizes >= min_fraction * sizes.max()
    stays[0] = False
    kept: npt.NDArray[np.bool_] = mask & stays[components].repeat(block, axis=1).repeat(block, axis=2)
    return kept


def remove_small_components(
    probabilities: Mapping[str, FloatArray], lung_threshold: float, min_fraction: float
) -> None:
    """Removes, in place, small components of the lung, and the infection in slices where no lung is left.

    Args:
      probabilities: "lung" and perhaps "infection", float32 (slices, S, S) of a whole scan; what is removed becomes 0.
      lung_threshold: a voxel is lung where its probability is above it.
      min_fraction: see `large_components`; 0 removes nothing.
    """
    if not min_fraction:
        return
    lung = probabilities["lung"]
    mask = lung > lung_threshold
    kept = large_components(mask, min_fraction)
    lung[mask & ~kept] = 0
    if "infection" in probabilities:
        probabilities["infection"][~kept.any(axis=(1, 2))] = 0
