"""From a scan's values to the square slices that a model sees."""

import functools

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_fill_holes, gaussian_filter1d

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.intensity import INSIDE_FIELD, measure_levels, sees_air
from resunet_jax.data.roi import Box, body_mask, bounding_box, crop_resize
from resunet_jax.data.volume import Array, FloatArray, Grid, Scan, Volume, hu_to_window

_AIR_HU = -1000.0
_AIR_SLICES = 16  # of a scan are looked at for its air
_LEAST_AIR = 0.01  # of their voxels
_AIR_SMOOTHING = 2.0  # in intensity levels of 255: images that were JPEG once have gaps between levels


def body_scale(volume: Volume, k: int, config: PreprocessConfig) -> tuple[FloatArray, float]:
    """Slice k on the scale on which the body is separated from air, and the threshold on it."""
    if config.body_thresholds_minmax:
        hu, windowed = config.body_thresholds_minmax
        return volume.normalize_minmax(k), hu if volume.intensity_scale == "hu" else windowed
    return volume.normalize_hu(k), hu_to_window(config.body_threshold_hu)


def slice_box(volume: Volume, k: int, config: PreprocessConfig) -> Box:
    """The body's bounding box in slice k."""
    return bounding_box(body_mask(*body_scale(volume, k, config), config.body_dilation))


def air_level(scan: Scan | Volume, config: PreprocessConfig) -> float | None:
    """Where the air around the patient lies on the scale of `Volume.normalize_hu`, for a whole scan in 0..255.

    It is the most frequent level around the body in some slices.

    Returns:
      the level; None where under 1 % of the voxels lie around the body, or what lies there is lung.
    """
    some = scan.sample_slices(_AIR_SLICES)
    if not sees_air(measure_levels(some)):
        return None
    counts = np.zeros(round(255 * hu_to_window(config.body_threshold_hu)))
    total = 0
    for k in range(some.values.shape[-1]):
        image = some.normalize_hu(k)
        around = ~binary_fill_holes(body_mask(*body_scale(some, k, config), config.body_dilation))
        total += int(np.count_nonzero(around))
        levels = np.rint(255 * image[around & (image > 0)]).astype(int)  # 0 is beyond the field of view
        counts += np.bincount(levels, minlength=256)[: len(counts)]
    # Where next to nothing is above 0, it is the table and clothes, and of the air itself nothing can be seen.
    if counts.sum() < max(_LEAST_AIR * some.values.size, INSIDE_FIELD * total):
        return None
    return int(gaussian_filter1d(counts, _AIR_SMOOTHING).argmax()) / 255


def air_offset(scan: Scan | Volume, config: PreprocessConfig) -> float:
    """The offset, on the scale of `Volume.normalize_hu`, that puts the air around the patient at -1000 HU.

    A scan in 0..255 does not say which window it was exported with, and scanners' presets differ by 100 HU, which is
    half of the contrast between ground glass and healthy lung. Air is at -1000 HU by definition. The scan is whole.

    Returns:
      the offset; 0 where the normalization is not "air", for a scan in Hounsfield units or an assumed window, and
      where no air can be seen.
    """
    if config.normalization != "air" or scan.intensity_scale != "windowed":
        return 0.0
    level = air_level(scan, config)
    return 0.0 if level is None else hu_to_window(_AIR_HU) - level


def context_slices(config: PreprocessConfig, grid: Grid) -> int:
    """How many slices away the neighbours lie that a model sees: the nearest to `context_mm`, at least 1; 0 for none.

    Example:
      >>> import numpy as np
      >>> grid = Grid((8, 8, 20), np.diag([-0.7, -0.7, 2.0, 1.0]))
      >>> context_slices(PreprocessConfig(context_mm=5), grid)
      2
    """
    return max(1, round(config.context_mm / grid.spacing_mm[2])) if config.context_mm else 0


def _normalize(volume: Volume, k: int, config: PreprocessConfig, offset: float) -> FloatArray:
    return volume.normalize_minmax(k) if config.normalization == "minmax" else volume.normalize_hu(k, offset)


def prepare_slice(volume: Volume, k: int, config: PreprocessConfig, offset: float) -> FloatArray:
    """Slice k cropped to its box and resized: float32 (S, S) in [0, 1]; see `air_offset`."""
    return crop_resize(_normalize(volume, k, config, offset), slice_box(volume, k, config), config.image_size)


def prepare_volume(
    volume: Volume, config: PreprocessConfig, offset: float | None = None, start: int = 0, stop: int | None = None
) -> tuple[FloatArray, npt.NDArray[np.int32]]:
    """All slices of a scan, or some consecutive ones, as a model sees them.

    Args:
      volume: the slices, and around those asked for as many as `context_slices` says, where the scan has them.
      config: how to prepare them.
      offset: the whole scan's `air_offset`; must be given for some slices of a scan; computed where it is not given.
      start: the first slice asked for.
      stop: the one after the last; None for all that follow.

    Returns:
      float32 (slices, S, S, C) in [0, 1], and int32 (slices, 4) boxes: row, column, height, width. Channels are the
      slice and, with context, those below and above it, cropped alike; beyond the ends the last slice is repeated.
    """
    if offset is None:
        offset = air_offset(volume, config)
    count, step = volume.values.shape[-1], context_slices(config, volume.grid)
    boxes = [slice_box(volume, k, config) for k in range(start, count if stop is None else stop)]
    images = np.empty((len(boxes), config.image_size, config.image_size, config.channels), np.float32)
    # A slice is also the context of two others; between its uses lie `step` slices and their contexts.
    normalized = functools.lru_cache(3 * step + 1)(lambda n: _normalize(volume, n, config, offset))
    for image, (k, box) in zip(images, enumerate(boxes, start), strict=True):
        for channel, n in enumerate(_channel_slices(k, step, count)):
            image[..., channel] = crop_resize(normalized(n), box, config.image_size)
    return images, np.array(boxes, np.int32)


def _channel_slices(k: int, step: int, count: int) -> tuple[int, ...]:
    """The slices that the channels of slice k show."""
    return (k, max(k - step, 0), min(k + step, count - 1)) if step else (k,)


def prepare_mask(mask: Array, boxes: npt.NDArray[np.int32], size: int, step: int = 0) -> npt.NDArray[np.uint8]:
    """A scan's mask, cropped and resized like its slices and their context, then binarised at one half.

    Args:
      mask: labels (rows, columns, slices); above 0 belongs to the mask.
      boxes: int32 (slices, 4).
      size: S.
      step: as `context_slices` has it; 0 for the slices alone.

    Returns:
      uint8 (slices, S, S, C), 0 or 1, with the channels of `prepare_volume`.
    """
    shown = [bool(mask[..., k].any()) for k in range(len(boxes))]
    prepared = np.zeros((len(boxes), size, size, 3 if step else 1), np.uint8)
    for k, box in enumerate(boxes):
        for channel, n in enumerate(_channel_slices(k, step, len(boxes))):
            if shown[n]:
                prepared[k, ..., channel] = crop_resize(mask[..., n] > 0, Box(*map(int, box)), size) > 0.5
    return prepared
