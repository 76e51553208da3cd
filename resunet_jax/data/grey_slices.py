"""A data set for pretraining, made of slices that have lost their Hounsfield units.

Such slices are stretched over 0..255 each on its own, and mostly equalised (CLAHE): no window turns them back. Where
their lungs are known, two levels are: healthy lung and soft tissue. What is made of them is no CT: a model that is
trained on them is to be fine-tuned on scans in Hounsfield units.
"""

import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_dilation

from resunet_jax.data.cases import identify
from resunet_jax.data.phantom import FOLDERS, write_nifti
from resunet_jax.data.splits import Split, write_split
from resunet_jax.data.volume import Array, FloatArray
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import atomic_dir, require_absent

SPACING_MM = (1.4, 1.4, 5.0)
"""Of a pixel and between slices, where nobody knows."""

_LUNG_HU = -815.0
_SOFT_TISSUE_HU = 55.0
_LOWEST_HU, _HIGHEST_HU = -1250.0, 1000.0
_BODY_LEVEL = 110  # between lung and soft tissue of an equalised slice
_LEAST_CONTRAST = 20  # of these two; less would make noise of the rest
_WALL_PIXELS = 3  # around the lung
_LEAST_HEALTHY = 200  # pixels; where there are fewer, all of the lung is taken

Mask = npt.NDArray[np.bool_]


def estimate_hu(image: npt.NDArray[np.uint8], lung: Mask, infection: Mask) -> FloatArray:
    """Puts the median of the healthy lung of a slice at -815 HU and that of its soft tissue at 55 HU.

    Args:
      image: uint8 (rows, columns), stretched over 0..255.
      lung: of the same shape, with a pixel at least.
      infection: of the same shape.

    Returns:
      float32 of the same shape, in [-1250, 1000].

    Example:
      >>> image = np.full((32, 32), 160, np.uint8)
      >>> image[:16] = 60
      >>> estimate_hu(image, image == 60, image == 0)[[0, 31], 0].tolist()
      [-815.0, 55.0]
    """
    healthy = lung & ~infection
    low = float(np.median(image[healthy if np.count_nonzero(healthy) > _LEAST_HEALTHY else lung]))
    wall = _wall_level(image, lung)
    # A slice that is stretched alone, over its bones, has its soft tissue below that level.
    body = image[(image > (_BODY_LEVEL if wall > _BODY_LEVEL else (low + wall) / 2)) & ~lung]
    contrast = max(float(np.median(body)) - low if body.size else 255 - low, _LEAST_CONTRAST)
    hu = _LUNG_HU + (image.astype(np.float32) - low) * ((_SOFT_TISSUE_HU - _LUNG_HU) / contrast)
    return np.clip(hu, _LOWEST_HU, _HIGHEST_HU)


def import_grey_slices(file: Path, output_dir: Path, flipped: Sequence[str] = ()) -> list[str]:
    """Writes ct_scans/, lung_mask/, infection_mask/ and split.json (all cases train); the folder appears when whole.

    Args:
      file: .npz with "image" uint8 (slices from feet to head, rows from front to back, columns from the patient's right
        to left), "lung" and "infection" of the same shape, or as bits packed along the columns (`np.packbits`), and
        "case" (slices,), the name of each slice's scan.
      output_dir: must not exist.
      flipped: cases whose rows run from back to front.

    Returns:
      the names of the cases.

    Raises:
      InputError: the file is not like that, a slice has no lung or one lighter than the chest wall, or the folder
        exists or cannot be written.
    """
    require_absent(output_dir, "`output_dir`")
    image, lung, infection, case = _read(file)
    names = [str(name) for name in dict.fromkeys(case)]
    _check_names(file, names)
    if unknown := sorted(set(flipped) - set(names)):
        raise InputError(f"`flipped`: {file} has no case {', '.join(unknown)}; it has {', '.join(names)}")
    if empty := [f"{case[k]} ({k})" for k in range(len(image)) if not lung[k].any()]:
        raise InputError(f"{file}: no lung in {', '.join(empty)}; leave these slices out")
    if light := [f"{case[k]} ({k})" for k in range(len(image)) if _is_inverted(image[k], lung[k])]:
        raise InputError(f"{file}: the lung is lighter than the chest wall in {', '.join(light)}; invert them")
    with atomic_dir(output_dir) as partial:
        for folder in FOLDERS[:3]:
            (partial / folder).mkdir()
        for name in names:
            own = np.flatnonzero(case == name)
            hu = np.stack([np.rint(estimate_hu(image[k], lung[k], infection[k])) for k in own])
            arrays: list[Array] = [hu.astype(np.int16), *(mask[own].astype(np.uint8) for mask in (lung, infection))]
            for folder, slices in zip(FOLDERS, arrays, strict=False):
                pls = np.moveaxis(slices[:, ::-1] if name in flipped else slices, 0, -1)
                write_nifti(partial / folder / f"{name}.nii.gz", pls, np.array(SPACING_MM), "LPS")
        write_split(partial / "split.json", Split(train=tuple(names), val=(), test=()))
    return names


def _wall_level(image: npt.NDArray[np.uint8], lung: Mask) -> float:
    """Median of the chest wall, which lies around the lung; infinite where there is none."""
    wall = binary_dilation(lung, iterations=_WALL_PIXELS) & ~lung
    return float(np.median(image[wall])) if wall.any() else math.inf


def _is_inverted(image: npt.NDArray[np.uint8], lung: Mask) -> bool:
    """Whether the chest wall is no lighter than the lung."""
    return bool(_wall_level(image, lung) <= np.median(image[lung]))


def _check_names(file: Path, names: Sequence[str]) -> None:
    """Refuses names that are no file names, or under which `find_cases` would not find their scans."""
    if not names:
        raise InputError(f"{file}: no slice in it")
    if odd := [name for name in names if not re.fullmatch(r"\w[\w.-]*", name) or identify(name)[0] != name]:
        raise InputError(
            f"{file}: case {', '.join(map(repr, odd))}: a name has letters, digits and . _ - alone, no suffix, and "
            "three digits as in coronacases_001"
        )


def _read(file: Path) -> tuple[npt.NDArray[np.uint8], Mask, Mask, npt.NDArray[np.str_]]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            image, case = arrays["image"], arrays["case"]
            masks = {name: arrays[name] for name in ("lung", "infection")}
    except (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{file}: no .npz of image, lung, infection and case ({first_line(error)})") from error
    if image.dtype != np.uint8 or image.ndim != 3 or case.shape != image.shape[:1] or case.dtype.kind != "U":
        raise InputError(
            f"{file}: image is {image.dtype} {image.shape} and case {case.dtype} {case.shape}; they must be uint8 "
            "(slices, rows, columns) and a name for each slice"
        )
    lung, infection = (_unpack(file, name, mask, image.shape) for name, mask in masks.items())
    return image, lung, infection, case


def _unpack(file: Path, name: str, mask: Array, shape: tuple[int, ...]) -> Mask:
    packed = (*shape[:2], -(-shape[2] // 8))
    if mask.dtype == np.uint8 and mask.shape == packed != shape:
        mask = np.unpackbits(mask, axis=-1, count=shape[2])
    if mask.shape != shape or mask.dtype.kind not in "buif":
        raise InputError(f"{file}: {name} is {mask.dtype} {mask.shape}; it must be of the shape of image, or packed")
    if not np.isfinite(mask).all():
        raise InputError(f"{file}: {name} has values that are NaN or infinite; a mask is 0 or 1")
    return np.asarray(mask != 0)
