"""NRRD and MetaImage, by SimpleITK: the extra `itk`."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from resunet_jax.data.readers.disk import DiskArray, temporary_file
from resunet_jax.data.readers.source import Source
from resunet_jax.data.volume import Array, Grid, Scan, is_valid_affine
from resunet_jax.errors import InputError, first_line

SUFFIXES = (".nrrd", ".mha", ".mhd")

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_LARGEST_BYTES = 2**36


@contextlib.contextmanager
def open_itk(source: Source) -> Iterator[Scan]:
    """Opens a .nrrd, .mha or .mhd file; the voxels lie in a temporary file while the scan is open.

    Raises:
      InputError: SimpleITK is not installed, no such file, not three-dimensional, or not one real number per voxel.
    """
    reader, image = _read(source)
    shape = tuple(int(n) for n in reader.GetSize())
    affine = np.eye(4)
    direction = np.array(reader.GetDirection()).reshape(3, 3)
    affine[:3, :3], affine[:3, 3] = direction * np.array(reader.GetSpacing()), reader.GetOrigin()
    if not is_valid_affine(affine):
        raise InputError(f"{source.path}: its axes do not say how it lies in space; export it with valid ones")
    warnings: tuple[str, ...] = ()
    if np.array_equal(affine[:3, :3], np.eye(3)):  # SimpleITK's own, where the header has none
        warnings = (
            "its header says neither voxel size nor orientation, or voxels of 1 mm; check volumes, left and right",
        )
    with temporary_file(image.nbytes, source.path) as file:
        array = DiskArray(file, 0, image.dtype, (shape[0], shape[1], shape[2]))
        array.write(2, 0, image.T)
        del image
        yield Scan(Grid(array.shape, _LPS_TO_RAS @ affine), array.read, array.plane_bytes, warnings=warnings)


def itk_digest(source: Source) -> str:
    """SHA-256 of header and voxels, which may lie in files of their own."""
    _, image = _read(source)
    return hashlib.sha256(source.path.read_bytes() + image.tobytes()).hexdigest()


def _read(source: Source) -> tuple[Any, Array]:
    """The reader, which knows the geometry, and the voxels (slices, rows, columns)."""
    try:
        import SimpleITK as sitk  # noqa: N813, PLC0415 - an extra; its own customary name
    except ImportError as error:
        raise InputError(f'{source.path}: this format needs SimpleITK: pip install "resunet-jax[itk]"') from error
    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(source.path))
    reader.SetImageIO("NrrdImageIO" if source.path.suffix.lower() == ".nrrd" else "MetaImageIO")  # in any case
    try:
        reader.ReadImageInformation()
        _check(source, reader, tuple(int(n) for n in reader.GetSize()))
        return reader, sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        reason = first_line(Exception(str(error).strip().splitlines()[-1]))
        raise InputError(f"{source.path}: cannot be read ({reason}); export it again") from error


def _check(source: Source, reader: Any, shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{source.path}: shape {shape}; expected a volume of three dimensions")
    if reader.GetNumberOfComponents() != 1:
        raise InputError(f"{source.path}: several numbers per voxel; expected one real number")
    if 8 * int(np.prod([float(n) for n in shape])) > _LARGEST_BYTES:
        raise InputError(f"{source.path}: shape {shape} is no scan; export it again")
