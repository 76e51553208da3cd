"""NRRD and MetaImage: the same voxels and affine as NIfTI; and every bad one named."""

import contextlib
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from resunet_jax.data.readers import READERS, decode_worker, digest, find_sources, itk, itk_worker, read_grid
from resunet_jax.data.readers.itk import open_itk
from resunet_jax.errors import InputError
from tests.data.test_dicom import SHAPE, expected_affine


@pytest.mark.parametrize("suffix", ["nrrd", "mha", "MHD"])
def test_nrrd_and_metaimage_are_the_same_volume(rng: np.random.Generator, tmp_path: Path, suffix: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    hu = rng.integers(-1024, 1500, SHAPE)
    image = sitk.GetImageFromArray(np.moveaxis(hu, -1, 0).astype(np.int16))
    image.SetSpacing((0.7, 0.8, 5.0))
    image.SetOrigin((-20.0, -30.0, 100.0))
    path = tmp_path / f"scan.{suffix.lower()}"
    sitk.WriteImage(image, str(path))
    if suffix == "MHD":
        path = path.rename(tmp_path / "scan.MHD")
    (source,) = find_sources(path)
    with READERS["itk"].open(source) as scan:
        np.testing.assert_array_equal(scan.read(2, 0, SHAPE[-1]), hu.swapaxes(0, 1))
        np.testing.assert_allclose(scan.grid.affine, expected_affine(), atol=1e-6)
    before = digest(source)
    voxels = tmp_path / "scan.raw" if suffix == "MHD" else path
    if suffix == "MHD":
        voxels.write_bytes(voxels.read_bytes()[:-2] + b"\x07\x00")
        assert digest(source) != before
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    refuse_file(path)
    path.write_bytes(b"words")
    refuse_file(path)


def test_a_volume_of_many_chunks_is_whole(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger than what a process keeps of memory that is given back."""
    sitk = pytest.importorskip("SimpleITK")
    monkeypatch.setattr(itk, "CHUNK_BYTES", 1_000_000)
    values = rng.integers(-1024, 1500, (60, 300, 256), np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "scan.nrrd"))
    (source,) = find_sources(tmp_path)
    with open_itk(source) as scan:
        np.testing.assert_array_equal(scan.read(2, 0, 60), values.T)
    assert digest(source) == hashlib.sha256(source.path.read_bytes() + values.tobytes()).hexdigest()


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_oblique_volumes_lie_where_simpleitk_has_them(tmp_path: Path, suffix: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    cos, sin = np.cos(0.4), np.sin(0.4)
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16))
    image.SetSpacing((0.7, 0.8, 5.0))
    image.SetDirection((1, 0, 0, 0, cos, -sin, 0, sin, cos))
    sitk.WriteImage(image, str(tmp_path / f"scan.{suffix}"))
    with READERS["itk"].open(find_sources(tmp_path / f"scan.{suffix}")[0]) as scan:
        affine = scan.grid.affine
    for index in ((0, 0, 0), (5, 0, 0), (0, 4, 0), (0, 0, 3)):
        expected = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        np.testing.assert_allclose((affine @ (*index, 1))[:3], expected, atol=1e-4)


def write_zeros(path: Path) -> Path:
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16)), str(path))
    return path


def refuse_file(path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(path.name)) as caught, READERS["itk"].open(find_sources(path)[0]):
        pass
    assert "\n" not in str(caught.value)


def test_a_file_without_voxel_size_and_orientation_is_warned_of(tmp_path: Path) -> None:
    (source,) = find_sources(write_zeros(tmp_path / "scan.mha"))
    with open_itk(source) as scan:
        assert "neither voxel size nor orientation" in scan.warnings[0]


def test_without_simpleitk_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    (tmp_path / "scan.nrrd").touch()
    with pytest.raises(InputError, match=r"resunet-jax\[itk\]"), READERS["itk"].open(find_sources(tmp_path)[0]):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_name_that_simpleitk_cannot_take_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    path = tmp_path / os.fsdecode(b"caf\xe9.nrrd")
    path.touch()
    with pytest.raises(InputError, match="rename it"):
        read_grid(path)


def test_what_ends_simpleitk_is_one_line(tmp_path: Path) -> None:
    """It formats its messages with the name of the file of voxels, so one with a percent sign ends the process."""
    path = write_zeros(tmp_path / "scan.mhd")
    (tmp_path / "scan.raw").rename(tmp_path / "50%scan.raw")
    path.write_text(path.read_text().replace("scan.raw", "50%scan.raw"))
    refuse_file(path)


NRRD = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 6 5 4\n%sendian: little\nencoding: raw\n\n"
META = b"ObjectType = Image\nNDims = 3\n%sDimSize = 6 5 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
DIRECTIONS = b"space directions: (0.7,0,0) (0,0.7,0) (0,0,5)\n"


@pytest.mark.parametrize(
    ("header", "warning"),
    [
        (NRRD % b"spacings: 0.7 0.7 5\n", "left and right are a guess"),
        (NRRD % (b"space: scanner-xyz\n" + DIRECTIONS), "left and right are a guess"),
        (NRRD % (b"space: right-anterior-superior\n" + DIRECTIONS), None),
        (NRRD % (b"space: LPS\n" + DIRECTIONS), None),
        (META % b"ElementSpacing = 0.7 0.7 5\n", "left and right are a guess"),
        (META % b"ElementSpacing = 0.7 0.7 5\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n", None),
    ],
)
def test_a_header_without_orientation_is_warned_of(tmp_path: Path, header: bytes, warning: str | None) -> None:
    pytest.importorskip("SimpleITK")
    path = tmp_path / ("scan.nrrd" if header.startswith(b"NRRD") else "scan.mha")
    path.write_bytes(header + bytes(240))
    with open_itk(find_sources(path)[0]) as scan:
        assert [warning in found for found in scan.warnings] == [True] * (warning is not None)


def test_units_other_than_mm_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    path = tmp_path / "scan.nrrd"
    spaced = b"spacings: 0.7 0.7 5\nunits: "
    for fields, is_refused in (
        (b'space: LPS\nspace units: "mm" "mm" "mm"\n' + DIRECTIONS, False),
        (b'space: LPS\nspace units: "Millimeters" "" ""\n' + DIRECTIONS, False),
        (b'space: LPS\nSpace Units: "cm" "cm" "cm"\n' + DIRECTIONS, True),
        (spaced + b'"mm" "mm" "mm"\n', False),
        (spaced + b'"cm" "cm" "cm"\n', True),
    ):
        path.write_bytes(NRRD % fields + bytes(240))
        refused = pytest.raises(InputError, match='"cm" "cm"; export it in mm')
        with refused if is_refused else contextlib.nullcontext():
            read_grid(path)


@pytest.mark.skipif(sys.platform == "win32", reason="other names of devices")
def test_a_file_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("SimpleITK")
    path = tmp_path / "scan.mhd"
    path.write_bytes((META % b"ElementSpacing = 1 1 5\n").replace(b"LOCAL", b"/dev/stdin"))
    with pytest.raises(InputError, match="cannot be read"):
        read_grid(path)
    os.mkfifo(tmp_path / "fifo")
    path.write_bytes((META % b"ElementSpacing = 1 1 5\n").replace(b"LOCAL", b"fifo"))
    monkeypatch.setattr(decode_worker, "_SECONDS", 3)
    with pytest.raises(InputError, match="SimpleITK gave up on it"):
        read_grid(path)


@pytest.mark.parametrize("code", ["", "print('{}', flush=True)", "print('{}', flush=True); import time; time.sleep(9)"])
def test_a_process_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Before its first answer; after it; and as it hangs."""
    pytest.importorskip("SimpleITK")
    path = tmp_path / "scan.mha"
    path.write_bytes(META % b"ElementSpacing = 1 1 5\n" + bytes(240))
    header = {"size": [6, 5, 4], "numberofcomponents": 1, "spacing": [1, 1, 5], "origin": [0] * 3}
    worker = tmp_path / "worker.py"
    worker.write_text(code.replace("{}", json.dumps({**header, "direction": np.eye(3).ravel().tolist()})))
    monkeypatch.setattr(itk_worker, "__file__", str(worker))
    monkeypatch.setattr(decode_worker, "_SECONDS", 2)
    with pytest.raises(InputError, match="SimpleITK gave up on it"):
        read_grid(path)


def test_a_metaimage_that_is_cut_off_is_said_to_be(tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "scan.mha")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="cut off"):
        read_grid(path)
