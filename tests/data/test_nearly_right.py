"""Formats, and files that are nearly right."""

import gzip
import os
import re
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.cases import find_cases
from resunet_jax.data.readers import (
    READERS,
    Reader,
    digest,
    disk,
    find_sources,
    list_sources,
    open_scan,
    read_grid,
    read_mask,
    read_volume,
)
from resunet_jax.data.readers.disk import temporary_file
from resunet_jax.data.readers.nifti import header_problems, nifti_writer
from resunet_jax.data.readers.source import Source, by_suffix, file_digest
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.data.volume import Grid, scan_from_array
from resunet_jax.errors import InputError
from tests.conftest import write_nifti

AFFINE = np.diag([-2.0, -2.0, 5.0, 1.0])


@pytest.fixture
def scan(phantom: Path) -> Path:
    return find_cases(phantom)[0].ct


@pytest.fixture
def copy(scan: Path, tmp_path: Path):
    """Saves the phantom's first scan under a name, with its array, affine or header changed."""

    def save(name: str = "scan.nii.gz", array=None, affine=None, change=lambda image: None) -> Path:
        image = nib.load(scan)
        values = np.asarray(image.dataobj) if array is None else array
        changed = nib.Nifti1Image(values, image.affine if affine is None else affine)
        change(changed)
        nib.save(changed, tmp_path / name)
        return tmp_path / name

    return save


def same(path: Path, scan: Path) -> None:
    np.testing.assert_array_equal(read_volume(path).values, read_volume(scan).values)


def test_suffixes_are_known_in_any_case_and_hidden_files_are_left_out(copy, tmp_path: Path) -> None:
    shutil.copy(copy(), tmp_path / "TWO.NII.GZ")
    for hidden in (".hidden.nii", "._scan.nii.gz"):
        (tmp_path / hidden).write_bytes(b"AppleDouble")
    assert [source.name for source in find_sources(tmp_path)] == ["TWO", "scan"]


def test_a_table_of_formats_serves_everything_that_reads(phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom, tmp_path / "data")
    (tmp_path / "data" / "metadata.csv").unlink()
    for path in sorted((tmp_path / "data" / "ct_scans").iterdir())[:1]:
        image = nib.load(path)
        np.savez(path.with_suffix(".npz"), values=np.asarray(image.dataobj), affine=image.affine)
        path.unlink()

    def open_npz(source: Source):
        arrays = np.load(source.path)
        return nullcontext(scan_from_array(arrays["values"], arrays["affine"]))

    readers = READERS | {"npz": Reader(by_suffix((".npz",)), open_npz, file_digest)}
    before = prepare_cases(find_cases(phantom)[:1], PreprocessConfig(image_size=32), tmp_path / "cache")
    cases = find_cases(tmp_path / "data", readers)
    assert cases[0].ct.suffix == ".npz"
    after = prepare_cases(cases[:1], PreprocessConfig(image_size=32), tmp_path / "cache", readers)
    np.testing.assert_array_equal(before[0].images, after[0].images)
    with pytest.raises(InputError, match="formats that are read: nifti"):
        read_volume(cases[0].ct)


def test_digest_follows_the_content(copy) -> None:
    path = copy()
    before = digest(path)
    os.utime(path, (0, 0))
    assert digest(path) == before
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    assert digest(path) != before


def test_a_grid_without_a_header_gives_a_file_with_its_affine(tmp_path: Path) -> None:
    grid = Grid((4, 5, 6), AFFINE)
    mask = np.zeros(grid.oriented_shape, np.uint8)
    mask[1, 2, 3] = 1
    write_nifti(tmp_path / "mask.nii.gz", mask, grid)
    np.testing.assert_array_equal(nib.load(tmp_path / "mask.nii.gz").affine, AFFINE)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii.gz", Path("scan"), grid), mask)


@pytest.mark.parametrize("name", ["plain.nii.gz", "packed.nii"])
def test_files_that_are_not_packed_as_their_name_says_are_read(copy, scan: Path, tmp_path: Path, name: str) -> None:
    raw = copy("scan.nii").read_bytes()
    (tmp_path / name).write_bytes(raw if name == "plain.nii.gz" else gzip.compress(raw))
    same(tmp_path / name, scan)


def test_trailing_axes_of_length_1_are_dropped(copy, scan: Path) -> None:
    values = np.asarray(nib.load(scan).dataobj)
    same(copy(array=values[..., None, None]), scan)
    with pytest.raises(InputError, match="three dimensions"):
        read_volume(copy(array=np.stack([values, values], axis=-1)))


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1e-3), ("micron", 1e3)])
def test_header_units_are_converted(copy, scan: Path, unit: str, scale: float) -> None:
    affine = nib.load(scan).affine.copy()
    affine[:3] *= scale
    grid = read_grid(copy(affine=affine, change=lambda image: image.header.set_xyzt_units(unit)))
    assert grid.voxel_ml == pytest.approx(read_grid(scan).voxel_ml, rel=1e-5)
    assert grid.spacing_mm == pytest.approx(read_grid(scan).spacing_mm, rel=1e-5)


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1e-3), ("mm", 1), ("micron", 1e3)])
def test_sform_and_qform_are_compared_in_mm(copy, scan: Path, unit: str, scale: float) -> None:
    affine = nib.load(scan).affine.copy()
    for moved_mm, problems in ((0.1, 0), (40, 1)):

        def change(image: nib.Nifti1Image, moved_mm: float = moved_mm) -> None:
            image.header.set_xyzt_units(unit)
            image.set_sform(np.diag([scale, scale, scale, 1]) @ affine, 1)
            moved = affine.copy()
            moved[0, 3] += moved_mm
            image.set_qform(np.diag([scale, scale, scale, 1]) @ moved, 1)

        found = [text for _, text in header_problems(read_grid(copy(change=change)))]
        assert len(found) == problems
    assert "sform and qform lie 40.0 mm apart" in found[0]


@pytest.mark.parametrize("code", [2 + 128, 7, 255])
def test_codes_of_no_known_unit_are_millimetres(copy, scan: Path, code: int) -> None:
    def change(image: nib.Nifti1Image) -> None:
        image.header["xyzt_units"] = code

    path = copy(change=change)
    assert nib.load(path).header["xyzt_units"] == code
    same(path, scan)


def test_a_qform_serves_where_the_sform_is_empty(copy, scan: Path) -> None:
    path = copy("scan.nii", change=lambda image: image.set_qform(image.affine, 1))
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)  # srow_x to srow_z
    path.write_bytes(content)
    assert not nib.load(path).affine[:3].any()
    np.testing.assert_allclose(read_grid(path).affine, nib.load(scan).affine, atol=1e-4)
    same(path, scan)
    (problem,) = [text for _, text in header_problems(read_grid(path))]
    assert problem == "the sform says nothing; the qform is used, set the sform equal to it"


def test_a_qform_that_is_no_rotation_is_a_finding_or_refused(copy) -> None:
    path = copy("scan.nii", change=lambda image: (image.set_sform(image.affine, 1), image.set_qform(image.affine, 1)))
    content = bytearray(path.read_bytes())
    content[256:268] = np.array([1.001, 0, 0], "<f4").tobytes()  # quatern_b to quatern_d
    path.write_bytes(content)
    assert [kind for kind, _ in header_problems(read_grid(path))] == ["affine"]
    content[280:328] = bytes(48)  # srow_x to srow_z
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path.name}: its affine does not say"):
        read_grid(path)


def test_what_one_may_not_look_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for name, call, message in (
        ("iterdir", list_sources, "cannot be listed"),
        ("stat", find_sources, "cannot be read"),
        ("open", find_cases, "metadata.csv: cannot be read"),
    ):
        (tmp_path / "metadata.csv").touch()
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, refuse)
            with pytest.raises(
                InputError, match=rf"^{re.escape(str(tmp_path))}.*{message} \(Permission denied\); .* permissions$"
            ):
                call(tmp_path)


def test_no_temporary_folder_at_all_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "TemporaryFile", none)
    with (
        pytest.raises(InputError, match=r"a\.nii\.gz: no temporary folder .* set TMPDIR"),
        temporary_file(1, "a.nii.gz"),
    ):
        pass


def test_a_full_temporary_folder_is_named_before_anything_is_written(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(*_) -> None:
        raise OSError(28, "No space left on device")

    grid = read_grid(scan)
    monkeypatch.setattr(disk, "reserve", is_full)
    with (
        pytest.raises(InputError, match=r"no room for .* set TMPDIR"),
        nifti_writer(tmp_path / "a.nii", np.uint8, grid),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_labels_that_are_off_by_rounding_are_labels(copy, scan: Path) -> None:
    grid = read_grid(scan)
    labels = (np.asarray(nib.load(scan).dataobj) < -600).astype(np.float32)
    off = copy("off.nii.gz", array=labels * np.float32(1.00001526))
    np.testing.assert_array_equal(
        read_mask(off, scan, grid), read_mask(copy("mask.nii.gz", array=labels.astype(np.uint8)), scan, grid)
    )
    with pytest.raises(InputError, match="whole labels"):
        read_mask(copy("half.nii.gz", array=labels * np.float32(0.5)), scan, grid)


def test_a_mask_is_oriented_by_its_scan(copy, scan: Path) -> None:
    """Near 45° the axes of two affines that are 0.002 mm apart may round to other directions."""
    values = np.asarray(nib.load(scan).dataobj)[:40, :40]
    affines = []
    for degrees in (45 - 1e-4, 45 + 1e-4):
        cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        affines.append(np.array([[-2 * cos, 2 * sin, 0, 0], [-2 * sin, -2 * cos, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1.0]]))
    grids = [read_grid(copy(f"{i}.nii.gz", array=values, affine=affine)) for i, affine in enumerate(affines)]
    assert nib.aff2axcodes(affines[0]) != nib.aff2axcodes(affines[1])
    labels = (values < -600).astype(np.uint8)
    mask = copy("mask.nii.gz", array=labels, affine=affines[1])
    np.testing.assert_array_equal(read_mask(mask, scan, grids[0]), grids[0].to_pls(labels))


def test_a_sheared_grid_is_known() -> None:
    sheared = AFFINE.copy()
    sheared[1, 2] = 5 * np.tan(np.deg2rad(5))
    assert Grid((4, 4, 4), sheared).is_sheared
    assert not Grid((4, 4, 4), AFFINE).is_sheared
    turned = np.eye(4)
    turned[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    assert not Grid((4, 4, 4), turned @ AFFINE).is_sheared


def test_what_cannot_be_read_is_named_with_its_cause(copy, tmp_path: Path) -> None:
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "none.nii.gz")
    (tmp_path / "folder.nii").mkdir()
    for name, cause in (("link.nii.gz", "its link points to nothing"), ("folder.nii", "a folder, where a file")):
        with pytest.raises(InputError, match=f"{name}: {cause}"), open_scan(tmp_path / name):
            pass
    assert {source.path.name for source in list_sources(tmp_path)} == {"link.nii.gz", "folder.nii"}
