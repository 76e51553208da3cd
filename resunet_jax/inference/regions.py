"""The large connected regions of a mask: the lungs, without gas in the bowel or air beside the body."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

_FINEST = 128  # pixels on a side on which regions are looked for: labels take four bytes a pixel


def large_regions(mask: npt.NDArray[np.bool_], smallest: float) -> npt.NDArray[np.bool_]:
    """The mask without its small regions.

    Regions are connected by the sides of voxels, within and across slices. Slices of more than 128 pixels are looked at
    in blocks, of which one is inside where any of its pixels is.

    Args:
      mask: bool (slices, S, S).
      smallest: part of the largest region that another one must have to stay, in [0, 1]; 0 keeps everything.

    Returns:
      bool, the same shape; the largest region always stays.
    """
    if smallest == 0 or not mask.any():
        return mask
    slices, size, _ = mask.shape
    block = max(1, size // _FINEST)
    while size % block:
        block -= 1
    coarse = mask.reshape(slices, size // block, block, size // block, block).any(axis=(2, 4))
    regions, count = ndimage.label(coarse)
    # Slice by slice: `bincount` makes a copy of eight bytes a pixel.
    sizes = np.zeros(count + 1, np.int64)
    for labels in regions:
        sizes += np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    stays = sizes >= smallest * sizes.max()
    stays[0] = False
    kept: npt.NDArray[np.bool_] = mask & stays[regions].repeat(block, axis=1).repeat(block, axis=2)
    return kept
