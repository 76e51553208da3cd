"""NIfTI, packed or not: scans and masks in, masks out on a scan's own grid, bit for bit."""

import contextlib
import dataclasses
import gzip
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import Opener
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from resunet_jax.data.readers.disk import CHUNK_BYTES, DiskArray, axis_last, temporary_file
from resunet_jax.data.readers.source import Source
from resunet_jax.data.volume import Array, Grid, Scan, is_valid_affine, max_corner_distance_mm
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import atomic_file

SUFFIXES = (".nii", ".nii.gz")

_MM = {1: 1000.0, 3: 0.001}  # by the code of the header's unit of length: metre, micron

_DAMAGED = (ImageFileError, HeaderDataError, WrapStructError, OSError, EOFError, OverflowError, ValueError, zlib.error)
_MAX_DEFLATE_RATIO = 1032  # gzip cannot shrink more than this (zlib's documentation)


@contextlib.contextmanager
def open_nifti(source: Source) -> Iterator[Scan]:
    """Opens a .nii or .nii.gz file; the slope and intercept of its header are applied.

    Raises:
      InputError: no such file, not three-dimensional, not one real number per voxel, truncated, no valid affine.
    """
    path = source.path
    image = _open(path)
    with contextlib.ExitStack() as stack:
        voxels = stack.enter_context(_voxels(path, image))
        grid = _grid(path, image)
        sliced: list[DiskArray] = []  # the same voxels, once slices along another axis than the last are asked for

        def read(axis: int, start: int, stop: int) -> Array:
            if axis == 2 or (start, stop) == (0, grid.shape[axis]):
                return _scaled(voxels.read(axis, start, stop), image)
            if not sliced:
                sliced.append(stack.enter_context(axis_last(voxels, axis, path)))
            return np.moveaxis(_scaled(sliced[0].read(2, start, stop), image), 2, axis)

        yield Scan(grid, read, voxels.plane_bytes, warnings=tuple(text for _, text in header_problems(grid)))


def form_codes(grid: Grid) -> tuple[int, int] | None:
    """Sform and qform code of a scan's header; None for a scan of another format."""
    return None if grid.header is None else (int(grid.header["sform_code"]), int(grid.header["qform_code"]))


def header_problems(grid: Grid) -> Iterator[tuple[str, str]]:
    """What is doubtful in a header, as (kind, problem and remedy)."""
    codes = form_codes(grid)
    if codes == (0, 0):
        axes = "".join(nib.aff2axcodes(grid.affine))
        yield "codes", f"sform and qform code are 0, so left and right are a guess (axes taken as {axes}); set them"
    if codes is not None and all(codes):
        sform, qform = np.asarray(grid.header.get_sform(), np.float64), _qform(grid.header)
        if qform is None:
            yield "affine", "the qform is no rotation; the sform is used, set the qform equal to it"
            return
        if not is_valid_affine(sform):
            yield "affine", "the sform says nothing; the qform is used, set the sform equal to it"
            return
        forms = (_in_mm(form, grid.header) for form in (sform, qform))
        apart = max_corner_distance_mm(*(dataclasses.replace(grid, affine=form) for form in forms))
        if apart > 0.5 * min(grid.spacing_mm):
            yield "affine", f"sform and qform lie {apart:.1f} mm apart; the sform is used, set the qform equal to it"


def _qform(header: Any) -> npt.NDArray[np.float64] | None:
    """None where its quaternion is none of a rotation."""
    try:
        return np.asarray(header.get_qform(), np.float64)
    except (ValueError, HeaderDataError):
        return None


@contextlib.contextmanager
def nifti_writer(path: Path, dtype: npt.DTypeLike, grid: Grid) -> Iterator[Callable[[int, Array], None]]:
    """As `slice_writer`, and the file appears atomically, when the block has ended well."""
    with atomic_file(path) as partial, slice_writer(partial, dtype, grid, path) as write:
        yield write


@contextlib.contextmanager
def slice_writer(path: Path, dtype: npt.DTypeLike, grid: Grid, name: Path) -> Iterator[Callable[[int, Array], None]]:
    """Writes an array on a scan's own grid, some slices at a time.

    Args:
      path: .nii or .nii.gz; written when the block ends well.
      dtype: uint8 or float32.
      grid: the scan's; shape, affine and codes of the file become its, bit for bit.
      name: of the file, for messages.

    Yields:
      `write(start, array)`, for (rows, columns, slices) oriented (posterior, left, superior), from slice `start`; what
      is not written is 0.

    Raises:
      InputError: the temporary file that holds the array meanwhile cannot be written.
      OSError: the file cannot.
    """
    header = _new_header(grid) if grid.header is None else grid.header.copy()
    header.extensions.clear()
    header.set_data_dtype(dtype)
    header["cal_min"] = header["cal_max"] = header["vox_offset"] = 0
    header.set_slope_inter(1, 0)
    size = math.prod(grid.shape) * header.get_data_dtype().itemsize
    with temporary_file(size, name) as file:
        array = DiskArray(file, 0, header.get_data_dtype(), grid.shape)

        def write(start: int, values: Array) -> None:
            axis, first, _ = grid.file_slices(start, start + values.shape[-1])
            array.write(axis, first, grid.from_pls(values))

        yield write
        with Opener(path, "wb") as target:
            header.write_to(target)
            target.write(bytes(int(header["vox_offset"]) - target.tell()))
            file.seek(0)
            shutil.copyfileobj(file, target, CHUNK_BYTES)


def _new_header(grid: Grid) -> Any:
    header = nib.Nifti1Image(np.broadcast_to(np.uint8(0), grid.shape), grid.affine).header
    header.set_xyzt_units("mm")
    return header


def _open(path: Path) -> Any:
    try:
        image = _load(path)
    except _DAMAGED as error:
        raise _unreadable(path, error) from error
    if not isinstance(image, nib.Nifti1Image | nib.Nifti2Image):
        raise InputError(f"{path}: not a single-file NIfTI image; convert it")
    shape = _shape(image)
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{path}: shape {image.shape}; expected a volume of three dimensions; split the series first")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: voxels of {image.get_data_dtype()}; expected one real number per voxel, not colour")
    return image


def _load(path: Path) -> Any:
    """The image, whether or not it is packed as its name says."""
    packed = _is_packed(path)
    if packed == path.name.lower().endswith(".gz"):
        return nib.load(path)
    with gzip.open(path) if packed else path.open("rb") as file:
        kind = nib.Nifti2Image if int.from_bytes(file.read(4), "little") in (540, 0x1C020000) else nib.Nifti1Image
        file.seek(0)
        return kind.from_stream(file)


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _unreadable(path: Path, error: Exception) -> InputError:
    """What hinders reading, with its remedy."""
    if isinstance(error, FileNotFoundError):
        remedy = "its link points to nothing; fetch the file" if path.is_symlink() else "no such file; check the path"
        return InputError(f"{path}: {remedy}")
    if isinstance(error, IsADirectoryError) or path.is_dir():
        return InputError(f"{path}: a folder, where a file is expected; move the scan out of it")
    if isinstance(error, PermissionError):
        return InputError(f"{path}: no permission to read it; change its permissions")
    return InputError(f"{path}: cannot be read as NIfTI ({first_line(error)}); export it again")


def _shape(image: Any) -> tuple[int, ...]:
    """Without further axes of length 1, which some programs write."""
    shape: tuple[int, ...] = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


@contextlib.contextmanager
def _voxels(path: Path, image: Any) -> Iterator[DiskArray]:
    """The voxels as stored, all that the header promises; those of a .nii.gz are unpacked to a temporary file."""
    dtype, offset = image.get_data_dtype(), image.dataobj.offset
    shape: Any = _shape(image)
    needed = offset + int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    zipped = _is_packed(path)
    if needed > path.stat().st_size * (_MAX_DEFLATE_RATIO if zipped else 1):
        raise InputError(f"{path}: its header promises {needed:,} bytes, so the file is cut off; copy it again")
    if not zipped:
        with path.open("rb") as file:
            yield DiskArray(file, offset, dtype, shape)
        return
    with temporary_file(needed, path) as unpacked:
        try:
            with gzip.open(path) as packed:
                while unpacked.tell() < needed and (chunk := packed.read(min(CHUNK_BYTES, needed - unpacked.tell()))):
                    unpacked.write(chunk)
                packed.read(1)  # checks, where the voxels are the end, that they are what was packed
            unpacked.flush()
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: its voxels cannot be read ({first_line(error)}); copy it again") from error
        if unpacked.tell() < needed:
            raise InputError(f"{path}: its header promises {needed:,} bytes, so the file is cut off; copy it again")
        yield DiskArray(unpacked, offset, dtype, shape)


def _scaled(values: Array, image: Any) -> Array:
    """Slope and intercept of the header applied; integers stay integers where there are none."""
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    if (slope, intercept) == (1, 0):
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        scaled: Array = values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    return scaled


def _grid(path: Path, image: Any) -> Grid:
    """In mm, whatever the header's unit; by the qform where the sform is not valid."""
    header = image.header
    affine = np.asarray(image.affine, dtype=np.float64)
    if not is_valid_affine(affine) and int(header["qform_code"]) > 0 and (qform := _qform(header)) is not None:
        affine = qform
    affine = _in_mm(affine, header)
    if not is_valid_affine(affine):
        raise InputError(f"{path}: its affine does not say how the axes lie in space; export it with a valid one")
    first, second, third = _shape(image)
    return Grid((first, second, third), affine, header.copy())


def _in_mm(affine: npt.NDArray[np.float64], header: Any) -> npt.NDArray[np.float64]:
    unit = int(header["xyzt_units"]) % 8  # the rest is the unit of time, which nobody needs and which may be unknown
    return np.diag([*[_MM.get(unit, 1.0)] * 3, 1.0]) @ affine
