"""How far a pair of models agrees with itself on a scan: test-time augmentation by mirroring and shifting its slices.

A user has no reference. What is known without one is whether a mask stays what it is when nothing that matters changes:
each member segments the scan mirrored or shifted, and the members' masks are compared (Zenk et al., "Comparative
benchmarking of failure detection methods in medical image segmentation", Medical Image Analysis 101, 2025: the mean
pairwise Dice of members is the score to beat). It names masks that are doubtful; errors that all members make it does
not see, and it has no unit.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from resunet_jax.data.volume import FloatArray, Grid
from resunet_jax.inference.predictor import Predictor

UNCERTAINTY_STEPS = 100
"""An uncertainty map is in hundredths of a bit: 0 certain, 100 where inside and outside are equally likely."""

CHUNK_SLICES = 32
"""Of a scan in memory at a time: a scan may have any number of them."""


class Member(NamedTuple):
    """How a member sees prepared slices.

    Attributes:
      is_mirrored: left and right.
      rows: by which it is shifted, in pixels, after mirroring.
      columns: likewise.
    """

    is_mirrored: bool
    rows: int
    columns: int

    def apply(self, slices: FloatArray) -> FloatArray:
        """Slices (n, S, S, C) so seen; what a shift leaves free repeats the edge."""
        return _shift(slices[:, :, ::-1] if self.is_mirrored else slices, self.rows, self.columns)

    def undo(self, slices: FloatArray) -> FloatArray:
        """What the member found, (n, S, S), where it belongs."""
        back = _shift(slices, -self.rows, -self.columns)
        return back[:, :, ::-1] if self.is_mirrored else back


MEMBERS = (Member(False, 0, 0), Member(True, 0, 0), Member(False, 4, 4), Member(True, -4, -4))
"""Four pixels are half of the coarsest cell of the models."""


def _shift(slices: FloatArray, rows: int, columns: int) -> FloatArray:
    size = slices.shape[1]
    down, right = (np.clip(np.arange(size) - step, 0, size - 1) for step in (rows, columns))
    return slices[:, down[:, None], right]


def compare_members(
    predictor: Predictor,
    images: FloatArray,
    boxes: npt.NDArray[np.int32],
    grid: Grid,
    *,
    members: Sequence[Member] = MEMBERS,
    new_array: Callable[[tuple[int, ...]], FloatArray] = lambda shape: np.zeros(shape, np.float32),
    advance: Callable[[str], object] = lambda note: None,
) -> tuple[FloatArray, float]:
    """Runs the members one after another, a chunk of slices at a time, without averaging within one.

    A member has one view of a slice, so it adds no lesions (`infected_scan_ml`).

    Args:
      predictor: with an infection model.
      images: float32 (slices, S, S, C) of a whole scan, prepared.
      boxes: int32 (slices, 4), see `prepare_volume`.
      grid: of the scan.
      members: how each sees the slices.
      new_array: makes an array of zeros, float32; called for each structure and for the mean.
      advance: called after each chunk, as `progress` wants it.

    Returns:
      float32 (slices, S, S), mean of the members' infection probabilities after `postprocess`; and the mean over pairs
      of members of the Dice of their infection masks, on the model grid, NaN where all masks are empty.
    """
    shape = images.shape[:-1]
    found = {structure: new_array(shape) for structure in predictor.structures}
    mean, share = new_array(shape), 1 / len(members)
    chunks = [slice(start, start + CHUNK_SLICES) for start in range(0, len(images), CHUNK_SLICES)]

    def add(probability: FloatArray) -> npt.NDArray[np.uint8]:
        for some in chunks:
            mean[some] += np.float32(share) * probability[some]
        threshold = predictor.threshold("infection")
        return np.stack([np.packbits(one > threshold) for one in probability])

    masks, models = [], predictor.without_averaging
    for member in members:
        for some in chunks:
            for structure, probability in models.slice_probabilities(member.apply(images[some])).items():
                found[structure][some] = member.undo(probability)
            advance("")
        predictor.postprocess(found, boxes, grid)
        masks.append(add(found["infection"]))
    areas = boxes[:, 2].astype(np.float64) * boxes[:, 3]
    return mean, mean_pairwise_dice(masks, areas)


def mean_pairwise_dice(masks: Sequence[npt.NDArray[np.uint8]], areas: npt.NDArray[np.float64]) -> float:
    """Mean Dice over all pairs of masks; NaN where every pair is empty.

    Args:
      masks: each uint8 (slices, bytes), bits of a slice's pixels.
      areas: (slices,) of a pixel, in any unit.
    """

    def size(mask: npt.NDArray[np.uint8]) -> float:
        return float(np.bitwise_count(mask).sum(axis=1, dtype=np.int64) @ areas)

    sizes = [size(mask) for mask in masks]
    dice = [
        2 * size(masks[a] & masks[b]) / (sizes[a] + sizes[b])
        for a, b in itertools.combinations(range(len(masks)), 2)
        if sizes[a] + sizes[b]
    ]
    return sum(dice) / len(dice) if dice else math.nan


def uncertainty_map(probability: FloatArray) -> npt.NDArray[np.uint8]:
    """Binary entropy of a probability in hundredths of a bit, see `UNCERTAINTY_STEPS`.

    Args:
      probability: float32, any shape, in [0, 1].

    Returns:
      uint8, the same shape.

    Example:
      >>> import numpy as np
      >>> uncertainty_map(np.float32([0, 0.11, 0.5, 0.89, 1])).tolist()
      [0, 50, 100, 50, 0]
    """
    p = np.clip(probability, 1e-7, 1 - 1e-7, dtype=np.float32)
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return np.rint(UNCERTAINTY_STEPS * entropy).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class ScanUncertainty:
    """What is kept of a scan's members.

    Attributes:
      members: how many there are.
      pairwise_dice: see `compare_members`.
      packed: for each native slice its map, uint8 (rows, columns), compressed by zlib.
    """

    members: int
    pairwise_dice: float
    packed: list[bytes] = dataclasses.field(default_factory=list)
