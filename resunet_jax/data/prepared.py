"""The slice store: each volume read once; cropped, resized slices memory-mapped from disk.

A scan's slices lie in a folder of their own whose name is a digest of everything that made them: the content of its
files, the settings, and the version of this module. The folder appears under that name only when it is whole.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_fill_holes, gaussian_filter1d

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.cases import Case
from resunet_jax.data.roi import Box, body_mask, bounding_box, crop_resize
from resunet_jax.data.volumes import Array, FloatArray, Scan, Volume, hu_to_window, read_mask, read_volume
from resunet_jax.errors import InputError
from resunet_jax.files import make_output_dir, whole_folder
from resunet_jax.progress import progress

_FORMAT = 1  # raise it when the same files and settings would give other slices
_MAX_WORKERS = 4  # each holds a volume in memory
_AIR_HU = -1000.0
_AIR_SLICES = 16  # of a scan are looked at for its air
_LEAST_AIR = 0.01  # of their voxels
_AIR_SMOOTHING = 2.0  # of 255 grey levels: images that were JPEG once have gaps between levels


@dataclasses.dataclass(frozen=True)
class PreparedCase:
    """The slices of one scan, as a model sees them.

    Attributes:
      case: where they come from.
      images: float32 (slices, S, S) in [0, 1].
      boxes: int32 (slices, 4): row, column, height, width of each crop in its slice, in pixels.
      lung: uint8 (slices, S, S), 1 in either lung.
      infection: uint8 (slices, S, S), or None where the case has no infection mask.
    """

    case: Case
    images: FloatArray
    boxes: npt.NDArray[np.int32]
    lung: npt.NDArray[np.uint8]
    infection: npt.NDArray[np.uint8] | None


def body_scale(volume: Volume, k: int, config: PreprocessConfig) -> tuple[FloatArray, float]:
    """Slice k on the scale on which the body is told from air, and the threshold on it."""
    if config.body_thresholds_minmax:
        hu, windowed = config.body_thresholds_minmax
        return volume.minmax(k), hu if volume.encoding == "hu" else windowed
    return volume.window(k), hu_to_window(config.body_threshold_hu)


def slice_box(volume: Volume, k: int, config: PreprocessConfig) -> Box:
    """The body's bounding box in slice k."""
    return bounding_box(body_mask(*body_scale(volume, k, config), config.body_dilation))


def air_level(scan: Scan | Volume, config: PreprocessConfig) -> float | None:
    """Where the air around the patient lies on the scale of `Volume.window`, for a scan in 0..255.

    It is the commonest grey level around the body in some slices.

    Args:
      scan: a whole scan.
      config: tells body from air.

    Returns:
      the level; None where under 1 % of the voxels lie around the body.
    """
    some = scan.spread(_AIR_SLICES)
    counts = np.zeros(round(255 * hu_to_window(config.body_threshold_hu)))
    for k in range(some.values.shape[-1]):
        image = some.window(k)
        around = ~binary_fill_holes(body_mask(*body_scale(some, k, config), config.body_dilation))
        levels = np.rint(255 * image[around & (image > 0)]).astype(int)  # 0 is beyond the field of view
        counts += np.bincount(levels, minlength=256)[: len(counts)]
    if counts.sum() < _LEAST_AIR * some.values.size:
        return None
    return int(gaussian_filter1d(counts, _AIR_SMOOTHING).argmax()) / 255


def air_offset(scan: Scan | Volume, config: PreprocessConfig) -> float:
    """What moves the air around the patient to -1000 HU, when it is added on the scale of `Volume.window`.

    A scan in 0..255 does not say which window it was exported with, and scanners' presets differ by 100 HU, which is
    half of what tells ground glass from healthy lung. Air is at -1000 HU by definition.

    Args:
      scan: a whole scan.
      config: whether to move it.

    Returns:
      the offset; 0 where the normalization is not "air", for a scan in Hounsfield units, and where no air can be seen.
    """
    if config.normalization != "air" or scan.encoding == "hu":
        return 0.0
    level = air_level(scan, config)
    return 0.0 if level is None else hu_to_window(_AIR_HU) - level


def prepare_slice(volume: Volume, k: int, config: PreprocessConfig, offset: float) -> tuple[FloatArray, Box]:
    """Slice k as a model sees it: float32 (S, S) in [0, 1], and where it was cropped; `offset` as in `air_offset`."""
    box = slice_box(volume, k, config)
    values = volume.minmax(k) if config.normalization == "minmax" else volume.window(k, offset)
    return crop_resize(values, box, config.image_size), box


def prepare_volume(
    volume: Volume, config: PreprocessConfig, offset: float | None = None
) -> tuple[FloatArray, npt.NDArray[np.int32]]:
    """All slices of a scan, or of a part of one, as a model sees them.

    Args:
      volume: the slices.
      config: how to prepare them.
      offset: the whole scan's `air_offset`; must be given for a part of a scan, and is found out where it is not.

    Returns:
      float32 (slices, S, S) in [0, 1], and int32 (slices, 4) boxes: row, column, height, width.
    """
    if offset is None:
        offset = air_offset(volume, config)
    prepared = [prepare_slice(volume, k, config, offset) for k in range(volume.values.shape[-1])]
    return np.stack([image for image, _ in prepared]), np.array([box for _, box in prepared], np.int32)


def prepare_mask(mask: Array, boxes: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.uint8]:
    """A mask cropped and resized like its scan, then binarised at one half.

    Args:
      mask: labels (rows, columns, slices); above 0 belongs to the mask.
      boxes: int32 (slices, 4).
      size: S.

    Returns:
      uint8 (slices, S, S), 0 or 1.
    """
    prepared = np.zeros((len(boxes), size, size), np.uint8)
    for k, box in enumerate(boxes):
        if mask[..., k].any():
            prepared[k] = crop_resize(mask[..., k] > 0, Box(*map(int, box)), size) > 0.5
    return prepared


def prepare_cases(cases: Sequence[Case], config: PreprocessConfig, cache_dir: Path) -> list[PreparedCase]:
    """Opens the slices of each case, preparing first what is not in the store.

    Args:
      cases: the scans.
      config: how to prepare them.
      cache_dir: the store; made if need be. It may be deleted at any time between runs.

    Raises:
      InputError: a scan or mask is bad, or the store cannot be written.
    """
    make_output_dir(cache_dir)
    with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as executor:
        try:
            folders = [cache_dir / digest for digest in executor.map(lambda case: _digest(case, config), cases)]
            missing = [(case, folder) for case, folder in zip(cases, folders, strict=True) if not folder.is_dir()]
            if missing:
                with progress("preparing scans", len(missing)) as advance:
                    for case_id in executor.map(lambda pair: _build(pair[0], pair[1], config), missing):
                        advance(case_id)
        finally:
            executor.shutdown(cancel_futures=True)
    return [_open(case, folder) for case, folder in zip(cases, folders, strict=True)]


def _digest(case: Case, config: PreprocessConfig) -> str:
    parts = [json.dumps([_FORMAT, dataclasses.asdict(config)])]
    for path in (case.ct, case.lung_mask, case.infection_mask):
        if path is None:
            parts.append("none")
        else:
            with path.open("rb") as file:
                parts.append(hashlib.file_digest(file, "sha256").hexdigest())
    return f"{case.id}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:24]}"


def _build(case: Case, folder: Path, config: PreprocessConfig) -> str:
    volume = read_volume(case.ct)
    masks = {"lung": case.lung_mask, "infection": case.infection_mask}
    # Masks are read before the slow part, so that a bad one is told at once.
    labels = {name: read_mask(path, case.ct, volume.grid) for name, path in masks.items() if path is not None}
    images, boxes = prepare_volume(volume, config)
    with whole_folder(folder) as partial:
        np.save(partial / "images.npy", images)
        np.save(partial / "boxes.npy", boxes)
        for name, label in labels.items():
            np.save(partial / f"{name}.npy", prepare_mask(label, boxes, config.image_size))
    return case.id


def _open(case: Case, folder: Path) -> PreparedCase:
    try:
        images, boxes, lung = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "boxes", "lung"))
        infection = np.load(folder / "infection.npy", mmap_mode="r") if case.infection_mask else None
        slices = images.shape
        wanted = {np.float32: [images], np.int32: [boxes], np.uint8: [lung] if infection is None else [lung, infection]}
        if any(a.dtype != dtype for dtype, some in wanted.items() for a in some) or images.ndim != 3:
            raise ValueError("arrays of another type")
        if boxes.shape != (slices[0], 4) or any(mask.shape != slices for mask in wanted[np.uint8]):
            raise ValueError("arrays of other shapes")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder}: damaged ({error}); delete this folder, it will be made again") from error
    return PreparedCase(case, images, boxes, lung, infection)
