import gzip
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from resunet_jax.data import readers
from resunet_jax.data.readers import nifti, open_scan, read_mask
from resunet_jax.data.readers.nifti import nifti_writer
from resunet_jax.data.volume import HU_WINDOW, Grid, Volume, max_corner_distance_mm
from resunet_jax.errors import InputError
from tests.conftest import write_nifti

SPACING = (0.7, 0.8, 5.0)
LPS = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])


def read_volume(path: Path, table=readers.READERS) -> Volume:
    """Small arrays that show no chest: they are said to be in Hounsfield units."""
    return readers.read_volume(path, table, assumed=HU_WINDOW)


def hu(shape: tuple[int, ...] = (6, 7, 4)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 300, shape).astype(np.int16)


def save(path: Path, array: np.ndarray, affine: np.ndarray = LPS) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def test_rows_go_to_the_back_and_columns_to_the_left(tmp_path: Path) -> None:
    array = hu()
    volume = read_volume(save(tmp_path / "scan.nii", array))
    np.testing.assert_array_equal(volume.values, array.transpose(1, 0, 2))
    assert volume.values.dtype == np.int16
    np.testing.assert_allclose(volume.grid.spacing_mm, (SPACING[1], SPACING[0], SPACING[2]), rtol=1e-6)
    np.testing.assert_allclose(volume.grid.voxel_ml, np.prod(SPACING) / 1000, rtol=1e-6)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
def test_any_axes_give_the_same_anatomy(tmp_path: Path, axes, flips) -> None:
    original = nib.Nifti1Image(hu(), LPS)
    moved = original.as_reoriented(np.stack([axes, flips], axis=1))
    nib.save(moved, tmp_path / "moved.nii.gz")
    nib.save(original, tmp_path / "original.nii")
    expected, volume = read_volume(tmp_path / "original.nii"), read_volume(tmp_path / "moved.nii.gz")
    np.testing.assert_array_equal(volume.values, expected.values)
    np.testing.assert_allclose(volume.grid.spacing_mm, expected.grid.spacing_mm, rtol=1e-6)
    assert volume.grid.voxel_ml == pytest.approx(expected.grid.voxel_ml)
    np.testing.assert_array_equal(volume.grid.from_pls(volume.values), np.asarray(moved.dataobj))


def test_oblique_scans_take_the_nearest_axes(tmp_path: Path) -> None:
    angle = np.deg2rad(12)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = LPS.copy()
    affine[:3, :3] = rotation @ LPS[:3, :3]
    volume = read_volume(save(tmp_path / "scan.nii", hu(), affine))
    np.testing.assert_array_equal(volume.values, hu().transpose(1, 0, 2))
    np.testing.assert_allclose(volume.grid.spacing_mm, (SPACING[1], SPACING[0], SPACING[2]), rtol=1e-6)
    assert not volume.grid.is_sheared


def test_a_tilt_of_one_degree_is_a_shear_and_what_headers_round_is_none() -> None:
    affine = LPS.copy()
    for degrees, is_sheared in ((1, True), (1e-5, False)):
        affine[1, 2] = SPACING[2] * np.tan(np.deg2rad(degrees))
        grid = Grid((6, 7, 4), affine)
        assert grid.is_sheared == is_sheared
        assert grid.slice_distance_mm == pytest.approx(SPACING[2])


def test_corners_lie_apart_by_what_grows_along_the_axes() -> None:
    grid, other = Grid((11, 21, 31), np.eye(4)), Grid((11, 21, 31), np.diag([1.1, 1.2, 0.9, 1]))
    assert max_corner_distance_mm(grid, other) == pytest.approx(np.sqrt(1 + 16 + 9))


def test_a_header_without_orientation_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = nib.Nifti1Image(hu(), None)
    image.set_sform(None)
    image.set_qform(None)
    nib.save(image, tmp_path / "scan.nii")
    with open_scan(tmp_path / "scan.nii", assumed=HU_WINDOW) as scan:
        (warning,) = scan.warnings
    with caplog.at_level("WARNING", logger="resunet_jax"):
        read_volume(tmp_path / "scan.nii")
    assert "left and right are a guess (axes taken as LAS); set them" in warning
    assert warning in caplog.text
    caplog.clear()
    read_volume(save(tmp_path / "other.nii", hu()))
    assert not caplog.text


def test_hounsfield_window(tmp_path: Path) -> None:
    array = np.zeros((3, 3, 1), np.int16)
    array[..., 0] = [[-3024, -1250, -1000], [-500, -220, 0], [100, 250, 3000]]
    volume = read_volume(save(tmp_path / "scan.nii", array))
    assert volume.intensity_scale == "hu"
    expected = np.clip((array[..., 0].T + 1250) / 1500, 0, 1)
    np.testing.assert_allclose(volume.normalize_hu(0), expected, atol=1e-6)


def test_windowed_scans_are_on_the_same_scale(tmp_path: Path) -> None:
    original = hu()
    windowed = np.rint((np.clip(original, -1250, 250) + 1250) / 1500 * 255).astype(np.uint8)
    a = read_volume(save(tmp_path / "hu.nii", original))
    b = Volume(windowed.transpose(1, 0, 2), "windowed", a.grid)
    for k in range(4):
        np.testing.assert_allclose(a.normalize_hu(k), b.normalize_hu(k), atol=0.5 / 255 + 1e-6)


def test_slope_and_intercept_are_honoured(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii", hu())
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([2.0, -1024.0], "<f4").tobytes()
    path.write_bytes(raw)
    np.testing.assert_allclose(read_volume(path).values, hu().transpose(1, 0, 2) * 2.0 - 1024)
    raw[112:120] = np.array([1.0, -24.0], "<f4").tobytes()
    path.write_bytes(raw)
    np.testing.assert_array_equal(read_volume(path).values, hu().transpose(1, 0, 2) - 24)


def test_minmax_and_constant_slices(tmp_path: Path) -> None:
    array = hu()
    array[..., 1] = -1000
    volume = read_volume(save(tmp_path / "scan.nii", array))
    first = volume.normalize_minmax(0)
    assert (first.min(), first.max()) == (0, 1)
    np.testing.assert_array_equal(volume.normalize_minmax(1), 0)


def test_written_masks_lie_on_the_scan_bit_for_bit(tmp_path: Path) -> None:
    moved = nib.Nifti1Image(hu(), LPS).as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
    moved.set_sform(moved.affine @ np.diag([1, 1, 1.001, 1]), code=3)
    moved.set_qform(moved.affine, code=1, update_affine=False)
    moved.header["descrip"] = b"a scan"
    nib.save(moved, tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    mask = (volume.values > 0).astype(np.uint8)
    write_nifti(tmp_path / "mask.nii.gz", mask, volume.grid)
    scan, written = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "mask.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert written.shape == scan.shape
    for field in (
        "sform_code",
        "qform_code",
        "srow_x",
        "srow_y",
        "srow_z",
        "quatern_b",
        "quatern_c",
        "quatern_d",
        "pixdim",
    ):
        np.testing.assert_array_equal(written.header[field], scan.header[field])
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(scan.dataobj) > 0)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii.gz", tmp_path / "scan.nii.gz", volume.grid), mask)
    write_nifti(tmp_path / "again.nii.gz", mask, volume.grid)
    assert (tmp_path / "again.nii.gz").read_bytes() == (tmp_path / "mask.nii.gz").read_bytes()


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_each_byte_is_read_twice_at_most(
    phantom: Path, tmp_path: Path, axes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the scale, once to use, whichever axis of the file the slices lie along."""
    scan = nib.load(phantom / "ct_scans" / "coronacases_org_001.nii")
    path = tmp_path / "scan.nii"
    nib.save(scan.as_reoriented(np.stack([axes, [1, 1, 1]], axis=1)), path)
    read, real = [], np.fromfile

    def fromfile(file, *args: Any) -> np.ndarray:
        values = real(file, *args)
        read.append(values.nbytes if file.name == str(path) else 0)
        return values

    monkeypatch.setattr(np, "fromfile", fromfile)
    monkeypatch.setattr(nifti, "CHUNK_BYTES", 10_000)
    with open_scan(path) as opened:
        opened.sample_slices(16)  # for the air around the body
        slices = opened.grid.oriented_shape[-1]
        chunks = [opened.read_slices(k, min(k + 5, slices)).values for k in range(0, slices, 5)]
    voxels = int(np.prod(scan.shape)) * 2
    samples = 2 * voxels if axes == (0, 1, 2) else 0  # few slices, here all; otherwise they come from the copy
    assert voxels <= sum(read) <= 2 * voxels + samples
    np.testing.assert_array_equal(np.concatenate(chunks, axis=-1), read_volume(path).values)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flip", [1, -1])
def test_chunks_are_the_whole_when_read_and_when_written(
    tmp_path: Path, axes, flip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nifti, "CHUNK_BYTES", 200)  # a plane or two at a time
    moved = nib.Nifti1Image(hu(), np.diag([0.7, 0.7, 5, 1])).as_reoriented(np.stack([axes, [1, 1, flip]], axis=1))
    nib.save(moved, tmp_path / "scan.nii.gz")
    whole = read_volume(tmp_path / "scan.nii.gz")
    slices = whole.values.shape[-1]
    with open_scan(tmp_path / "scan.nii.gz", assumed=HU_WINDOW) as scan:
        assert scan.grid.oriented_shape == whole.values.shape
        chunks = [(k, scan.read_slices(k, min(k + 2, slices)).values) for k in range(0, slices, 2)]
    np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in chunks], axis=-1), whole.values)

    with nifti_writer(tmp_path / "mask.nii.gz", np.uint8, whole.grid) as write:
        for k, chunk in chunks[:0:-1]:  # backwards, and without the first
            write(k, (chunk > 0).astype(np.uint8))
    expected = (whole.values > 0).astype(np.uint8)
    expected[..., :2] = 0
    written = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), whole.grid.from_pls(expected))
    assert written.affine.tobytes() == nib.load(tmp_path / "scan.nii.gz").affine.tobytes()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    volume = read_volume(save(tmp_path / "scan.nii", hu()))
    with pytest.raises(InputError, match="cannot be written"):
        write_nifti(tmp_path / "none" / "mask.nii.gz", np.zeros(volume.values.shape, np.uint8), volume.grid)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii"]


def bad_missing(path: Path) -> str:
    return "no such file"


def bad_suffix(path: Path) -> str:
    path.write_bytes(b"DICM")
    return "cannot be read as NIfTI"


def bad_truncated(path: Path) -> str:
    save(path, hu())
    path.write_bytes(path.read_bytes()[:-10])
    return "cut off"


def bad_truncated_header(path: Path) -> str:
    save(path, hu())
    path.write_bytes(path.read_bytes()[:100])
    return "cannot be read as NIfTI"


def bad_promises_too_much(path: Path) -> str:
    save(path, hu())
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(raw)
    return "promises"


def bad_negative_size(path: Path) -> str:
    raw = bytearray(save(path, hu()).read_bytes())
    raw[42:44] = np.array(-6, "<i2").tobytes()
    path.write_bytes(raw)
    return "three dimensions"


def bad_offset(path: Path) -> str:
    raw = bytearray(save(path, hu()).read_bytes())
    raw[108:112] = np.array([np.inf], "<f4").tobytes()
    path.write_bytes(raw)
    return "cannot be read"


def bad_4d(path: Path) -> str:
    save(path, hu((4, 4, 3, 2)))
    return "three dimensions"


def bad_rgb(path: Path) -> str:
    rgb = np.zeros((4, 4, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    save(path, rgb)
    return "not colour"


def bad_nan(path: Path) -> str:
    array = hu().astype(np.float32)
    array[0, 0, 0] = np.nan
    save(path, array)
    return "NaN"


def bad_infinite(path: Path) -> str:
    array = hu().astype(np.float32)
    array[0, 0, 0] = np.inf
    save(path, array)
    return "infinite"


def bad_constant(path: Path) -> str:
    save(path, np.full((4, 4, 3), -1000, np.int16))
    return "every voxel is -1000"


def bad_affine(path: Path) -> str:
    raw = bytearray(save(path, hu()).read_bytes())
    raw[296:312] = bytes(16)  # srow_y: the second axis has no direction
    path.write_bytes(raw)
    return "affine"


@pytest.mark.parametrize("spoil", [v for k, v in list(globals().items()) if k.startswith("bad_")])
def test_bad_scans_are_refused_by_name(tmp_path: Path, spoil) -> None:
    path = tmp_path / "scan.nii"
    message = spoil(path)
    with pytest.raises(InputError, match=message) as refusal:
        read_volume(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("cut", [1, 9, 60, 200])
def test_cut_gzip_is_refused(tmp_path: Path, cut: int) -> None:
    path = save(tmp_path / "scan.nii.gz", hu())
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match=r"copy it again|cannot be read"):
        read_volume(path)


def test_spoilt_gzip_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", hu())
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 1  # of the checksum
    path.write_bytes(raw)
    with pytest.raises(InputError, match="cannot be read"):
        read_volume(path)


@pytest.mark.parametrize("side", [400, 30000])
def test_what_promises_too_much_is_refused_before_memory_is_taken(tmp_path: Path, side: int) -> None:
    """For 400³ voxels a gzip file of this size is possible; it is found too short while it is unpacked."""
    raw = bytearray(save(tmp_path / "scan.nii", hu()).read_bytes())
    raw[42:48] = np.array([side, side, side], "<i2").tobytes()
    (tmp_path / "scan.nii").write_bytes(raw)
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(raw + np.random.default_rng(0).bytes(200_000)))
    for name in ("scan.nii", "scan.nii.gz"):
        tracemalloc.start()
        with pytest.raises(InputError, match="promises"):
            read_volume(tmp_path / name)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 60_000_000  # a chunk of a file in memory at a time, of 128 MB


def test_not_nifti_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"scan\.txt: no such file or folder"):
        read_volume(tmp_path / "scan.txt")
    (tmp_path / "scan.txt").touch()
    with pytest.raises(InputError, match="not a scan; formats that are read: nifti"):
        read_volume(tmp_path / "scan.txt")


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((6, 7, 5), np.uint8), LPS, "shape"),
        (
            np.zeros((6, 7, 4), np.uint8),
            LPS * np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1.2, 1], [1, 1, 1, 1]]),
            "affine",
        ),
        (np.zeros((6, 7, 4), np.uint8), LPS @ np.diag([-1, 1, 1, 1]), "affine"),
        (np.full((6, 7, 4), 0.5, np.float32), LPS, "whole labels"),
        (np.full((6, 7, 4), -1, np.int16), LPS, "whole labels"),
        (np.full((6, 7, 4), 300, np.int16), LPS, "whole labels"),
    ],
)
def test_bad_masks_are_refused(tmp_path: Path, array, affine, message: str) -> None:
    scan = save(tmp_path / "scan.nii", hu())
    mask = save(tmp_path / "mask.nii", array, affine)
    with pytest.raises(InputError, match=message):
        read_mask(mask, scan, read_volume(scan).grid)


def test_a_scan_may_be_constant_in_the_chunk_that_is_read_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1)
    array = hu()
    array[..., 0] = -1000
    np.testing.assert_array_equal(read_volume(save(tmp_path / "scan.nii", array)).values, array.transpose(1, 0, 2))


@pytest.mark.parametrize("value", [1.1, -0.1, 255.4, 256])
def test_masks_that_are_no_whole_labels_are_refused(tmp_path: Path, value: float) -> None:
    scan = read_volume(save(tmp_path / "scan.nii", hu()))
    save(tmp_path / "mask.nii", np.full((6, 7, 4), value, np.float32))
    with pytest.raises(InputError, match="whole labels"):
        read_mask(tmp_path / "mask.nii", tmp_path / "scan.nii", scan.grid)


def test_masks_may_differ_by_rounding(tmp_path: Path) -> None:
    scan = save(tmp_path / "scan.nii", hu())
    labels = np.array([0, 1, 2], np.float32)[np.random.default_rng(0).integers(0, 3, (6, 7, 4))]
    mask = save(tmp_path / "mask.nii", labels, LPS * (1 + 1e-6))
    np.testing.assert_array_equal(read_mask(mask, scan, read_volume(scan).grid), labels.transpose(1, 0, 2))
    below = save(tmp_path / "below.nii", labels * np.float32(0.99998))
    np.testing.assert_array_equal(read_mask(below, scan, read_volume(scan).grid), labels.transpose(1, 0, 2))


def test_a_mask_that_lies_a_pixel_aside_is_refused(tmp_path: Path) -> None:
    scan, aside = save(tmp_path / "scan.nii", hu()), LPS.copy()
    aside[0, 3] += SPACING[0]
    mask = save(tmp_path / "mask.nii", np.ones((6, 7, 4), np.uint8), aside)
    with pytest.raises(InputError, match="affine differs"):
        read_mask(mask, scan, read_volume(scan).grid)
