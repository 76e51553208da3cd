"""One scan: reading, orientation, intensity scale, and masks written back on its own grid.

Everywhere inside, a volume is oriented (posterior, left, superior): first index towards the back, second towards the
patient's left, third towards the head, so that `values[..., k]` is an axial slice as radiologists look at it.
"""

import contextlib
import dataclasses
import gzip
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import Opener
from nibabel.orientations import (
    OrientationError,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from nibabel.spatialimages import HeaderDataError

from resunet_jax.errors import InputError, first_line
from resunet_jax.files import whole_file
from resunet_jax.progress import logger

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Encoding = Literal["hu", "windowed"]

HU_WINDOW = (-1250.0, 250.0)
"""The part of the Hounsfield scale that is mapped to [0, 1]; scans in 0..255 are taken to come clipped to it."""

_ORIENTATION = axcodes2ornt(("P", "L", "S"))
_MAX_DEFLATE_RATIO = 1032  # gzip cannot shrink more than this (zlib's documentation)
_CHUNK_BYTES = 2**25  # of a file, in memory at a time


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie: enough to write a mask that lies on the scan, bit for bit.

    Attributes:
      header: the NIfTI header of the file.
      shape: of the array in the file.
      affine: (4, 4), voxel index to mm.
    """

    header: Any
    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]

    def orient(self, array: Array) -> Array:
        """From the file's axes to (posterior, left, superior); a view."""
        oriented: Array = apply_orientation(array, self._transform)
        return oriented

    @property
    def _transform(self) -> Array:
        transform: Array = ornt_transform(io_orientation(self.affine), _ORIENTATION)
        return transform

    @property
    def oriented_shape(self) -> tuple[int, int, int]:
        """Of the oriented volume: (rows, columns, slices)."""
        rows, columns, slices = (self.shape[int(np.flatnonzero(self._transform[:, 0] == axis)[0])] for axis in range(3))
        return rows, columns, slices

    def file_slices(self, start: int, stop: int) -> tuple[int, int, int]:
        """Where slices start to stop lie in the file: the axis, and the range along it."""
        axis = int(np.flatnonzero(self._transform[:, 0] == 2)[0])
        if self._transform[axis, 1] < 0:
            start, stop = self.shape[axis] - stop, self.shape[axis] - start
        return axis, start, stop

    def restore(self, array: Array) -> Array:
        """From (posterior, left, superior) to the file's axes; the exact inverse of `orient`."""
        restored: Array = apply_orientation(array, ornt_transform(_ORIENTATION, io_orientation(self.affine)))
        return restored

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along (posterior, left, superior), in mm."""
        oriented = self.affine @ inv_ornt_aff(self._transform, self.shape)
        row, column, slice_ = np.linalg.norm(oriented[:3, :3], axis=0)
        return float(row), float(column), float(slice_)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel, in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


@dataclasses.dataclass(frozen=True)
class Volume:
    """A CT scan, or some slices of one.

    Attributes:
      values: (rows, columns, slices) as in the file, oriented (posterior, left, superior); a number type.
      encoding: "hu" for Hounsfield units, "windowed" for 0..255 over `HU_WINDOW`.
      grid: where the scan lies.
    """

    values: Array
    encoding: Encoding
    grid: Grid

    def window(self, k: int, offset: float = 0.0) -> FloatArray:
        """Slice k on the physical scale: HU [-1250, 250] is [0, 1]; `offset` is added, what lies outside is clipped."""
        low, high = HU_WINDOW if self.encoding == "hu" else (0.0, 255.0)
        scaled: FloatArray = (self.values[..., k].astype(np.float32) - np.float32(low)) / np.float32(high - low)
        if offset:
            scaled += np.float32(offset)
        return np.clip(scaled, 0, 1, out=scaled)

    def spread(self, count: int) -> "Volume":
        """Up to `count` slices, evenly spread, the first and the last among them."""
        return dataclasses.replace(self, values=self.values[..., _spread(self.values.shape[-1], count)])

    def minmax(self, k: int) -> FloatArray:
        """Slice k with its own minimum as 0 and maximum as 1, as the original did; a constant slice is 0."""
        values = self.values[..., k].astype(np.float32)
        low, high = values.min(), values.max()
        if low == high:
            return np.zeros_like(values)
        scaled: FloatArray = (values - low) / (high - low)
        return scaled


def hu_to_window(hu: float) -> float:
    """Where a value in HU lies on the scale of `Volume.window`."""
    low, high = HU_WINDOW
    return (hu - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class Scan:
    """A CT scan on disk, checked, of which any slices can be read; make it with `open_scan`.

    Attributes:
      encoding: see `Volume`.
      grid: see `Volume`.
    """

    encoding: Encoding
    grid: Grid
    _read: Callable[[int, int, int], Array]

    def part(self, start: int, stop: int) -> Volume:
        """Slices start to stop, in memory."""
        return Volume(self.grid.orient(self._read(*self.grid.file_slices(start, stop))), self.encoding, self.grid)

    def spread(self, count: int) -> Volume:
        """As `Volume.spread`, in memory."""
        parts = [self.part(k, k + 1) for k in _spread(self.grid.oriented_shape[-1], count)]
        return Volume(np.concatenate([part.values for part in parts], axis=-1), self.encoding, self.grid)


def _spread(slices: int, count: int) -> list[int]:
    return sorted({round(k) for k in np.linspace(0, slices - 1, count)})


@contextlib.contextmanager
def open_scan(path: Path) -> Iterator[Scan]:
    """Opens a CT scan and looks at every voxel, a part in memory at a time.

    Args:
      path: .nii or .nii.gz, three-dimensional, one number a voxel; the slope and intercept of its header are applied.

    Raises:
      InputError: not such a file, truncated, NaN or infinite voxels, constant, or of an unknown encoding.
    """
    image = _open(path)
    with _voxels(path, image) as voxels:

        def read(axis: int, start: int, stop: int) -> Array:
            return _scaled(voxels.read(axis, start, stop), image)

        planes = max(1, _CHUNK_BYTES // voxels.plane_bytes)
        starts = range(0, image.shape[2], planes)
        ranges = [_range(path, read(2, start, min(start + planes, image.shape[2]))) for start in starts]
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        if low == high:
            raise InputError(f"{path}: every voxel is {low:g}, so this is not a scan; export it again")
        grid = _grid(path, image)
        if image.header["sform_code"] == image.header["qform_code"] == 0:
            logger.warning(
                "%s: its header does not say how it lies in space; taking its axes as %s",
                path,
                "".join(nib.aff2axcodes(grid.affine)),
            )
        yield Scan(_encoding(path, low, high), grid, read)


def read_volume(path: Path) -> Volume:
    """Reads a CT scan whole; for the rest see `open_scan`."""
    with open_scan(path) as scan:
        return scan.part(0, scan.grid.oriented_shape[-1])


def read_mask(path: Path, scan: Path, scan_grid: Grid) -> npt.NDArray[np.uint8]:
    """Reads a mask's labels, oriented (posterior, left, superior); what is above 0 belongs to the mask.

    Args:
      path: .nii or .nii.gz.
      scan: the scan that it belongs to, for messages.
      scan_grid: its grid.

    Returns:
      uint8 labels (rows, columns, slices).

    Raises:
      InputError: unreadable, on another grid than the scan, or labels that are not whole numbers in [0, 255].
    """
    image = _open(path)
    if image.shape != scan_grid.shape:
        raise InputError(f"{path}: shape {image.shape}, but its scan {scan} has {scan_grid.shape}; use its own mask")
    with _voxels(path, image) as voxels:
        values = _scaled(voxels.read(2, 0, image.shape[2]), image)
    low, high = _range(path, values)
    whole = values.dtype.kind != "f" or np.array_equal(values, np.rint(values))
    if low < 0 or high > 255 or not whole:
        raise InputError(f"{path}: values in [{low:g}, {high:g}]; a mask has whole labels from 0 to 255")
    grid = _grid(path, image)
    if displacement_mm(grid, scan_grid) > 0.5 * min(scan_grid.spacing_mm):
        raise InputError(f"{path}: its affine differs from that of {scan}; export the mask on the scan's grid")
    return grid.orient(values).astype(np.uint8)


def write_nifti(path: Path, array: Array, grid: Grid) -> None:
    """Writes an array (rows, columns, slices) whole; for the rest see `nifti_writer`."""
    with nifti_writer(path, array.dtype, grid) as write:
        write(0, array)


@contextlib.contextmanager
def nifti_writer(path: Path, dtype: npt.DTypeLike, grid: Grid) -> Iterator[Callable[[int, Array], None]]:
    """Writes an array on a scan's own grid, some slices at a time, whole or not at all.

    Args:
      path: .nii or .nii.gz; there when the block has ended well.
      dtype: uint8 or float32.
      grid: the scan's; shape, affine and codes of the file become its, bit for bit.

    Yields:
      `write(start, array)`, for (rows, columns, slices) oriented (posterior, left, superior), from slice `start`; what
      is not written is 0.

    Raises:
      InputError: the folder, or the temporary file that holds the array meanwhile, cannot be written.
    """
    header = grid.header.copy()
    header.extensions.clear()
    header.set_data_dtype(dtype)
    header["cal_min"] = header["cal_max"] = header["vox_offset"] = 0
    header.set_slope_inter(1, 0)
    with whole_file(path) as partial, tempfile.TemporaryFile() as file:
        array = _DiskArray(file, 0, header.get_data_dtype(), grid.shape)
        file.truncate(array.plane_bytes * grid.shape[2])

        def write(start: int, values: Array) -> None:
            axis, first, _ = grid.file_slices(start, start + values.shape[-1])
            array.write(axis, first, grid.restore(values))

        yield write
        with Opener(partial, "wb") as target:
            header.write_to(target)
            target.write(bytes(int(header["vox_offset"]) - target.tell()))
            file.seek(0)
            shutil.copyfileobj(file, target, _CHUNK_BYTES)


@dataclasses.dataclass(frozen=True)
class _DiskArray:
    """An array in a file, its first axis the fastest, of which a part is in memory at a time.

    Attributes:
      file: open for reading, and for writing where it is written.
      offset: of the first value, in bytes.
      dtype: of the file.
      shape: three axes.
    """

    file: BinaryIO
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, int, int]

    @property
    def plane_bytes(self) -> int:
        """Of all values at one index of the last axis."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def read(self, axis: int, start: int, stop: int) -> Array:
        """The array from start to stop along an axis."""
        values: Array = np.empty((*self.shape[:axis], stop - start, *self.shape[axis + 1 :]), self.dtype, order="F")
        for first, planes, place in self._pieces(axis, start, stop):
            piece = self._planes(first, planes)
            values[place] = piece if axis == 2 else piece[(slice(None),) * axis + (slice(start, stop),)]
        return values

    def write(self, axis: int, start: int, values: Array) -> None:
        """Overwrites the array from start along an axis."""
        stop = start + values.shape[axis]
        for first, planes, place in self._pieces(axis, start, stop):
            piece = values[place]
            if axis < 2:
                piece, inserted = self._planes(first, planes), piece
                piece[(slice(None),) * axis + (slice(start, stop),)] = inserted
            self.file.seek(self.offset + first * self.plane_bytes)
            np.asarray(piece, self.dtype).T.tofile(self.file)

    def _planes(self, first: int, planes: int) -> Array:
        self.file.seek(self.offset + first * self.plane_bytes)
        values = np.fromfile(self.file, self.dtype, planes * self.shape[0] * self.shape[1])
        return values.reshape((*self.shape[:2], planes), order="F")

    def _pieces(self, axis: int, start: int, stop: int) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """Runs of planes of the last axis, by first and number, and their place in the part from start to stop."""
        begin, end = (start, stop) if axis == 2 else (0, self.shape[2])
        step = max(1, _CHUNK_BYTES // self.plane_bytes)
        for first in range(begin, end, step):
            planes = min(step, end - first)
            yield first, planes, (slice(None), slice(None), slice(first - begin, first - begin + planes))


def _open(path: Path) -> Any:
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: not a .nii or .nii.gz file; convert it to NIfTI first")
    try:
        image = nib.load(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read as NIfTI ({first_line(error)}); export it again") from error
    if not isinstance(image, nib.Nifti1Image | nib.Nifti2Image):
        raise InputError(f"{path}: not a single-file NIfTI image; convert it")
    if len(image.shape) != 3 or min(image.shape) < 1:
        raise InputError(f"{path}: shape {image.shape}; a volume of three dimensions is wanted, split the series first")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path}: voxels of type {image.get_data_dtype()}; one real number a voxel is wanted, not colour"
        )
    return image


@contextlib.contextmanager
def _voxels(path: Path, image: Any) -> Iterator[_DiskArray]:
    """The voxels as stored, all that the header promises; those of a .nii.gz are unpacked to a temporary file."""
    dtype, offset = image.get_data_dtype(), image.dataobj.offset
    needed = offset + int(np.prod(image.shape, dtype=np.float64)) * dtype.itemsize
    zipped = path.name.endswith(".gz")
    if needed > path.stat().st_size * (_MAX_DEFLATE_RATIO if zipped else 1):
        raise InputError(f"{path}: its header promises {needed:,} bytes, so the file is cut off; copy it again")
    if not zipped:
        with path.open("rb") as file:
            yield _DiskArray(file, offset, dtype, image.shape)
        return
    with tempfile.TemporaryFile() as unpacked:
        try:
            with gzip.open(path) as packed:
                while unpacked.tell() < needed and (chunk := packed.read(min(_CHUNK_BYTES, needed - unpacked.tell()))):
                    unpacked.write(chunk)
                packed.read(1)  # checks, where the voxels are the end, that they are what was packed
            unpacked.flush()
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: its voxels cannot be read ({first_line(error)}); copy it again") from error
        if unpacked.tell() < needed:
            raise InputError(f"{path}: its header promises {needed:,} bytes, so the file is cut off; copy it again")
        yield _DiskArray(unpacked, offset, dtype, image.shape)


def _scaled(values: Array, image: Any) -> Array:
    """Slope and intercept of the header applied; integers stay integers where there are none."""
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    if (slope, intercept) == (1, 0):
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        scaled: Array = values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    return scaled


def _range(path: Path, values: Array) -> tuple[float, float]:
    """Smallest and largest value; refuses NaN and infinity (which either of them would be)."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{path}: NaN or infinite voxels; replace them (air is -1000 HU) and export again")
    return low, high


def _encoding(path: Path, low: float, high: float) -> Encoding:
    """Tells Hounsfield units from 0..255 by the range: air, which every chest scan shows, is far below 0 HU."""
    if low <= -200:
        return "hu"
    if low >= 0 and 1 < high <= 255:
        return "windowed"
    raise InputError(
        f"{path}: values in [{low:g}, {high:g}] are neither Hounsfield units (air near -1000) nor 0..255 over "
        "HU [-1250, 250]; set the header's slope and intercept so that they give Hounsfield units"
    )


def _grid(path: Path, image: Any) -> Grid:
    affine = np.asarray(image.affine, dtype=np.float64)
    try:
        orientation = io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    except (OrientationError, np.linalg.LinAlgError):
        orientation = np.full((3, 2), np.nan)
    if np.isnan(orientation).any() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: its affine does not say how the axes lie in space; export it with a valid one")
    return Grid(image.header.copy(), image.shape, affine)


def displacement_mm(grid: Grid, other: Grid) -> float:
    """The farthest that a corner of the volume lies apart on two grids of the same shape, in mm."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in grid.shape], [1], indexing="ij"), axis=-1).reshape(-1, 4)
    apart = corners @ (grid.affine - other.affine).T
    return float(np.linalg.norm(apart[:, :3], axis=-1).max())
