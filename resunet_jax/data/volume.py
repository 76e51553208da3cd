"""Geometry and intensity of a scan, whatever file it comes from.

Everywhere inside, a volume is oriented (posterior, left, superior): first index towards the back, second towards the
patient's left, third towards the head, so that `values[..., k]` is an axial slice as radiologists look at it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nibabel.orientations import (
    OrientationError,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
IntensityScale = Literal["hu", "windowed", "assumed"]

HU_WINDOW = (-1250.0, 250.0)
"""The part of the Hounsfield scale that is mapped to [0, 1]; scans in 0..255 are taken to come clipped to it."""

_ORIENTATION = axcodes2ornt(("P", "L", "S"))
_FLAT = 1e-3  # volume of a voxel over that of its spacings; of axes that lie in one plane it is 0
_SHEAR = 1e-3  # cosine between two axes; float32 headers round at 1e-7


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the voxels of a scan lie in space.

    Attributes:
      shape: of the array in the file.
      affine: (4, 4), voxel index to mm.
      header: the file's own header, for a writer of the same format that copies it; None where there is none.
    """

    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]
    header: Any = None

    def to_pls(self, array: Array) -> Array:
        """From the file's axes to (posterior, left, superior); a view."""
        return apply_orientation(array, self._transform)

    def from_pls(self, array: Array) -> Array:
        """From (posterior, left, superior) to the file's axes; the exact inverse of `to_pls`."""
        return apply_orientation(array, ornt_transform(_ORIENTATION, io_orientation(self.affine)))

    @functools.cached_property
    def _transform(self) -> Array:
        return ornt_transform(io_orientation(self.affine), _ORIENTATION)

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

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along (posterior, left, superior), in mm."""
        oriented = self.affine @ inv_ornt_aff(self._transform, self.shape)
        row, column, slice_ = np.linalg.norm(oriented[:3, :3], axis=0)
        return float(row), float(column), float(slice_)

    @property
    def slice_distance_mm(self) -> float:
        """Distance of the planes of neighbouring slices, in mm: less than their spacing where they are sheared."""
        row, column, _ = self.spacing_mm
        return self.voxel_ml * 1000 / (row * column)

    @property
    def is_sheared(self) -> bool:
        """Whether the axes are not at right angles (gantry tilt), so that distances are not spacing times voxels."""
        axes = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return bool(np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel, in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


def is_valid_affine(affine: npt.NDArray[np.float64]) -> bool:
    """Whether a (4, 4) matrix says how three axes lie in space: finite, none of length 0, not all in one plane."""
    try:
        if not np.isfinite(affine).all() or np.isnan(io_orientation(affine)).any():
            return False
    except (OrientationError, np.linalg.LinAlgError):
        return False
    scale = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(scale.all() and abs(np.linalg.det(affine[:3, :3] / scale)) > _FLAT)


def max_corner_distance_mm(grid: Grid, other: Grid) -> float:
    """Largest distance between the same corner of the volume on two grids of one shape, in mm."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in grid.shape], [1], indexing="ij"), axis=-1).reshape(-1, 4)
    apart = corners @ (grid.affine - other.affine).T
    return float(np.linalg.norm(apart[:, :3], axis=-1).max())


@dataclasses.dataclass(frozen=True)
class Volume:
    """A CT scan, or some slices of one, in memory.

    Attributes:
      values: (rows, columns, slices) as in the file, oriented (posterior, left, superior); a number type.
      intensity_scale: "hu" for Hounsfield units, "windowed" for 0..255 over `HU_WINDOW`, "assumed" for 0..255 over a
        window that `parse_assumption` gave.
      grid: of the whole scan.
      stored_window: the values that HU -1250 and 250 are, where they are not those of the intensity scale.
    """

    values: Array
    intensity_scale: IntensityScale
    grid: Grid
    stored_window: tuple[float, float] | None = None

    def normalize_hu(self, k: int, offset: float = 0.0) -> FloatArray:
        """Slice k on the physical scale: HU [-1250, 250] is [0, 1]; `offset` is added, what lies outside is clipped."""
        low, high = self._window
        scaled: FloatArray = (self.values[..., k].astype(np.float32) - np.float32(low)) / np.float32(high - low)
        if offset:
            scaled += np.float32(offset)
        return np.clip(scaled, 0, 1, out=scaled)

    def to_hu(self, offset: float = 0.0) -> FloatArray:
        """All slices in Hounsfield units, float32; `offset` as in `normalize_hu`."""
        low, high = self._window
        scale = (HU_WINDOW[1] - HU_WINDOW[0]) / (high - low)
        shift = HU_WINDOW[0] - low * scale + offset * (HU_WINDOW[1] - HU_WINDOW[0])
        return self.values.astype(np.float32) * np.float32(scale) + np.float32(shift)

    @property
    def _window(self) -> tuple[float, float]:
        """The values that HU -1250 and 250 are."""
        return self.stored_window or (HU_WINDOW if self.intensity_scale == "hu" else (0.0, 255.0))

    def normalize_minmax(self, k: int) -> FloatArray:
        """Slice k with its own minimum as 0 and maximum as 1, as the original did; a constant slice is 0."""
        values = self.values[..., k].astype(np.float32)
        low, high = values.min(), values.max()
        if low == high:
            return np.zeros_like(values)
        return (values - low) / (high - low)

    def sample_slices(self, count: int) -> "Volume":
        """Up to `count` slices, evenly spread, the first and the last among them."""
        return dataclasses.replace(self, values=self.values[..., _sample(self.values.shape[-1], count)])


def hu_to_window(hu: float) -> float:
    """Where a value in HU lies on the scale of `Volume.normalize_hu`."""
    low, high = HU_WINDOW
    return (hu - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class Scan:
    """An open scan, of which any slices can be read.

    Attributes:
      grid: where it lies.
      read: (axis of the file, start, stop) to the values from start to stop along that axis, in the file's axes.
      plane_bytes: size of all values at one index of the last axis, to decide how many to read at a time.
      intensity_scale: see `Volume`; `open_scan` infers it from the values.
      stored_window: see `Volume`.
      notes: what to know about numbers of this scan, in sentences.
      warnings: what is doubtful about where it lies, with its remedy.
    """

    grid: Grid
    read: Callable[[int, int, int], Array]
    plane_bytes: int
    intensity_scale: IntensityScale = "hu"
    stored_window: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def read_slices(self, start: int, stop: int) -> Volume:
        """Slices start to stop, in memory."""
        values = self.grid.to_pls(self.read(*self.grid.file_slices(start, stop)))
        return Volume(values, self.intensity_scale, self.grid, self.stored_window)

    def sample_slices(self, count: int) -> Volume:
        """As `Volume.sample_slices`, in memory."""
        chunks = [self.read_slices(k, k + 1) for k in _sample(self.grid.oriented_shape[-1], count)]
        return dataclasses.replace(chunks[0], values=np.concatenate([chunk.values for chunk in chunks], axis=-1))


def scan_from_array(values: Array, affine: npt.NDArray[np.float64]) -> Scan:
    """A scan in memory: values (x, y, z) and their affine, voxel index to mm, as nibabel has them."""
    first, second, third = values.shape

    def read(axis: int, start: int, stop: int) -> Array:
        return values[(slice(None),) * axis + (slice(start, stop),)]

    return Scan(Grid((first, second, third), np.asarray(affine, np.float64)), read, values[..., 0].nbytes)


def _sample(slices: int, count: int) -> list[int]:
    return sorted({round(k) for k in np.linspace(0, slices - 1, count)})
