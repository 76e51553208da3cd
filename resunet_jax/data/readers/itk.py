"""NRRD and MetaImage, by SimpleITK: the extra `itk`."""

import contextlib
import hashlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resunet_jax.data.readers import itk_worker
from resunet_jax.data.readers.decode_worker import start_watchdog
from resunet_jax.data.readers.disk import CHUNK_BYTES, DiskArray, temporary_file
from resunet_jax.data.readers.source import Source
from resunet_jax.data.volume import Grid, Scan, is_valid_affine
from resunet_jax.errors import InputError

SUFFIXES = (".nrrd", ".mha", ".mhd")

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_LARGEST_BYTES = 2**36
_HEADER_BYTES = 2**16  # at most, before the voxels
_ORIENTATION = re.compile(
    rb"^\s*(space:\s*((left|right)-(anterior|posterior)-superior|[LR][AP]S)\b"
    rb"|(TransformMatrix|Orientation|Rotation)\s*=)",
    re.MULTILINE | re.IGNORECASE,
)
_UNITS = re.compile(rb"^(?:space )?units:(.*)$", re.MULTILINE | re.IGNORECASE)
_GAVE_UP = "SimpleITK gave up on it"
_MM = {b"", b"mm", b"millimeter", b"millimeters"}


class _Image(NamedTuple):
    """What the other process has read; `voxels` is a stream, the first axis fastest."""

    header: dict[str, Any]
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    voxels: IO[bytes]

    @property
    def size_bytes(self) -> int:
        """Of all voxels."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def open_itk(source: Source) -> Iterator[Scan]:
    """Opens a .nrrd, .mha or .mhd file; the voxels lie in a temporary file while the scan is open.

    Raises:
      InputError: SimpleITK is not installed, no such file, not three-dimensional, not in mm, or not one real number per
        voxel.
    """
    with contextlib.ExitStack() as stack:
        with _read(source) as image:
            affine = _affine(source, image.header)
            warnings = _warnings(source, affine)
            file = stack.enter_context(temporary_file(image.size_bytes, source.path))
            file.seek(0)
            for chunk in _chunks(source, image):
                file.write(chunk)
            file.flush()
        array = DiskArray(file, 0, image.dtype, image.shape)
        yield Scan(Grid(array.shape, _LPS_TO_RAS @ affine), array.read, array.plane_bytes, warnings=warnings)


def itk_digest(source: Source) -> str:
    """SHA-256 of header and voxels, which may lie in files of their own."""
    digest = hashlib.sha256(source.path.read_bytes())
    with _read(source) as image:
        for chunk in _chunks(source, image):
            digest.update(chunk)
    return digest.hexdigest()


def _affine(source: Source, header: dict[str, Any]) -> npt.NDArray[np.float64]:
    """From voxel indices to mm to the left, back and head."""
    affine = np.eye(4)
    direction = np.array(header["direction"]).reshape(3, 3)
    affine[:3, :3], affine[:3, 3] = direction * np.array(header["spacing"]), header["origin"]
    if not is_valid_affine(affine):
        raise InputError(f"{source.path}: its axes do not say how it lies in space; export it with valid ones")
    return affine


def _warnings(source: Source, affine: npt.NDArray[np.float64]) -> tuple[str, ...]:
    """Of a header that does not say how the scan lies; SimpleITK then takes a guess."""
    with source.path.open("rb") as file:
        text = file.read(_HEADER_BYTES)
    if (units := _UNITS.search(text)) and set(re.findall(rb'"([^"]*)"', units[1].lower())) - _MM:
        found = units[1].decode(errors="replace").strip()[:100]
        raise InputError(f"{source.path}: its units are {found}; export it in mm")
    if np.array_equal(affine[:3, :3], np.eye(3)):
        return ("its header says neither voxel size nor orientation, or voxels of 1 mm; check volumes, left and right",)
    if not _ORIENTATION.search(text):
        return ("its header does not say how the axes lie, so left and right are a guess; check them",)
    return ()


@contextlib.contextmanager
def _read(source: Source) -> Iterator[_Image]:
    """What the process has read, which ends afterwards.

    Raises:
      InputError: see `open_itk`.
    """
    path = source.path
    if importlib.util.find_spec("SimpleITK") is None:
        raise InputError(f'{path}: this format needs SimpleITK: pip install "resunet-jax[itk]"')
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: the name is not UTF-8, which SimpleITK needs; rename it") from error
    image_io = "NrrdImageIO" if path.suffix.lower() == ".nrrd" else "MetaImageIO"  # in any case
    with subprocess.Popen(
        [sys.executable, "-P", itk_worker.__file__, str(path), image_io],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin
        assert process.stdout
        watchdog = start_watchdog(process, path.stat().st_size)
        try:
            header = _answer(source, process.stdout)
            shape = _checked_shape(source, header)
            with contextlib.suppress(OSError):  # it has crashed, and gives no answer
                process.stdin.write(b"\n")  # go on
                process.stdin.close()
            dtype = np.dtype(_answer(source, process.stdout)["dtype"])
            watchdog.cancel()
            yield _Image(header, shape, dtype, process.stdout)
        finally:
            watchdog.cancel()
            process.kill()


def _answer(source: Source, stream: IO[bytes]) -> dict[str, Any]:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise _unreadable(source, _GAVE_UP)
    values: dict[str, Any] = json.loads(line)
    if "error" in values:
        # MetaImage gives the last error of the system, where there was none.
        raise _unreadable(source, "damaged or cut off" if values["error"] == "Reason: Success" else values["error"])
    return values


def _unreadable(source: Source, reason: str) -> InputError:
    return InputError(f"{source.path}: cannot be read ({reason}); export it again, under a plain name")


def _checked_shape(source: Source, header: dict[str, Any]) -> tuple[int, int, int]:
    shape = tuple(header["size"])
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{source.path}: shape {shape}; expected a volume of three dimensions")
    if header["numberofcomponents"] != 1:
        raise InputError(f"{source.path}: several numbers per voxel; expected one real number")
    if 8 * math.prod(shape) > _LARGEST_BYTES:
        raise InputError(f"{source.path}: shape {shape} is no scan; export it again")
    return shape


def _chunks(source: Source, image: _Image) -> Iterator[bytes]:
    """All voxels, some at a time."""
    left = image.size_bytes
    while left:
        chunk = image.voxels.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise _unreadable(source, _GAVE_UP)
        left -= len(chunk)
        yield chunk
