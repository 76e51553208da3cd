"""CT series in DICOM: a folder that is searched through, a zip, or a single file; multi-frame too.

Nothing that identifies a patient is read but the pixel data and the geometry; no name, id or date reaches an output.
"""

import contextlib
import functools
import hashlib
import io
import os
import queue
import re
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from resunet_jax.data.readers.decode_worker import Decoder
from resunet_jax.data.readers.disk import DiskArray, temporary_file
from resunet_jax.data.readers.source import Source
from resunet_jax.data.volume import Array, Grid, Scan
from resunet_jax.errors import InputError, first_line
from resunet_jax.progress import logger

DECODERS = {
    "1.2.840.10008.1.2": "",
    "1.2.840.10008.1.2.1": "",
    "1.2.840.10008.1.2.1.99": "",
    "1.2.840.10008.1.2.2": "",
    "1.2.840.10008.1.2.4.57": "gdcm",
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "gdcm",
    "1.2.840.10008.1.2.4.81": "gdcm",
    "1.2.840.10008.1.2.4.90": "gdcm",
    "1.2.840.10008.1.2.4.91": "gdcm",
    "1.2.840.10008.1.2.5": "pydicom",
}
"""Transfer syntaxes that are read, and pydicom's plugin for each, whatever else is installed: uncompressed, deflated,
JPEG lossless, JPEG-LS, JPEG 2000, RLE."""

_SUFFIXES = (".dcm", ".ima", ".dicom")
_PREAMBLE_BYTES = 132  # with the four letters DICM at its end
_EMPTY, _NO_IMAGE, _NO_POSITION = "empty or unreadable", "without an image", "without modality, position or pixels"
_GEOMETRY_TOLERANCE = 1e-3  # of directions, and of pixel spacings in mm, that are taken for the same
_HEADER = [
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "Modality",
    "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence",
    "PixelSpacing",
    "BitsStored",
    "BitsAllocated",
    "PixelRepresentation",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SharedFunctionalGroupsSequence",
    "SliceThickness",
    "SpacingBetweenSlices",
]
_LOCALIZERS = ("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW")
_IN_PLANE_MM, _STEP_TOLERANCE = 0.05, 0.02  # of positions: in mm, or as a fraction of the step, whichever is larger
_LARGEST_SIDE = 8192  # pixels
_MOST_FILES = 100_000
_MAX_RATIO = 1032  # of deflate, see its documentation; a compressed slice of a CT is far below
_LEAST_BYTES = 2**20


class _Slice(NamedTuple):
    """One slice, where it lies and how its values become HU; lengths in mm, in the patient's coordinates of DICOM."""

    member: str
    frame: int
    shape: tuple[int, int]
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    thickness: float
    slope: float
    intercept: float
    stored: tuple[int, int]
    rescaled: tuple[bool, bool]


class _Header(NamedTuple):
    """What is known of one file before its pixels are read; without modality, position or pixels it has no slices."""

    member: str
    series: str
    number: str
    slices: tuple[_Slice, ...]


def find_dicom(path: Path) -> list[Source]:
    """The CT series of a folder, a zip or a file; what is left out is named in the log.

    Raises:
      InputError: a zip that is damaged or hostile.
    """
    container = _Container(path)
    if not container.is_candidate:
        return []
    with container.opened():
        headers = {member: _read_header(container, member) for member in container.members()}
    slices = [header for header in headers.values() if isinstance(header, _Header) and header.slices]
    kinds = dict(_left_out(headers, slices))
    unreadable = [member for member, kind in kinds.items() if kind == "unreadable"]
    left_out = Counter(kind for kind in kinds.values() if kind not in (_EMPTY, "unreadable"))
    if left_out:
        what = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        logger.info("%s: left out: %s", path, what)
    sources = _sources(path, _group_by_series(slices), unreadable)
    sources += [Source(folder, folder.name) for folder in container.closed_folders()]  # its opening says why
    return sources + [source for archive in container.archives() for source in _find_archive(archive)]


def _left_out(headers: Mapping[str, _Header | str], slices: Sequence[_Header]) -> Iterator[tuple[str, str]]:
    """The files that are no slices, and what they are; "unreadable" where one may be a slice of these series.

    An empty file or a stump may, where it is named as they are; one without modality, position or pixels, where its UID
    is that of a series, whole or cut off.
    """
    alike = {_name_kind(header.member) for header in slices}
    uids = {header.series for header in slices}
    for member, header in headers.items():
        if isinstance(header, str):
            may_be_slice = header in (_EMPTY, _NO_IMAGE) and _name_kind(member) in alike
            yield member, "unreadable" if may_be_slice else header
        elif not header.slices:
            is_cut_off = not header.number and any(uid.startswith(header.series) for uid in uids)
            may_be_slice = header.series in uids or is_cut_off
            yield member, "unreadable" if may_be_slice else _NO_POSITION


def _name_kind(member: str) -> tuple[Path, str, bool]:
    """Alike for the slices of a folder, and not for a README or VERSION; a number after a dot is no suffix."""
    path = Path(member)
    suffix = path.suffix.lower()
    return path.parent, "" if suffix[1:].isdigit() else suffix, any(letter.isdigit() for letter in path.name)


def _find_archive(path: Path) -> list[Source]:
    """The series of a zip among other files; of a bad one, a source whose opening says why."""
    try:
        return find_dicom(path)
    except InputError:
        return [Source(path, _stem(path))]


def _sources(path: Path, series: Sequence[Sequence[_Header]], unreadable: Sequence[str]) -> list[Source]:
    """A source for each series; one that has a subfolder to itself lies there, and is named after it."""
    if not series:
        return [Source(path, _stem(path), "", tuple(unreadable))] if unreadable else []
    sources = []
    for name, headers in zip(_names(path, series), series, strict=True):
        # A damaged file may belong to any series of its folder: they are refused, rather than read without it.
        folders = {Path(header.member).parent for header in headers}
        members = sorted([*(h.member for h in headers), *(m for m in unreadable if Path(m).parent in folders)])
        folder = _own_folder(headers, series) if path.is_dir() else ""
        if folder:
            members = [member.removeprefix(f"{folder}/") for member in members]
        # Text in place of a UID may be a name or a birth date, and neither reaches an output.
        uid = headers[0].series if _is_uid(headers[0].series) else ""
        sources.append(Source(path / folder, name, uid, tuple(members)))
    return sources


def _own_folder(headers: Sequence[_Header], series: Sequence[Sequence[_Header]]) -> str:
    """The subfolder that holds all files of this series, and of no other; "" where there is none."""
    folders = {Path(header.member).parent.as_posix() for header in headers}
    folder = next(iter(folders))
    others = [Path(header.member) for other in series if other is not headers for header in other]
    if len(folders) > 1 or folder == "." or any(Path(folder) in member.parents for member in others):
        return ""
    return folder


def dicom_digest(source: Source) -> str:
    """SHA-256 over the content of all files of a series, whatever they are called."""
    container = _Container(source.path)
    with container.opened():
        parts = sorted(hashlib.sha256(container.read(member)).hexdigest() for member in source.members)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@contextlib.contextmanager
def open_dicom(source: Source) -> Iterator[Scan]:
    """Opens a series: values in HU, slices sorted along their normal, the affine from the first to the last position.

    A gantry tilt gives a sheared affine. The voxels lie in a temporary file while the scan is open.

    Raises:
      InputError: a file is damaged, a slice is missing, doubled or at an uneven step, or its transfer syntax is not
        read.
    """
    container = _Container(source.path)
    slices: list[_Slice] = []
    if not source.members:
        container.members()  # says what is wrong with a zip or folder
        raise InputError(f"{source.path}: no CT slices in it; give the folder of one series")
    with container.opened():
        for member in source.members:
            header = _read_header(container, member)
            if isinstance(header, str) or not header.slices:
                why = header if isinstance(header, str) else _NO_POSITION
                raise InputError(f"{container.label(member)}: a damaged DICOM file ({why}); export the series again")
            slices += header.slices
    slices, affine, notes = _arrange(source.path, slices)
    dtype = _value_type(slices)
    rows, columns = slices[0].shape
    shape = (columns, rows, len(slices))
    with temporary_file(int(np.prod(shape)) * dtype.itemsize, source.path) as file:
        array = DiskArray(file, 0, dtype, shape)
        _decode(container, slices, array)
        yield Scan(Grid(shape, affine), array.read, array.plane_bytes, notes=notes)


def series_datasets(source: Source) -> tuple[list[pydicom.Dataset], list[int]]:
    """The files of a series without their pixels, in the order of its slices, and the frame of each slice in its file.

    A multi-frame file is one file, whose frames may lie in another order than the slices.

    Raises:
      InputError: as `open_dicom`.
    """
    container = _Container(source.path)
    with container.opened(), without_warnings():
        headers = [_read_header(container, member) for member in source.members]
        slices = [one for header in headers if isinstance(header, _Header) for one in header.slices]
        arranged = _arrange(source.path, slices)[0]
        members = dict.fromkeys(one.member for one in arranged)
        datasets = [_dataset(container.read(member), stop_before_pixels=True) for member in members]
        return datasets, [one.frame for one in arranged]


class _Container:
    """The files of a folder, of a zip, or one file; a zip is never unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_zip = path.is_file() and path.suffix.lower() == ".zip"
        self._zip: zipfile.ZipFile | None = None

    @property
    def is_candidate(self) -> bool:
        """Whether it may hold DICOM at all."""
        return self.path.is_dir() or self.is_zip or (self.path.is_file() and _looks_like(self.path.name, self._start()))

    def _start(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                return file.read(_PREAMBLE_BYTES)
        except OSError:
            return b""

    def members(self) -> list[str]:
        """Names of the files that look like DICOM, or are too short for that or cannot be read, in order."""
        if self.path.is_file() and not self.is_zip:
            return [self.path.name]
        with self.opened():
            if self._zip is not None:
                names = [info.filename for info in _checked(self.path, self._zip)]
            else:
                paths = [p for p in self._walked[0] if p.is_file() or not p.exists()]  # a dangling link may be a slice
                names = [p.relative_to(self.path).as_posix() for p in sorted(paths)]
            return [name for name in names if self._is_dicom(name)]

    def closed_folders(self) -> list[Path]:
        """The subfolders that cannot be listed."""
        return self._walked[1] if self.path.is_dir() else []

    @functools.cached_property
    def _walked(self) -> tuple[list[Path], list[Path]]:
        """All files of a folder but hidden ones, through links too, and the subfolders that cannot be listed."""
        files: list[Path] = []
        closed: list[Path] = []
        seen = set()

        def refuse(error: OSError) -> None:
            if Path(error.filename) == self.path:
                raise InputError(f"{self.path}: cannot be listed ({first_line(error)}); change its permissions")
            closed.append(Path(error.filename))

        for folder, subfolders, names in os.walk(self.path, onerror=refuse, followlinks=True):
            subfolders.sort()
            if (real := os.path.realpath(folder)) in seen:  # reached by a link too, perhaps in a circle
                subfolders.clear()
                continue
            seen.add(real)
            files += [Path(folder, name) for name in names if not name.startswith(".")]
        return files, closed

    def archives(self) -> list[Path]:
        """The zips of a folder."""
        return sorted(p for p in self.path.glob("*.[zZ][iI][pP]") if p.is_file()) if self.path.is_dir() else []

    def _is_dicom(self, name: str) -> bool:
        if name.lower().endswith((".nii", ".nii.gz", ".zip")) or Path(name).name.upper() == "DICOMDIR":
            return False
        try:
            start = self.read(name, _PREAMBLE_BYTES)
        except InputError:
            return True
        return len(start) < _PREAMBLE_BYTES or _looks_like(name, start)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Around several reads of a zip, which is opened once."""
        if not self.is_zip or self._zip is not None:
            yield
            return
        try:
            self._zip = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: cannot be read as a zip ({first_line(error)}); pack it again") from error
        try:
            yield
        finally:
            self._zip.close()
            self._zip = None

    def read(self, member: str, size: int = -1) -> bytes:
        """The first bytes of a file, by default all.

        Raises:
          InputError: it cannot be read, or is not what the zip says.
        """
        try:
            if not self.is_zip:
                with self._file(member).open("rb") as file:
                    return file.read(size)
            with self.opened():
                assert self._zip is not None
                info = self._zip.getinfo(member)
                with self._zip.open(info) as entry:
                    # One byte more than it says would be a size that lies.
                    content = entry.read(info.file_size + 1 if size < 0 else size)
            if size < 0 and len(content) != info.file_size:
                raise zipfile.BadZipFile("its size is not what the zip says")
            return content
        except InputError:
            raise
        except Exception as error:  # zlib, lzma and zipfile raise what they like at damaged content
            raise InputError(f"{self.label(member)}: cannot be read ({first_line(error)}); export it again") from error

    def _file(self, member: str) -> Path:
        return self.path / member if self.path.is_dir() else self.path

    def label(self, member: str) -> str:
        """For messages."""
        return f"{self.path}: {member}" if self.is_zip else str(self._file(member))


def _looks_like(name: str, start: bytes) -> bool:
    has_suffix = name.lower().endswith(_SUFFIXES) and not Path(name).name.startswith(".")
    return start[128:_PREAMBLE_BYTES] == b"DICM" or has_suffix


def _checked(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files of a zip, after a look at what it says of them.

    Raises:
      InputError: names that lead out of it, links, encryption, or sizes that no compression reaches.
    """
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if len(infos) > _MOST_FILES:
        raise InputError(f"{path}: {len(infos)} files in it, at most {_MOST_FILES} are read; give the folder instead")
    total = path.stat().st_size
    for info in infos:
        pieces = re.split(r"[/\\]", info.filename)
        problem = ""
        if ".." in pieces or info.filename.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", info.filename):
            problem = "its name leads out of the zip"
        elif info.external_attr >> 28 == 0xA:
            problem = "it is a link"
        elif info.flag_bits & 1:
            problem = "it is encrypted"
        elif info.file_size > _LEAST_BYTES + _MAX_RATIO * info.compress_size or info.compress_size > total:
            problem = f"{info.file_size} bytes are not in {info.compress_size} compressed ones"
        if problem:
            raise InputError(f"{path}: {info.filename!r}: {problem}; pack the series again")
    doubled = sorted(name for name, count in Counter(info.filename for info in infos).items() if count > 1)
    if doubled:
        raise InputError(f"{path}: several files named {_some(doubled)}; pack the series again")
    if sum(info.compress_size for info in infos) > total:
        raise InputError(f"{path}: its files overlap; pack the series again")
    return infos


def _dataset(content: bytes, **options: Any) -> pydicom.Dataset:
    """Parses a file; raises whatever pydicom does at damaged ones, and warns of values that we check."""
    dataset = pydicom.dcmread(io.BytesIO(content), force=True, **options)
    list(dataset.iterall())  # values are converted when they are asked for
    return dataset


class _Silence:
    """How many threads want no warnings, and what there was before the first of them."""

    def __init__(self) -> None:
        self.lock, self.wanted, self.before = threading.Lock(), 0, warnings.catch_warnings(action="ignore")


_SILENCE = _Silence()


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """As `warnings.catch_warnings`, which would leave them silenced for good where two threads use it at once."""
    with _SILENCE.lock:
        if not _SILENCE.wanted:
            _SILENCE.before = warnings.catch_warnings(action="ignore")
            _SILENCE.before.__enter__()
        _SILENCE.wanted += 1
    try:
        yield
    finally:
        with _SILENCE.lock:
            _SILENCE.wanted -= 1
            if not _SILENCE.wanted:
                _SILENCE.before.__exit__(None, None, None)


def _read_header(container: _Container, member: str) -> _Header | str:
    """The header of a file, or why it is left out: "unreadable", or a kind of file that is no slice."""
    try:
        content = container.read(member)
    except InputError:
        if container.is_zip:  # which is damaged there
            return "unreadable"
        content = b""
    if len(content) < _PREAMBLE_BYTES and not member.lower().endswith(_SUFFIXES):
        return _EMPTY
    try:
        with without_warnings():
            return _header(member, _dataset(content, stop_before_pixels=True, specific_tags=_HEADER))
    except Exception:  # pydicom has no common base for what a damaged file makes it raise
        return "unreadable"


def _header(member: str, dataset: pydicom.Dataset) -> _Header | str:
    modality = str(dataset.get("Modality", "")).strip()
    values = dataset.get("ImageType") or ()
    kinds = [str(kind).upper() for kind in ([values] if isinstance(values, str) else values)]
    if not modality and "Rows" not in dataset:
        return "unreadable" if member.lower().endswith(_SUFFIXES) else _NO_IMAGE
    is_localizer = any(word in kind for kind in kinds for word in _LOCALIZERS)
    uid = str(dataset.get("SeriesInstanceUID") or "")
    number = dataset.get("SeriesNumber")
    if not modality and uid and not is_localizer:  # a slice, where others of its series are of a CT
        return _Header(member, uid, "" if number is None else str(int(number)), ())
    if modality != "CT":
        return f"of modality {re.sub('[^A-Z]', '', modality)[:4] or 'unknown'}"
    if int(dataset.get("SamplesPerPixel", 1)) != 1:
        return "not monochrome"
    if is_localizer:
        return "localizer"
    has_position = dataset.get("ImagePositionPatient") or dataset.get("PerFrameFunctionalGroupsSequence")
    slices = tuple(_frames(member, dataset)) if "Rows" in dataset and has_position else ()
    return _Header(member, uid, "" if number is None else str(int(number)), slices)


def _frames(member: str, dataset: pydicom.Dataset) -> Iterator[_Slice]:
    """The slices of a file; those of a multi-frame file have their geometry in functional groups."""
    count = int(dataset.get("NumberOfFrames") or 1)
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    if count > 1 and len(groups) != count:
        raise ValueError("frames without positions")
    bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if not 8 <= bits <= 32:
        raise ValueError("bits")
    is_signed = bool(int(dataset.get("PixelRepresentation") or 0))
    stored = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    for frame in range(count):
        own = groups[frame] if groups else pydicom.Dataset()

        def value(group: str, name: str, own: pydicom.Dataset = own) -> Any:
            for place in (own, shared):
                if place.get(group):
                    found = place[group][0].get(name)
                    if found is not None:
                        return found
            return dataset.get(name)

        spacing = tuple(float(x) for x in value("PixelMeasuresSequence", "PixelSpacing"))
        thickness = value("PixelMeasuresSequence", "SliceThickness") or dataset.get("SpacingBetweenSlices") or 0
        slope = value("PixelValueTransformationSequence", "RescaleSlope")
        intercept = value("PixelValueTransformationSequence", "RescaleIntercept")
        one = _Slice(
            member,
            frame,
            (int(dataset.Rows), int(dataset.Columns)),
            tuple(float(x) for x in value("PlanePositionSequence", "ImagePositionPatient")),
            tuple(float(x) for x in value("PlaneOrientationSequence", "ImageOrientationPatient")),
            (spacing[0], spacing[1]),
            float(thickness),
            1.0 if slope is None else float(slope),
            0.0 if intercept is None else float(intercept),
            stored,
            (slope is not None, intercept is not None),
        )
        numbers = (*one.position, *one.orientation, *one.spacing, one.thickness, one.slope, one.intercept)
        is_complete = len(one.position) == 3 and len(one.orientation) == 6 and np.isfinite(numbers).all()
        if (
            not is_complete
            or min(one.spacing) <= 0
            or one.slope == 0
            or not all(0 < n <= _LARGEST_SIDE for n in one.shape)
        ):
            raise ValueError("geometry")
        yield one


def _group_by_series(headers: Sequence[_Header]) -> list[list[_Header]]:
    """Files of one series: of the same UID, and folder where it is not a valid one, whose slices lie alike."""
    places: dict[str, list[list[_Header]]] = {}
    for header in headers:
        where = header.series
        if not _is_uid(where):  # it may be one text for all patients
            # Enhanced files are whole series; two in a folder may only lack UIDs.
            where += f" in {Path(header.member).parent if where or len(header.slices) == 1 else header.member}"
        groups = places.setdefault(where, [])
        group = next((group for group in groups if _lie_alike(group[0].slices[0], header.slices[0])), None)
        if group is None:
            groups.append(group := [])
        group.append(header)
    return [group for groups in places.values() for group in groups]


def _is_uid(text: str) -> bool:
    return "." in text and UID(text, pydicom.config.IGNORE).is_valid


def _lie_alike(one: _Slice, other: _Slice) -> bool:
    """Whether shape, orientation and pixel spacing are the same."""
    geometry, other_geometry = ((*each.orientation, *each.spacing) for each in (one, other))
    return one.shape == other.shape and np.allclose(geometry, other_geometry, rtol=0, atol=_GEOMETRY_TOLERANCE)


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else re.sub(r"(?i)\.(zip|dcm|ima|dicom)$", "", path.name)


def _names(path: Path, series: Sequence[Sequence[_Header]]) -> list[str]:
    """A name for each series: of the path, and where there are several, of its folder or its number."""
    stem = _stem(path.absolute())
    bases = []
    for headers in series:
        folders = {Path(header.member).parent.as_posix() for header in headers}
        bases.append(next(iter(folders)).replace("/", "_") if len(folders) == 1 and folders != {"."} else stem)
    numbered = Counter((base, headers[0].number) for base, headers in zip(bases, series, strict=True))
    names = []
    for base, headers in zip(bases, series, strict=True):
        number = headers[0].number
        if len(series) == 1:
            names.append(base if path.is_dir() else stem)
        elif _own_folder(headers, series):
            names.append(base)
        elif number and numbered[base, number] == 1:
            names.append(f"{base}_series{number}")
        else:
            key = " ".join(sorted(header.member for header in headers)) + headers[0].series
            names.append(f"{base}_series{number}{hashlib.sha256(key.encode()).hexdigest()[:8]}")
    return names


def _arrange(path: Path, slices: Sequence[_Slice]) -> tuple[list[_Slice], npt.NDArray[np.float64], tuple[str, ...]]:
    """Slices from one end to the other, the affine (voxel index to mm, RAS), and what to know about it."""
    first = slices[0]
    for one in slices:
        if not _lie_alike(first, one):
            raise InputError(f"{path}: slices of different shape, orientation or pixel spacing; export each stack")
        if one.rescaled != first.rescaled:
            raise InputError(
                f"{path}: some slices have a RescaleSlope and a RescaleIntercept, others lack one; export it again"
            )
    along_row, along_column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(along_row @ along_column)) > 1e-2:
        raise InputError(f"{path}: ImageOrientationPatient {first.orientation} is no pair of directions; export again")
    normal = np.cross(along_row, along_column)
    ordered = sorted(slices, key=lambda one: float(np.dot(normal, one.position)))
    positions = np.array([one.position for one in ordered])
    notes: list[str] = []
    if len(ordered) == 1:
        if first.thickness <= 0:
            raise InputError(f"{path}: one slice without a SliceThickness, so of unknown volume; export it with one")
        step = normal * first.thickness
        notes.append(f"One slice of {first.thickness:g} mm: volumes are approximate.")
    else:
        _check_steps(path, positions @ normal, positions)
        step = (positions[-1] - positions[0]) / (len(ordered) - 1)
    if np.linalg.norm(np.cross(step, normal)) > 1e-3 * np.linalg.norm(step):
        notes.append("The gantry was tilted: surface distances are undefined.")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_row * first.spacing[1], along_column * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    return ordered, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, tuple(notes)


def _check_steps(path: Path, heights: npt.NDArray[np.float64], positions: npt.NDArray[np.float64]) -> None:
    """Refuses missing or doubled slices and uneven steps, with the positions along the normal, in mm."""
    steps = np.diff(heights)
    usual = float(np.median(steps))
    tolerance = max(_IN_PLANE_MM, _STEP_TOLERANCE * usual)
    pairs = [(f"{low:g}", f"{high:g}", gap) for low, high, gap in zip(heights[:-1], heights[1:], steps, strict=True)]
    doubled = sorted({low for low, _, gap in pairs if gap < _IN_PLANE_MM})
    if doubled:
        raise InputError(f"{path}: several slices at {_some(doubled)} mm: two acquisitions; export one of them alone")
    uneven = [f"{low} and {high}" for low, high, gap in pairs if abs(gap - usual) > tolerance]
    if uneven:
        raise InputError(
            f"{path}: slices lie {usual:g} mm apart, but not between {_some(uneven)} mm: slices are missing, or their "
            "steps are uneven; export the whole series, or resample it"
        )
    line = positions[0] + np.linspace(0, 1, len(positions))[:, None] * (positions[-1] - positions[0])
    worst = int(np.argmax(np.linalg.norm(positions - line, axis=1)))
    if np.linalg.norm(positions[worst] - line[worst]) > max(tolerance, 0.5):
        raise InputError(f"{path}: the slice at {heights[worst]:g} mm lies off the line of the others; export it again")


def _some(values: Sequence[str]) -> str:
    return ", ".join(values[:4]) + (f" and {len(values) - 4} more" if len(values) > 4 else "")


def _value_type(slices: Sequence[_Slice]) -> np.dtype[Any]:
    """The smallest type that holds all values in HU exactly; float32 where they are not whole."""
    is_whole = all(one.slope == int(one.slope) and one.intercept == int(one.intercept) for one in slices)
    ends = [one.slope * end + one.intercept for one in slices for end in one.stored]
    for kind in (np.int16, np.int32):
        if is_whole and np.iinfo(kind).min <= min(ends) and max(ends) <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.float32)


def _decode(container: _Container, slices: Sequence[_Slice], array: DiskArray) -> None:
    """Writes all slices in HU, each file decoded once, two at a time."""
    places: dict[str, list[tuple[int, _Slice]]] = {}
    for place, one in enumerate(slices):
        places.setdefault(one.member, []).append((place, one))

    free: queue.SimpleQueue[Decoder] = queue.SimpleQueue()

    def decode(member: str) -> tuple[str, Array]:
        decoder = free.get()
        try:
            return member, _pixels(container, member, [one for _, one in places[member]], decoder)
        finally:
            free.put(decoder)

    threads = 1 if container.is_zip else 2
    silent, executor = without_warnings(), ThreadPoolExecutor(threads)
    with silent, container.opened(), contextlib.ExitStack() as stack, executor:
        for _ in range(threads):
            decoder = Decoder()
            stack.callback(decoder.close)
            free.put(decoder)
        pending = list(places)
        for start in range(0, len(pending), 8):
            for member, frames in executor.map(decode, pending[start : start + 8]):
                for place, one in places[member]:
                    values = frames[one.frame] * one.slope + one.intercept
                    array.write(2, place, values.T[..., None].astype(array.dtype))


def _pixels(container: _Container, member: str, slices: Sequence[_Slice], decoder: Decoder) -> Array:
    """The stored values of a file, (frames, rows, columns)."""
    label = container.label(member)
    try:
        content = container.read(member)
        dataset = _dataset(content)
        syntax = UID(str(dataset.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2")))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{label}: a damaged DICOM file ({first_line(error)}); export the series again") from error
    if str(syntax) not in DECODERS:
        name = syntax.name if syntax.is_valid else "unknown"
        raise InputError(
            f"{label}: transfer syntax {name} ({str(syntax)[:64]}) is not read, or has too few bits for HU; export the "
            "series uncompressed or as JPEG lossless"
        )
    rows, columns = slices[0].shape
    expected = len(slices) * rows * columns
    if expected > _LEAST_BYTES + _MAX_RATIO * len(content):
        raise InputError(f"{label}: {expected} pixels are not in its {len(content)} bytes; export it again")
    try:
        plugin = DECODERS[str(syntax)]
        is_apart = plugin == "gdcm"
        values = decoder.decode(content) if is_apart else np.asarray(pixel_array(dataset, decoding_plugin=plugin))
    except Exception as error:  # each decoder has its own errors
        raise InputError(
            f"{label}: its pixels cannot be decoded as {syntax.name} ({first_line(error)}); export the series again"
        ) from error
    if values.size != expected or values.dtype.kind not in "iu":
        raise InputError(f"{label}: its pixels are not the {len(slices)} × {rows} × {columns} of its header")
    return values.reshape(len(slices), rows, columns)
