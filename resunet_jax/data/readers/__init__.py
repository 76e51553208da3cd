"""File formats: one reader and one row of `READERS` for each; other modules see a `Scan`."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from resunet_jax.data.intensity import FAT_HU, SAMPLED_SLICES, infer_scale, measure_levels, muscle_hu, rescaled_window
from resunet_jax.data.readers import dicom, itk, nifti
from resunet_jax.data.readers.disk import CHUNK_BYTES
from resunet_jax.data.readers.source import Source as Source
from resunet_jax.data.readers.source import by_suffix, file_digest
from resunet_jax.data.volume import HU_WINDOW, Array, Grid, Scan, Volume, max_corner_distance_mm
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import expand_user
from resunet_jax.progress import logger

_RESCALED = "Intensities were off the scale: they are rescaled, air to -1000 HU and muscle to 45 HU."
_NOT_CHECKED = "This model takes any intensity scale: densities are right only for HU, or 0..255 over HU [-1250, 250]."
_ROUNDING = 1e-3  # of labels that were scaled by a slope, as in 1.00001526


class Reader(NamedTuple):
    """A file format.

    Attributes:
      find: the scans of a file or folder, in the order of their names; none where they are of another format.
      open: one of them to a context manager that gives a `Scan`; raises `InputError`.
      digest: the same to a digest of everything that the scan consists of; raises `OSError`.
    """

    find: Callable[[Path], list[Source]]
    open: Callable[[Source], AbstractContextManager[Scan]]
    digest: Callable[[Source], str]


READERS: dict[str, Reader] = {
    "nifti": Reader(by_suffix(nifti.SUFFIXES), nifti.open_nifti, file_digest),
    "dicom": Reader(dicom.find_dicom, dicom.open_dicom, dicom.dicom_digest),
    "itk": Reader(by_suffix(itk.SUFFIXES), itk.open_itk, itk.itk_digest),
}
"""By the name of the format."""


def list_sources(path: Path, readers: Mapping[str, Reader] = READERS) -> list[Source]:
    """The scans of a file or folder, of any format, in the order of their names."""
    found = [source._replace(format=name) for name, reader in readers.items() for source in reader.find(path)]
    return sorted(found, key=lambda source: (source.path, source.name))


def find_sources(path: str | Path, readers: Mapping[str, Reader] = READERS, series: str | None = None) -> list[Source]:
    """As `list_sources`, for scans that are to be segmented.

    Args:
      path: a file or folder.
      readers: the table of formats.
      series: name or UID of the only one that is wanted; None for all.

    Raises:
      InputError: nothing there, no scan in it, no such series, or two scans of one name, in any case.
    """
    path = expand_user(path)
    if path.name in ("", ".."):  # or the masks would have no name
        path = path.resolve()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise InputError(f"{path}: no such file or folder; check the path") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); check the path and its permissions") from error
    sources = list_sources(path, readers)
    below = _below(path)
    if not sources:
        where = f"no scan in it{below}" if path.is_dir() else "not a scan"
        raise InputError(f"{path}: {where}; formats that are read: {', '.join(readers)}; convert it, or check the path")
    if below:
        logger.warning("%s%s", path, below)
    if series is not None:
        names = [source.name for source in sources]
        sources = [source for source in sources if series in (source.name, source.series)]
        if not sources:
            raise InputError(f"{path}: no `series` {series} in it; there are {', '.join(names)}")
    names = [source.name.casefold() for source in sources]  # file names on macOS and Windows ignore case
    for name in names:
        if names.count(name) > 1:
            same = " and ".join(source.path.name for source in sources if source.name.casefold() == name)
            raise InputError(f"{path}: {same} would write the same masks; remove or rename one of them")
    return sources


_SINGLE_FILES = (READERS["nifti"].find, READERS["itk"].find)


def _below(path: Path) -> str:
    """Tells of files in folders below, of formats that are single files: they may be masks, and are not segmented."""
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if Path(folder) != path:
            files += [source.path for name in names for find in _SINGLE_FILES for source in find(Path(folder, name))]
    if not files:
        return ""
    first = min(files).relative_to(path)
    return f": files in folders below it are left out ({len(files)}, as {first}); if they are scans, give that folder"


def digest(scan: Path | Source, readers: Mapping[str, Reader] = READERS) -> str:
    """A digest of everything that a scan or mask consists of.

    Raises:
      InputError: of an unknown format, or it cannot be read.
    """
    reader, source = _resolve(scan, readers)
    try:
        return reader.digest(source)
    except OSError as error:
        raise InputError(f"{source.path}: cannot be read ({first_line(error)}); check the path") from error


def _resolve(scan: str | Path | Source, readers: Mapping[str, Reader]) -> tuple[Reader, Source]:
    """The one scan at a path, and its reader."""
    if isinstance(scan, Source) and scan.format in readers:
        return readers[scan.format], scan
    path = scan.path if isinstance(scan, Source) else expand_user(scan)
    found = [(reader, source) for reader in readers.values() for source in reader.find(path)]
    if isinstance(scan, Source):
        found = [(reader, source) for reader, source in found if source == scan]
    if len(found) != 1:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the path")
        problem = "not a scan" if not found else f"{len(found)} scans in it, where one is expected"
        raise InputError(f"{path}: {problem}; formats that are read: {', '.join(readers)}; convert it first")
    return found[0]


@contextlib.contextmanager
def open_scan(
    scan: str | Path | Source,
    readers: Mapping[str, Reader] = READERS,
    *,
    assumed: tuple[float, float] | None = None,
    physical: bool = True,
) -> Iterator[Scan]:
    """Opens a CT scan and looks at every voxel, a chunk in memory at a time.

    Args:
      scan: a path that holds one scan, or what `find_sources` found.
      readers: the table of formats.
      assumed: from `parse_assumption`, instead of what the values say.
      physical: see `infer_scale`.

    Raises:
      InputError: not such a file, truncated, NaN or infinite voxels, constant, no chest CT, or on an unknown scale.
    """
    reader, source = _resolve(scan, readers)
    with reader.open(source) as opened:
        yield with_intensity_scale(opened, source.path, assumed=assumed, physical=physical)


def with_intensity_scale(
    scan: Scan, path: Path, *, assumed: tuple[float, float] | None = None, physical: bool = True
) -> Scan:
    """A scan as a reader opens it with its intensity scale, after a look at every voxel; `path` is for messages.

    For the other arguments and errors see `open_scan`.
    """
    planes = scan.grid.shape[2]
    step = max(1, CHUNK_BYTES // scan.plane_bytes)
    ranges = [_range(path, scan.read(2, k, min(k + step, planes))) for k in range(0, planes, step)]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low == high:
        raise InputError(f"{path}: every voxel is {low:g}, so this is not a scan; export it again")
    if assumed is not None:
        return dataclasses.replace(
            scan, intensity_scale="hu" if assumed == HU_WINDOW else "assumed", stored_window=assumed
        )
    levels = measure_levels(scan.sample_slices(SAMPLED_SLICES))
    scale = infer_scale(path, levels, (low, high), physical=physical)
    if not physical:
        return dataclasses.replace(scan, intensity_scale=scale, notes=(*scan.notes, _NOT_CHECKED))
    window, muscle = rescaled_window(levels, scale), muscle_hu(levels, scale)
    if muscle is not None and muscle < FAT_HU:
        logger.warning("%s: no tissue brighter than fat (%.0f HU); if the scale is off, use `assumed`", path, muscle)
    notes = scan.notes if window is None else (*scan.notes, _RESCALED)
    return dataclasses.replace(scan, intensity_scale=scale, stored_window=window, notes=notes)


def read_grid(path: Path, readers: Mapping[str, Reader] = READERS) -> Grid:
    """Where a scan lies, without a look at its voxels."""
    reader, source = _resolve(path, readers)
    with reader.open(source) as scan:
        return scan.grid


def read_volume(
    path: Path,
    readers: Mapping[str, Reader] = READERS,
    *,
    assumed: tuple[float, float] | None = None,
    physical: bool = True,
) -> Volume:
    """Reads a CT scan as a whole, and logs its warnings; for arguments and errors see `open_scan`."""
    with open_scan(path, readers, assumed=assumed, physical=physical) as scan:
        for warning in scan.warnings:
            logger.warning("%s: %s", path, warning)
        return scan.read_slices(0, scan.grid.oriented_shape[-1])


def read_mask(
    path: Path, scan: Path, scan_grid: Grid, readers: Mapping[str, Reader] = READERS
) -> npt.NDArray[np.uint8]:
    """Reads a mask's labels, oriented (posterior, left, superior); what is above 0 belongs to the mask.

    Args:
      path: of a known format.
      scan: the scan that it belongs to, for messages.
      scan_grid: its grid.
      readers: the table of formats.

    Returns:
      uint8 labels (rows, columns, slices).

    Raises:
      InputError: unreadable, on another grid than the scan, or labels that are not whole numbers in [0, 255].
    """
    reader, source = _resolve(path, readers)
    with reader.open(source) as mask:
        grid = mask.grid
        if grid.shape != scan_grid.shape:
            raise InputError(f"{path}: shape {grid.shape}, but its scan {scan} has {scan_grid.shape}; use its own mask")
        values = mask.read(2, 0, grid.shape[2])
    low, high = _range(path, values)
    labels = np.rint(values) if values.dtype.kind == "f" else values
    rounding = 0.0 if labels is values else float(np.abs(values - labels).max())
    if low < -_ROUNDING or high > 255 + _ROUNDING or rounding >= _ROUNDING:
        raise InputError(f"{path}: values in [{low:g}, {high:g}]; a mask has whole labels from 0 to 255")
    if max_corner_distance_mm(grid, scan_grid) > 0.5 * min(scan_grid.spacing_mm):
        raise InputError(f"{path}: its affine differs from that of {scan}; export the mask on the scan's grid")
    # By the scan's axes: its own may round differently.
    return scan_grid.to_pls(labels).astype(np.uint8, copy=False)


def _range(path: Path, values: Array) -> tuple[float, float]:
    """Smallest and largest value; refuses NaN and infinity (which either of them would be)."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{path}: NaN or infinite voxels; replace them (air is -1000 HU) and export again")
    return low, high
