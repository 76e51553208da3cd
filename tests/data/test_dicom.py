"""DICOM series: the same voxels and affine as NIfTI, whatever they are wrapped in; and every bad one named."""

import contextlib
import copy
import gc
import io
import logging
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids

from resunet_jax.data.readers import READERS, decode_worker, digest, find_sources, list_sources, open_scan
from resunet_jax.data.readers.dicom import series_datasets
from resunet_jax.data.readers.source import Source
from resunet_jax.data.volume import Grid
from resunet_jax.errors import InputError
from tests.conftest import ROOT
from tests.dicom_files import PATIENT, compress, pack, write_multiframe, write_series

REAL = ROOT.parent / "shared" / "data" / "dicom"
SHAPE = (40, 36, 6)


@pytest.fixture
def hu(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-1024, 1500, SHAPE)


def read(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Values (columns, rows, slices) and affine."""
    with READERS["dicom"].open(source) as scan:
        return scan.read(2, 0, scan.grid.shape[2]), scan.grid.affine


def expected_affine(step: Any = (0.0, 0.0, 5.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = (-0.7, 0, 0), (0, -0.8, 0), np.array(step) * (-1, -1, 1)
    affine[:3, 3] = (20, 30, 100)
    return affine


def check(source: Source, hu: np.ndarray, step: Any = (0.0, 0.0, 5.0)) -> None:
    values, affine = read(source)
    np.testing.assert_array_equal(values, hu.swapaxes(0, 1))
    np.testing.assert_allclose(affine, expected_affine(step), atol=1e-9)


def test_slices_are_sorted_by_position_whatever_their_names(hu: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "scan", hu)
    (source,) = find_sources(tmp_path / "scan")
    assert (source.name, source.format) == ("scan", "dicom")
    check(source, hu)
    with READERS["dicom"].open(source) as scan:
        assert scan.notes == ()
        for axis in range(3):
            np.testing.assert_array_equal(scan.read(axis, 2, 4), hu.swapaxes(0, 1).take(range(2, 4), axis))


@pytest.mark.parametrize("step", [(0.0, 0.0, -5.0), (0.0, 1.3, 5.0), (0.0, 0.0, 0.625)])
def test_steps_downwards_and_gantry_tilt(hu: np.ndarray, tmp_path: Path, step: tuple[float, ...]) -> None:
    write_series(tmp_path / "scan", hu, step=step)
    (source,) = find_sources(tmp_path / "scan")
    values, affine = read(source)
    if step[2] > 0:
        check(source, hu, step)
    else:  # from the lowest to the highest
        np.testing.assert_array_equal(values, hu.swapaxes(0, 1)[..., ::-1])
        np.testing.assert_allclose(affine[:3, 2], (0, 0, 5))
    with READERS["dicom"].open(source) as scan:
        assert scan.grid.is_sheared == bool(step[1])
        assert any("tilted" in note for note in scan.notes) == bool(step[1])


@pytest.mark.parametrize(
    "syntax",
    [
        uids.ImplicitVRLittleEndian,
        uids.ExplicitVRBigEndian,
        uids.DeflatedExplicitVRLittleEndian,
        uids.RLELossless,
        uids.JPEG2000Lossless,
        uids.JPEGLSLossless,
    ],
)
def test_transfer_syntaxes(hu: np.ndarray, tmp_path: Path, syntax: str) -> None:
    for path in write_series(tmp_path / "scan", hu):
        compress(path, syntax)
    check(find_sources(tmp_path / "scan")[0], hu)


def test_slope_and_intercept_are_those_of_each_slice(hu: np.ndarray, tmp_path: Path) -> None:
    def change(dataset: pydicom.Dataset, k: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = (0.5 if k == 1 else 1), -1024 - k

    write_series(tmp_path / "scan", hu, change=change)
    values, _ = read(find_sources(tmp_path / "scan")[0])
    stored = (hu + 1024).swapaxes(0, 1)
    for k in range(SHAPE[-1]):
        np.testing.assert_array_equal(values[..., k], stored[..., k] * (0.5 if k == 1 else 1) - 1024 - k)


def test_multiframe_zip_and_single_file(hu: np.ndarray, tmp_path: Path) -> None:
    write_multiframe(tmp_path / "frames.dcm", hu)
    check(find_sources(tmp_path / "frames.dcm")[0], hu)
    write_series(tmp_path / "scan", hu)
    archive = pack(tmp_path / "scan", tmp_path / "packed.ZIP")
    (source,) = find_sources(archive)
    assert source.name == "packed"
    check(source, hu)
    assert digest(source) == digest(find_sources(tmp_path / "scan")[0])  # content, not names
    one = write_series(tmp_path / "one", hu[..., :1])[0]
    (alone,) = find_sources(one)
    with READERS["dicom"].open(alone) as scan:
        assert scan.grid.shape == (36, 40, 1)
        assert scan.grid.spacing_mm == pytest.approx((0.8, 0.7, 5.0))
        assert "approximate" in scan.notes[0]


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024.5), (20, -1024)])
def test_no_value_is_rounded_or_wraps_around(hu: np.ndarray, tmp_path: Path, slope: float, intercept: float) -> None:
    def change(dataset: pydicom.Dataset, k: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept

    write_series(tmp_path / "scan", hu, change=change)
    values, _ = read(find_sources(tmp_path / "scan")[0])
    np.testing.assert_array_equal(values, (hu + 1024).swapaxes(0, 1) * slope + intercept)


def test_values_may_fill_sixteen_bits(hu: np.ndarray, tmp_path: Path) -> None:
    def change(dataset: pydicom.Dataset, k: int) -> None:
        dataset.BitsStored, dataset.HighBit = 16, 15
        dataset.PixelData = (hu[..., k] + 50_000).astype("<u2").tobytes()

    write_series(tmp_path / "scan", hu, change=change)
    values, _ = read(find_sources(tmp_path / "scan")[0])
    np.testing.assert_array_equal(values, (hu + 50_000 - 1024).swapaxes(0, 1))


def test_one_slice_is_as_thick_as_its_spacing_where_no_thickness_is_known(hu: np.ndarray, tmp_path: Path) -> None:
    def spaced(dataset: pydicom.Dataset, k: int) -> None:
        del dataset.SliceThickness
        dataset.SpacingBetweenSlices = 2.5

    (path,) = write_series(tmp_path / "one", hu[..., :1], change=spaced)
    with READERS["dicom"].open(find_sources(path)[0]) as scan:
        assert scan.grid.spacing_mm == pytest.approx((0.8, 0.7, 2.5))


def test_digest_follows_the_content(hu: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "a", hu, seed=1)
    first = digest(find_sources(tmp_path / "a")[0])
    (tmp_path / "a" / "notes.txt").write_text("not DICOM")
    assert digest(find_sources(tmp_path / "a")[0]) == first
    path = next((tmp_path / "a").glob("*.dcm"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert digest(find_sources(tmp_path / "a")[0]) != first


def test_series_are_told_apart_by_uid_folder_and_geometry(hu: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "both", hu, number=1)
    write_series(tmp_path / "both", hu[..., ::-1], number=2)
    first, second = find_sources(tmp_path / "both")
    assert (first.name, second.name) == ("both_series1", "both_series2")
    check(first, hu)
    check(second, hu[..., ::-1])
    assert find_sources(tmp_path / "both", series="both_series2") == [second]
    assert find_sources(tmp_path / "both", series=first.series) == [first]
    with pytest.raises(InputError, match="no `series` 3 in it; there are both_series1, both_series2"):
        find_sources(tmp_path / "both", series="3")

    for name in ("x", "y"):  # no UID, or free text in its place
        write_series(tmp_path / "people" / name, hu, uid="" if name == "x" else "my own series")
    people = find_sources(tmp_path / "people")
    assert [(source.name, source.path) for source in people] == [(n, tmp_path / "people" / n) for n in ("x", "y")]
    check(people[0], hu)
    assert find_sources(people[1].path) == [people[1]]  # a path alone tells it
    for number in (1, 2):
        write_series(tmp_path / "people" / "z", hu, number=number)
    assert [source.name for source in find_sources(tmp_path / "people")] == ["z_series1", "z_series2", "x", "y"]
    write_series(tmp_path / "mixed", hu, uid="")
    write_series(tmp_path / "mixed", hu[:-2], uid="", number=2)
    assert len(find_sources(tmp_path / "mixed")) == 2


def test_a_series_whose_numbers_straddle_a_rounding_is_one(hu: np.ndarray, tmp_path: Path) -> None:
    def straddle(dataset: pydicom.Dataset, k: int) -> None:
        dataset.PixelSpacing = [0.8005 + 1e-7 * (-1) ** k, 0.7]

    write_series(tmp_path / "scan", hu, change=straddle)
    (source,) = find_sources(tmp_path / "scan")
    assert len(source.members) == hu.shape[-1]


@pytest.mark.parametrize("tag", ["RescaleSlope", "RescaleIntercept"])
def test_a_slice_that_does_not_say_its_rescaling_refuses_the_series(hu: np.ndarray, tmp_path: Path, tag: str) -> None:
    write_series(tmp_path / "scan", hu, change=lambda dataset, k: delattr(dataset, tag) if k == 3 else None)
    (source,) = find_sources(tmp_path / "scan")
    with pytest.raises(InputError, match="RescaleSlope"):
        read(source)


def test_a_slope_of_0_refuses_the_series(hu: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "scan", hu, change=lambda dataset, k: setattr(dataset, "RescaleSlope", int(k != 3)))
    refuse(tmp_path / "scan", "a damaged DICOM file")


def test_slices_without_a_modality_refuse_their_series(hu: np.ndarray, tmp_path: Path) -> None:
    last = hu.shape[-1] - 1
    write_series(tmp_path / "scan", hu, change=lambda dataset, k: delattr(dataset, "Modality") if k == last else None)
    (source,) = find_sources(tmp_path / "scan")
    with pytest.raises(InputError, match="without modality"):
        read(source)


@pytest.mark.parametrize(
    ("group", "tag", "value"),
    [
        ("PixelMeasuresSequence", "PixelSpacing", [0.4, 0.35]),
        ("PlaneOrientationSequence", "ImageOrientationPatient", [-1, 0, 0, 0, -1, 0]),
    ],
)
def test_frames_that_lie_differently_are_refused(
    hu: np.ndarray, tmp_path: Path, group: str, tag: str, value: list[float]
) -> None:
    path = tmp_path / "scan.dcm"
    write_multiframe(path, hu)
    dataset = pydicom.dcmread(path)
    (shared,) = dataset.SharedFunctionalGroupsSequence
    frame = dataset.PerFrameFunctionalGroupsSequence[2]
    setattr(frame, group, copy.deepcopy(getattr(frame, group, None) or getattr(shared, group)))
    setattr(getattr(frame, group)[0], tag, value)
    dataset.save_as(path)
    (source,) = find_sources(path)
    with pytest.raises(InputError, match="orientation or pixel spacing"):
        read(source)


def test_a_folder_of_zips_continues_after_a_bad_one(hu: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "scan", hu)
    (tmp_path / "zips").mkdir()
    pack(tmp_path / "scan", tmp_path / "zips" / "good.zip")
    (tmp_path / "zips" / "bad.zip").write_bytes(b"not a zip")
    bad, good = find_sources(tmp_path / "zips")
    assert (bad.name, good.name) == ("bad", "good")
    check(good, hu)
    with pytest.raises(InputError, match="cannot be read as a zip"):
        read(bad)


def test_what_is_no_ct_slice_is_left_out_by_name(
    hu: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def localizer(dataset: pydicom.Dataset, k: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    def pet(dataset: pydicom.Dataset, k: int) -> None:
        dataset.Modality = "PT"

    def colour(dataset: pydicom.Dataset, k: int) -> None:
        dataset.SamplesPerPixel = 3

    def dose_report_or_raw_data(dataset: pydicom.Dataset, k: int) -> None:
        delattr(dataset, "Rows" if k else "ImagePositionPatient")

    write_series(tmp_path / "scan", hu)
    for number, change in enumerate((localizer, pet, colour, dose_report_or_raw_data), 2):
        write_series(tmp_path / "scan", hu[..., :number], number=number, change=change)
    (tmp_path / "scan" / "README").write_text("words")
    (tmp_path / "scan" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    with caplog.at_level(logging.INFO):
        (source,) = find_sources(tmp_path / "scan")
    assert (
        "left out: 2 localizer, 4 not monochrome, 3 of modality PT, 5 without modality, position or pixels"
        in caplog.text.replace("\n", " ")
    )
    check(source, hu)

    write_series(tmp_path / "views", hu[..., :2], change=localizer)
    caplog.clear()
    with caplog.at_level(logging.INFO), pytest.raises(InputError, match="no scan in it"):
        find_sources(tmp_path / "views")
    assert "left out: 2 localizer" in caplog.text


def test_a_localizer_may_be_of_one_type(hu: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "scan", hu)
    write_series(
        tmp_path / "scan", hu[..., :2], number=2, change=lambda dataset, k: setattr(dataset, "ImageType", "LOCALIZER")
    )
    (source,) = find_sources(tmp_path / "scan")
    check(source, hu)


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        for source in find_sources(folder):
            read(source)
    assert str(folder) in str(caught.value)
    for word in (PATIENT, "Nobody", "4711", "19010203"):
        assert word not in str(caught.value)


def test_missing_doubled_and_uneven_slices_are_refused_with_their_positions(hu: np.ndarray, tmp_path: Path) -> None:
    paths = write_series(tmp_path / "gap", hu)
    paths[2].unlink()
    refuse(tmp_path / "gap", r"5 mm apart, but not between 105 and 115 mm: slices are missing")
    write_series(tmp_path / "twice", hu)
    write_series(tmp_path / "twice", hu, seed=3)
    (tmp_path / "twice" / "more").mkdir()
    next((tmp_path / "twice").glob("*.dcm")).rename(tmp_path / "twice" / "more" / "a.dcm")
    write_series(tmp_path / "twice", hu)
    refuse(tmp_path / "twice", r"several slices at 1\d\d mm")

    def move(dataset: pydicom.Dataset, k: int) -> None:
        dataset.ImagePositionPatient[2] += 0.4 * (k == 3)

    write_series(tmp_path / "uneven", hu, change=move)
    refuse(tmp_path / "uneven", r"not between 110 and 115\.4, 115\.4 and 120 mm")

    def aside(dataset: pydicom.Dataset, k: int) -> None:
        dataset.ImagePositionPatient[0] += 9 * (k == 3)

    write_series(tmp_path / "aside", hu, change=aside)
    refuse(tmp_path / "aside", "the slice at 115 mm lies off the line")

    def thin(dataset: pydicom.Dataset, k: int) -> None:
        del dataset.SliceThickness

    write_series(tmp_path / "one", hu[..., :1], change=thin)
    refuse(tmp_path / "one", "without a SliceThickness")


def test_rounded_positions_are_even(hu: np.ndarray, tmp_path: Path) -> None:
    def rounded(dataset: pydicom.Dataset, k: int) -> None:
        dataset.ImagePositionPatient[2] = round(100 + 0.703125 * k, 2)

    write_series(tmp_path / "scan", hu, change=rounded)
    values, _ = read(find_sources(tmp_path / "scan")[0])
    np.testing.assert_array_equal(values, hu.swapaxes(0, 1))


def test_a_damaged_slice_refuses_the_series(hu: np.ndarray, tmp_path: Path) -> None:
    """At the end, too, where the others would be an even series without it."""
    for name, cut in (("header", 300), ("pixels", -50)):
        paths = write_series(tmp_path / name, hu)
        paths[-1].write_bytes(paths[-1].read_bytes()[:cut])
        refuse(tmp_path / name, paths[-1].name)


@pytest.mark.parametrize("name", ["IM{:04}", "1.2.840.{}", "IM{:04}.dcm"])
@pytest.mark.parametrize("kind", ["empty", "few bytes", "stump", "half a header", "link", "no position"])
def test_what_may_be_a_slice_refuses_the_series(hu: np.ndarray, tmp_path: Path, name: str, kind: str) -> None:
    """The last one of a copy that was cut off; other files next to the slices are no matter."""
    folder = tmp_path / "scan"
    paths = write_series(folder, hu)
    for number, path in enumerate(paths, 1):
        path.rename(folder / name.format(number))
    last = folder / name.format(len(paths))
    for other in ("README", "VERSION"):
        (folder / other).write_text("of a viewer" * (other == "VERSION"))
    (source,) = find_sources(folder)
    check(source, hu)
    content = last.read_bytes()
    last.unlink()
    if kind == "link":
        last.symlink_to(tmp_path / "none")
    elif kind == "no position":
        dataset = pydicom.dcmread(io.BytesIO(content))
        del dataset.ImagePositionPatient
        dataset.save_as(last, enforce_file_format=True)
    else:
        last.write_bytes(content[: {"empty": 0, "few bytes": 100, "stump": 300, "half a header": 600}[kind]])
    refuse(folder, "a damaged DICOM file")


def test_linked_and_closed_folders_are_not_passed_over(
    hu: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder once, also where links lead in a circle; one that cannot be listed is named as it is opened."""
    for number, name in enumerate(("elsewhere", "scans/closed", "scans/open"), 1):
        write_series(tmp_path / name, hu, uid=f"1.2.{number}")
    (tmp_path / "scans" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "scans" / "open" / "circle").symlink_to(tmp_path / "scans")
    assert [source.name for source in find_sources(tmp_path / "scans")] == ["closed", "link", "open"]
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    closed, linked, open_ = find_sources(tmp_path / "scans")
    check(linked, hu)
    check(open_, hu)
    with pytest.raises(InputError, match=r"closed: cannot be listed \(.*Permission denied\); change its permissions"):
        read(closed)


def test_no_name_of_a_patient_is_in_any_output(
    hu: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_series(tmp_path / "scan", hu)
    with caplog.at_level(logging.DEBUG):
        (source,) = find_sources(tmp_path / "scan")
        with READERS["dicom"].open(source) as scan:
            text = f"{source} {scan} {caplog.text}"
    assert not any(word in text for word in (PATIENT, "Nobody", "4711", "19010203"))


def hostile(path: Path, name: str = "a.dcm", content: bytes = bytes(128) + b"DICM" + bytes(100), **info: Any) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo(name)
        entry.compress_type = zipfile.ZIP_DEFLATED
        for key, value in info.items():
            setattr(entry, key, value)
        archive.writestr(entry, content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../../a.dcm"}, "leads out of the zip"),
        ({"name": "/etc/a.dcm"}, "leads out of the zip"),
        ({"name": "C:\\a.dcm"}, "leads out of the zip"),
        ({"external_attr": 0xA1FF << 16}, "it is a link"),
        ({"content": bytes(50_000_000)}, "are not in"),
    ],
)
def test_hostile_zips_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    hostile(tmp_path / "bad.zip", **options)
    if "content" in options:  # deflate reaches 1,030 here; the zip says more
        data = bytearray((tmp_path / "bad.zip").read_bytes())
        for at in (data.find(b"PK\x01\x02") + 24, 22):
            data[at : at + 4] = (2_000_000_000).to_bytes(4, "little")
        (tmp_path / "bad.zip").write_bytes(data)
    with pytest.raises(InputError, match=message):
        list_sources(tmp_path / "bad.zip")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a.dcm", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.dcm", b"")
    with pytest.raises(InputError, match="several files named a"):
        list_sources(tmp_path / "twice.zip")
    (tmp_path / "words.zip").write_bytes(b"not a zip")
    with pytest.raises(InputError, match="cannot be read as a zip"):
        list_sources(tmp_path / "words.zip")


def attempt(path: Path) -> None:
    """Reads whatever is there; only an `InputError` may come of it."""
    with contextlib.suppress(InputError):
        for source in find_sources(path):
            digest(source)
            with open_scan(source, assumed=(-1250.0, 250.0)) as scan:
                scan.read_slices(0, 1)


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, most of them in the header, or the end cut off."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        data[int(min(rng.exponential(400), len(data) - 1))] = int(rng.integers(256))
    return bytes(data[: int(rng.integers(len(data)))] if rng.random() < 0.3 else data)


def fuzz_files(tmp_path: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1024, 1500, (40, 36, 2))
    kinds: list[list[bytes]] = []
    for number, syntax in enumerate((None, uids.RLELossless, uids.JPEG2000Lossless, uids.JPEGLSLossless)):
        paths = write_series(tmp_path / f"{number}", hu)
        for path in paths:
            if syntax:
                compress(path, syntax)
        kinds.append([path.read_bytes() for path in paths])
    write_multiframe(tmp_path / "frames.dcm", hu)
    kinds.append([(tmp_path / "frames.dcm").read_bytes()])
    folder = tmp_path / "fuzzed"
    folder.mkdir()
    for _ in range(count):
        contents = list(kinds[int(rng.integers(len(kinds)))])
        k = int(rng.integers(len(contents)))
        contents[k] = damage(contents[k], rng)
        for old in folder.iterdir():
            old.unlink()
        for i, content in enumerate(contents):
            (folder / f"{i}.dcm").write_bytes(content)
        attempt(folder)


def fuzz_zips(tmp_path: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    write_series(tmp_path / "scan", rng.integers(-1024, 1500, (40, 36, 2)))
    content = pack(tmp_path / "scan", tmp_path / "good.zip").read_bytes()
    for _ in range(count):
        data = bytearray(content)
        for _ in range(int(rng.integers(1, 8))):
            at = len(data) - 1 - int(rng.integers(300)) if rng.random() < 0.6 else int(rng.integers(len(data)))
            data[at] = int(rng.integers(256))
        (tmp_path / "bad.zip").write_bytes(data[: int(rng.integers(len(data)))] if rng.random() < 0.2 else data)
        attempt(tmp_path / "bad.zip")


def test_flips_and_cuts_never_give_a_traceback(tmp_path: Path) -> None:
    fuzz_files(tmp_path, 100, 0)


def test_damaged_zips_never_give_a_traceback(tmp_path: Path) -> None:
    fuzz_zips(tmp_path, 40, 0)


@pytest.mark.exhaustive
def test_ten_thousand_flips_and_cuts(tmp_path: Path) -> None:
    fuzz_files(tmp_path, 10_000, 1)


@pytest.mark.exhaustive
def test_a_thousand_damaged_zips(tmp_path: Path) -> None:
    fuzz_zips(tmp_path, 1_000, 1)


real = pytest.mark.skipif(not REAL.is_dir(), reason="the real DICOM series are not beside this folder")


@real
def test_real_series() -> None:
    (covid,) = find_sources(REAL / "covid")
    with open_scan(covid) as scan:
        assert scan.grid.shape == (512, 512, 148)
        assert scan.grid.spacing_mm[2] == pytest.approx(2.0)
        assert scan.intensity_scale == "hu"
    two = find_sources(REAL / "two_series")
    assert [len(source.members) for source in two] == [30, 30]
    values = [read(source)[0] for source in two]
    assert values[0].shape == values[1].shape == (512, 512, 30)
    assert (values[0] != values[1]).any()


@real
def test_real_transfer_syntaxes() -> None:
    files = {path.name.split("_")[-1].removesuffix(".dcm"): path for path in (REAL / "transfer_syntaxes").iterdir()}
    reference, _ = read(find_sources(files["1.2.840.10008.1.2"])[0])
    refused = {syntax for syntax in files if syntax[-3:] in (".50", ".51", ".53", ".55")}
    for syntax in refused:
        with pytest.raises(InputError, match=re.escape(syntax)):
            read(find_sources(files[syntax])[0])
    for syntax in set(files) - refused:
        values, _ = read(find_sources(files[syntax])[0])
        assert np.abs(values - reference).max() <= (10 if syntax[-3:] in (".81", ".91") else 0), syntax
    assert (len(files), len(refused)) == (15, 4)


def test_a_decoder_that_dies_or_hangs_is_one_line(
    hu: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in write_series(tmp_path / "scan", hu):
        compress(path, uids.JPEG2000Lossless)
    for worker in ("import os; os.abort()", "import time; time.sleep(600)"):
        (tmp_path / "worker.py").write_text(worker)
        monkeypatch.setattr(decode_worker, "__file__", str(tmp_path / "worker.py"))
        monkeypatch.setattr(decode_worker, "_SECONDS", 1)
        refuse(tmp_path / "scan", "the decoder gave up on it")


def check_seg_of_frames(seg: Path, source: Source, grid: Grid, rng: np.random.Generator) -> None:
    """Of an enhanced file: each frame of a mask lies where its part of the mask does."""
    from resunet_jax.data.readers.dicom_seg import write_dicom_seg

    mask = rng.random(grid.oriented_shape) < 0.2
    write_dicom_seg(seg, source, grid, {"infection": mask})
    written = pydicom.dcmread(seg)
    for pixels, frame in zip(written.pixel_array, written.PerFrameFunctionalGroupsSequence, strict=True):
        z = float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
        np.testing.assert_array_equal(pixels > 0, grid.from_pls(mask).T[round((z - 100) / 5)])
    gc.collect()  # what `write_dicom_seg` leaves open is warned of here, and not in another test


def test_dicom_seg_reads_back_as_the_masks(hu: np.ndarray, tmp_path: Path, rng: np.random.Generator) -> None:
    """On a tilted series too; an empty mask is left out."""
    hd = pytest.importorskip("highdicom")
    from resunet_jax.data.readers.dicom_seg import write_dicom_seg

    for name, step in (("straight", (0.0, 0.0, 5.0)), ("tilted", (0.0, 1.3, 5.0)), ("down", (0.0, 0.0, -5.0))):
        write_series(tmp_path / name, hu, step=step)
        (source,) = find_sources(tmp_path / name)
        with READERS["dicom"].open(source) as scan:
            grid = scan.grid
        masks = {kind: rng.random(grid.oriented_shape) < 0.2 for kind in ("left lung", "infection")}
        path = tmp_path / f"{name}_seg.dcm"
        write_dicom_seg(path, source, grid, {**masks, "right lung": np.zeros(grid.oriented_shape, bool)})
        written = hd.seg.segread(path)
        assert [segment.SegmentLabel for segment in written.SegmentSequence] == ["left lung", "infection"]
        uids_in_order = [ds.SOPInstanceUID for ds in series_datasets(source)[0]]
        for number, mask in enumerate(masks.values(), 1):
            frames = written.get_pixels_by_source_instance(uids_in_order, segment_numbers=[number])[..., 0]
            np.testing.assert_array_equal(frames > 0, grid.from_pls(mask).T)
        written._db_con.close()
    write_multiframe(tmp_path / "enhanced.dcm", hu)  # its frames from the upper end to the lower
    (source,) = find_sources(tmp_path / "enhanced.dcm")
    check_seg_of_frames(path, source, grid, rng)
    with pytest.raises(InputError, match="refers to a DICOM series"):
        write_dicom_seg(path, source._replace(format="nifti"), grid, masks)


def test_dicom_seg_follows_frames_in_any_order(hu: np.ndarray, tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("highdicom")
    path, seg = tmp_path / "enhanced.dcm", tmp_path / "seg.dcm"
    write_multiframe(path, hu)
    dataset, order = pydicom.dcmread(path), [1, 2, 0, 3, 4, 5]
    dataset.PixelData = dataset.pixel_array[order].tobytes()
    groups = dataset.PerFrameFunctionalGroupsSequence
    dataset.PerFrameFunctionalGroupsSequence = pydicom.Sequence([groups[k] for k in order])
    dataset.save_as(path)
    (source,) = find_sources(path)
    check(source, hu)
    with READERS["dicom"].open(source) as scan:
        grid = scan.grid
    check_seg_of_frames(seg, source, grid, rng)


@pytest.mark.parametrize(
    ("first", "second", "folder"),
    [("anon-1", "anon-2", "a"), ("1.2.03.1", "1.2.03.2", "a"), ("anon", "anon", "b"), ("19700101", "19700101", "b")],
)
def test_uids_that_break_the_rules_tell_series_apart_with_their_folders(
    hu: np.ndarray, tmp_path: Path, first: str, second: str, folder: str
) -> None:
    write_series(tmp_path / "scan" / "a", hu, uid=first, number=1)
    between = [[-20.0, -30.0, 102.5 + 5 * k] for k in range(hu.shape[-1])]  # taken for one, a stack of half the step
    write_series(
        tmp_path / "scan" / folder,
        hu[..., ::-1],
        uid=second,
        number=2,
        change=lambda dataset, k: setattr(dataset, "ImagePositionPatient", between[k]),
    )
    sources = find_sources(tmp_path / "scan")
    assert [len(source.members) for source in sources] == [hu.shape[-1]] * 2
    assert [source.series for source in sources] == ["", ""]  # it may be a name


def test_a_zip_is_opened_once_for_all_headers(hu: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path / "scan", hu)
    archive, opened = pack(tmp_path / "scan", tmp_path / "scan.zip"), []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: opened.append(args) or real(*args))
    (source,) = find_sources(archive)
    with READERS["dicom"].open(source):
        assert len(opened) == 3  # to list, for headers, for pixels


def test_opening_leaves_the_warnings_of_the_process_as_they_are(hu: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "scan", np.tile(hu, 10), step=(0.0, 0.0, 0.5))
    before = list(warnings.filters)
    for _ in range(5):
        (source,) = find_sources(tmp_path / "scan")
        with READERS["dicom"].open(source):
            pass
    assert warnings.filters == before
