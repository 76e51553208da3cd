"""Arrays in files, read and written some planes at a time."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from resunet_jax.data.volume import Array
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import reserve

CHUNK_BYTES = 2**25
"""Of a file, in memory at a time."""


@dataclasses.dataclass(frozen=True)
class DiskArray:
    """An array in a file, its first axis the fastest, read and written some planes at a time.

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
        """Runs of planes of the last axis, by first and number, and their place in the values from start to stop."""
        begin, end = (start, stop) if axis == 2 else (0, self.shape[2])
        step = max(1, CHUNK_BYTES // self.plane_bytes)
        for first in range(begin, end, step):
            planes = min(step, end - first)
            yield first, planes, (slice(None), slice(None), slice(first - begin, first - begin + planes))


@contextlib.contextmanager
def temporary_file(size: int, scan: str | Path) -> Iterator[BinaryIO]:
    """A file of that many bytes, gone afterwards.

    Raises:
      InputError: there is no room for it; names the temporary folder and the scan that it is for.
    """
    try:
        opened = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputError(f"{scan}: no temporary folder can be written ({first_line(error)}); set TMPDIR") from error
    with opened as file:
        try:
            reserve(file, size)
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()}: no room for {size} bytes of {scan} ({first_line(error)}); free it, "
                "or set TMPDIR to another folder"
            ) from error
        yield file


@contextlib.contextmanager
def axis_last(voxels: DiskArray, axis: int, scan: Path) -> Iterator[DiskArray]:
    """A copy, in a temporary file, whose last axis is `axis`, 0 or 1: each slice along it is read for itself.

    The other axes keep their order. Each voxel is read once, and not more than a chunk is in memory.

    Raises:
      InputError: there is no room for it.
    """
    first, second = (voxels.shape[other] for other in range(3) if other != axis)
    copied = DiskArray(voxels.file, 0, voxels.dtype, (first, second, voxels.shape[axis]))
    with temporary_file(copied.plane_bytes * voxels.shape[axis], scan) as file:
        copy = dataclasses.replace(copied, file=file)
        step = max(1, CHUNK_BYTES // voxels.plane_bytes)
        for start in range(0, second, step):  # the last axis of the file is the second of the copy
            values = np.moveaxis(voxels.read(2, start, min(start + step, second)), axis, 2)
            for k in range(values.shape[2]):
                file.seek(k * copy.plane_bytes + start * first * voxels.dtype.itemsize)
                values[..., k].T.tofile(file)
        yield copy
