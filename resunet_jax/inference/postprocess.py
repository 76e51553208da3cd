"""From a whole scan's probabilities to its masks: what is removed from them, and the lesions that are added."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from resunet_jax.config import PostprocessConfig
from resunet_jax.data.roi import body_columns
from resunet_jax.data.volume import Array, FloatArray, Grid
from resunet_jax.metrics.lung_sides import left_lung, sagittal_plane

_FINEST = 128  # pixels on a side on which components are labelled: labels take four bytes a pixel
_GATE_MM = 2.0  # largest voxel of the gate, where the scan's are smaller
_ROUNDING_MM2 = 1e-9  # of squared distances: what lies at the radius is within it


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
    components, count, block = _label(mask)
    # Slice by slice: `bincount` makes a copy of eight bytes a pixel.
    sizes = np.zeros(count + 1, np.int64)
    for labels in components:
        sizes += np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    stays = sizes >= min_fraction * sizes.max()
    stays[0] = False
    return mask & stays[components].repeat(block, axis=1).repeat(block, axis=2)


def _label(mask: npt.NDArray[np.bool_], structure: npt.NDArray[np.bool_] | None = None) -> tuple[Array, int, int]:
    """Components on blocks of at most 128 × 128 a slice, of which one is inside where any of its pixels is.

    Returns:
      labels (slices, blocks, blocks), how many there are, and pixels along a side of a block.
    """
    slices, size, _ = mask.shape
    block = max(1, size // _FINEST)
    while size % block:
        block -= 1
    coarse = mask.reshape(slices, size // block, block, size // block, block).any(axis=(2, 4))
    labels, count = ndimage.label(coarse, structure)
    return labels, count, block


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


def gate_infection(
    probabilities: Mapping[str, FloatArray],
    lung_threshold: float,
    boxes: npt.NDArray[np.int32],
    grid: Grid,
    closing_mm: float,
) -> None:
    """Removes, in place, infection that lies outside of the closed lung masks.

    Dense infection is often missed by the lung mask, but lies within the outline of the lung: the gate is the mask of
    each lung, closed in three dimensions, on voxels of up to 2 mm.

    Args:
      probabilities: "lung" and "infection", float32 (slices, S, S) of a whole scan; what is removed becomes 0.
      lung_threshold: a voxel is lung where its probability is above it.
      boxes: (slices, 4), see `prepare_volume`.
      grid: of the scan.
      closing_mm: radius of the closing.
    """
    lung, infection = probabilities["lung"], probabilities["infection"]
    size = lung.shape[1]
    row_step, column_step, slice_step = (max(1, int(_GATE_MM / mm)) for mm in grid.spacing_mm)
    rows, columns = (
        np.arange(0, n, step) for n, step in zip(grid.oriented_shape, (row_step, column_step), strict=False)
    )
    coarse = np.zeros((-(-len(lung) // slice_step), len(rows), len(columns)), bool)
    for k, box in enumerate(boxes):
        mask = lung[k] > lung_threshold
        if mask.any():
            pixels = _model_pixels(rows, box[0], box[2], size), _model_pixels(columns, box[1], box[3], size)
            inside = np.ix_(pixels[0] >= 0, pixels[1] >= 0)
            coarse[k // slice_step][inside] |= mask[np.ix_(*(p[p >= 0] for p in pixels))]
    first, last = body_columns(boxes)
    plane = sagittal_plane(coarse.sum(axis=(0, 1)), (first // column_step, last // column_step))
    top, side = (_span(coarse, axis) for axis in (1, 2))  # what lies around the lungs takes memory
    coarse, plane = coarse[:, top, side].copy(), max(0, plane - side.start)
    left = np.moveaxis(left_lung(np.moveaxis(coarse, 0, -1), plane), -1, 0)
    right = np.logical_xor(coarse, left, out=coarse)
    steps = np.array((slice_step, row_step, column_step))
    spacing = tuple(steps * np.roll(grid.spacing_mm, 1))
    gate = close_mask(left, spacing, closing_mm)
    gate |= close_mask(right, spacing, closing_mm)
    centres = np.arange(size) + 0.5
    for k, box in enumerate(boxes):
        if infection[k].any():
            near = [
                np.clip((first + centres * length / size) // step, span.start, span.stop - 1).astype(int) - span.start
                for first, length, step, span in ((box[0], box[2], row_step, top), (box[1], box[3], column_step, side))
            ]
            infection[k][~(gate[k // slice_step][np.ix_(*near)] | (lung[k] > lung_threshold))] = 0


def _model_pixels(native: npt.NDArray[np.int_], first: int, length: int, size: int) -> npt.NDArray[np.int_]:
    """The model's pixel at each native one, along an axis of a box; -1 outside the box."""
    pixels = np.floor((native - first + 0.5) * size / length).astype(int)
    return np.where((pixels >= 0) & (pixels < size), pixels, -1)


def _span(mask: npt.NDArray[np.bool_], axis: int) -> slice:
    """Where a mask lies along an axis, and one voxel further to either side where there is one."""
    inside = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
    return slice(max(0, inside[0] - 1), min(mask.shape[axis], inside[-1] + 2)) if len(inside) else slice(0, 1)


def remove_low_confidence_lesions(
    infection: FloatArray,
    threshold: float,
    boxes: npt.NDArray[np.int32],
    grid: Grid,
    config: PostprocessConfig,
) -> None:
    """Removes, in place, lesions that are small, or not large and nowhere likely (hysteresis, Canny, 1986).

    Args:
      infection: float32 (slices, S, S) of a whole scan; what is removed becomes 0.
      threshold: a voxel is infected where its probability is above it.
      boxes: (slices, 4), see `prepare_volume`.
      grid: of the scan.
      config: its `min_lesion_ml`, `min_lesion_probability` and `keep_lesion_ml`.
    """
    if not (config.min_lesion_ml or config.min_lesion_probability):
        return
    lesions = _find_lesions(infection, threshold, boxes, grid)
    likely = lesions.highest >= config.min_lesion_probability
    if config.keep_lesion_ml:
        likely |= lesions.ml >= config.keep_lesion_ml
    stays = (lesions.ml >= config.min_lesion_ml) & likely
    stays[0] = True
    for k, labels in lesions.slices():
        infection[k][~stays[labels]] = 0


def add_lesions(
    infection: FloatArray,
    geometric_mean: FloatArray,
    threshold: float,
    boxes: npt.NDArray[np.int32],
    grid: Grid,
    config: PostprocessConfig,
) -> npt.NDArray[np.bool_]:
    """Adds, in place, lesions that both views of a slice show, if the scan is surely infected.

    A scan is where its lesions that reach `min_lesion_probability` have `infected_scan_ml`. Infection is more likely
    beforehand there than in all scans together, so the odds are multiplied (Saerens et al., "Adjusting the outputs of a
    classifier to new a priori probabilities", Neural Computation 14, 2002): of the geometric mean of the views, as most
    of what is false is seen by one of them alone. Lesions that overlap a lesion of the mask are not added.

    Args:
      infection: float32 (slices, S, S) of a whole scan, after `remove_low_confidence_lesions`; an added lesion, and the
        pixels around it, get the probability with those odds, where it is higher.
      geometric_mean: of the views' probabilities, the same shape, 0 where no infection may lie; it is overwritten.
      threshold: a voxel is infected where its probability is above it.
      boxes: (slices, 4), see `prepare_volume`.
      grid: of the scan.
      config: its `min_lesion_ml`, `min_lesion_probability` and those that begin with `infected_scan_`.

    Returns:
      bool (slices, S, S): the added lesions.
    """
    is_added = np.zeros(infection.shape, bool)
    if not config.infected_scan_ml:
        return is_added
    kept = _find_lesions(infection, threshold, boxes, grid)
    if kept.ml[kept.highest >= config.min_lesion_probability].sum() < config.infected_scan_ml:
        return is_added
    for one in geometric_mean:
        inside = config.infected_scan_odds * one
        one[:] = inside / (1 - one + inside)
    lesions = _find_lesions(geometric_mean, threshold, boxes, grid)
    added = (lesions.ml >= config.min_lesion_ml) & (lesions.highest >= config.infected_scan_lesion_probability)
    for k, labels in lesions.slices():
        added[labels[infection[k] > threshold]] = False
    added[0] = False
    for k, labels in lesions.slices():
        is_added[k] = added[labels]
        # The pixels around it are what `Predictor.to_native_grid` interpolates with.
        near = ndimage.binary_dilation(is_added[k], np.ones((3, 3), bool))
        np.maximum(infection[k], geometric_mean[k], out=infection[k], where=near)
    return is_added


class _Lesions(NamedTuple):
    """Connected components (26 neighbours) of a mask, found on blocks, see `_label`; label 0 is the background.

    Attributes:
      mask: bool (slices, S, S).
      labels: of the blocks.
      ml: volume of each.
      highest: probability of each.
    """

    mask: npt.NDArray[np.bool_]
    labels: Array
    ml: npt.NDArray[np.float64]
    highest: FloatArray

    def slices(self) -> Iterator[tuple[int, Array]]:
        """(k, labels of its pixels) of the slices with a lesion."""
        block = self.mask.shape[1] // self.labels.shape[1]
        for k, one in enumerate(self.labels):
            if one.any():
                yield k, np.where(self.mask[k], one.repeat(block, axis=0).repeat(block, axis=1), 0)


def _find_lesions(infection: FloatArray, threshold: float, boxes: npt.NDArray[np.int32], grid: Grid) -> _Lesions:
    """For arguments see `remove_low_confidence_lesions`."""
    mask = infection > threshold
    labels, count, _ = _label(mask, np.ones((3, 3, 3), bool))
    lesions = _Lesions(mask, labels, np.zeros(count + 1), np.zeros(count + 1, np.float32))
    for k, one in lesions.slices():
        inside = one[mask[k]]
        pixel_ml = grid.voxel_ml * float(boxes[k, 2]) * float(boxes[k, 3]) / mask.shape[1] ** 2
        np.add(lesions.ml, pixel_ml * np.bincount(inside, minlength=count + 1), out=lesions.ml)
        np.maximum.at(lesions.highest, inside, infection[k][mask[k]])
    return lesions


def close_mask(mask: npt.NDArray[np.bool_], spacing_mm: tuple[float, ...], radius_mm: float) -> npt.NDArray[np.bool_]:
    """Morphological closing by a ball; distances are in memory for as many slices as the ball is high.

    Args:
      mask: bool (slices, rows, columns).
      spacing_mm: voxel size along each axis.
      radius_mm: of the ball.

    Returns:
      bool, the same shape; the mask is part of it.
    """
    closed = mask.copy()
    if radius_mm <= 0 or not mask.any():
        return closed
    box = tuple(_span(mask, axis) for axis in range(3))
    reach, *margin = int(radius_mm / spacing_mm[0]), *(int(radius_mm / mm) + 1 for mm in spacing_mm[1:])
    padded = (np.pad(one, [(m, m) for m in margin]) for one in mask[box])
    dilated = _dilate(padded, spacing_mm, radius_mm)
    outside = _dilate(map(np.logical_not, dilated), spacing_mm, radius_mm)  # eroded is what is not near the outside
    inner = tuple(slice(m, -m) for m in margin)
    for k, near_outside in enumerate(itertools.islice(outside, 2 * reach, 2 * reach + len(closed[box]))):
        closed[box][k] |= ~near_outside[inner]
    return closed


def _dilate(
    slices: Iterable[npt.NDArray[np.bool_]], spacing_mm: tuple[float, ...], radius_mm: float
) -> Iterator[npt.NDArray[np.bool_]]:
    """Dilates a mask by a ball, slice by slice.

    Args:
      slices: bool (rows, columns), at least one.
      spacing_mm: voxel size along slices, rows, columns.
      radius_mm: of the ball.

    Yields:
      each slice dilated, after as many as the ball reaches below the first, and before as many above the last.
    """
    height, *in_plane = spacing_mm
    reach = int(radius_mm / height)
    limits = [radius_mm**2 - (height * offset) ** 2 + _ROUNDING_MM2 for offset in range(-reach, reach + 1)]
    window: deque[FloatArray | None] = deque(maxlen=len(limits))  # squared distances within slices, in mm²
    for squared in itertools.chain(
        (_squared_distance(one, in_plane) for one in slices), itertools.repeat(None, 2 * reach)
    ):
        window.append(squared)
        near = [one <= limit for one, limit in zip(reversed(window), limits, strict=False) if one is not None]
        yield np.logical_or.reduce(near)


def _squared_distance(mask: npt.NDArray[np.bool_], spacing_mm: Sequence[float]) -> FloatArray:
    """Squared distance of each pixel of a slice to its mask, in mm²; infinite where that is empty."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    return ndimage.distance_transform_edt(~mask, sampling=spacing_mm) ** 2
