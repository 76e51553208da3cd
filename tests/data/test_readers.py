import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.cases import find_cases
from resunet_jax.data.readers import READERS, Reader, Source, digest, find_sources, list_sources, read_mask, read_volume
from resunet_jax.data.readers.nifti import form_codes
from resunet_jax.data.readers.source import by_suffix, file_digest
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.data.volume import Grid, Scan, scan_from_array
from resunet_jax.errors import InputError
from tests.conftest import write_nifti

AFFINE = np.diag([-0.7, -0.8, 5.0, 1.0])
CONFIG = PreprocessConfig(image_size=16)


@contextmanager
def open_npy(source: Source) -> Iterator[Scan]:
    yield scan_from_array(np.load(source.path), AFFINE)


NPY = {"npy": Reader(by_suffix((".npy",)), open_npy, file_digest)}


def body(shape: tuple[int, int, int] = (24, 20, 5)) -> np.ndarray:
    """HU of a block in air, with two lungs."""
    hu = np.full(shape, -1000, np.int16)
    hu[4:20, 4:16] = 40
    hu[6:10, 6:14] = hu[14:18, 6:14] = -800
    return hu + np.random.default_rng(0).integers(-20, 20, shape).astype(np.int16)


def npy_set(folder: Path) -> Path:
    """One case of .npy files in Kaggle's layout."""
    hu = body()
    arrays = {
        "ct_scans": hu,
        "lung_mask": (np.abs(hu + 800) < 30).astype(np.uint8),
        "infection_mask": np.zeros(hu.shape, np.uint8),
    }
    for name, array in arrays.items():
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "hospital_7.npy", array)
    return folder


def test_suffixes_are_known_in_any_case_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("b.NII", "a.Nii.Gz", "._c.nii", ".d.nii.gz", "e.txt", "nii", "f.nii.bak"):
        (tmp_path / name).touch()
    assert list_sources(tmp_path) == [
        Source(tmp_path / "a.Nii.Gz", "a", format="nifti"),
        Source(tmp_path / "b.NII", "b", format="nifti"),
    ]
    assert list_sources(tmp_path / "b.NII") == [Source(tmp_path / "b.NII", "b", format="nifti")]
    assert (
        list_sources(tmp_path / "._c.nii") == list_sources(tmp_path / "e.txt") == list_sources(tmp_path / "none") == []
    )


@pytest.mark.parametrize("suffix", [".NII", ".nii.GZ"])
def test_files_with_upper_case_suffixes_are_read(tmp_path: Path, suffix: str) -> None:
    write_nifti(tmp_path / "plain.nii", body().transpose(1, 0, 2), Grid(body().shape, AFFINE))
    image = nib.load(tmp_path / "plain.nii")
    upper = tmp_path / f"scan{suffix}"
    nib.save(image, tmp_path / f"scan{suffix.lower()}")
    (tmp_path / f"scan{suffix.lower()}").rename(upper)
    np.testing.assert_array_equal(read_volume(upper).values, read_volume(tmp_path / "plain.nii").values)


def test_what_is_no_scan_is_refused_with_the_formats(tmp_path: Path) -> None:
    readers = READERS | NPY
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"none: no such file or folder"):
        find_sources(tmp_path / "none", readers)
    with pytest.raises(InputError, match=r"no scan in it; formats that are read: nifti, dicom, itk, npy; convert it"):
        find_sources(tmp_path, readers)
    with pytest.raises(
        InputError, match=r"a\.txt: not a scan; formats that are read: nifti, dicom, itk, npy; convert it"
    ):
        find_sources(tmp_path / "a.txt", readers)
    (tmp_path / "a.nii").touch()
    (tmp_path / "A.npy").touch()
    with pytest.raises(InputError, match=r"A\.npy and a\.nii would write the same masks"):
        find_sources(tmp_path, readers)


def test_a_table_of_readers_serves_every_step(tmp_path: Path) -> None:
    data = npy_set(tmp_path / "data")
    with pytest.raises(InputError, match="no scan in it; formats that are read: nifti"):
        find_cases(data)
    (case,) = find_cases(data, NPY)
    assert (case.id, case.source, case.ct.name) == ("hospital_7", "other", "hospital_7.npy")
    with pytest.raises(InputError, match="not a scan"):
        read_volume(case.ct)
    volume = read_volume(case.ct, NPY)
    np.testing.assert_array_equal(volume.values, body().transpose(1, 0, 2))
    assert (volume.intensity_scale, volume.grid.spacing_mm) == ("hu", pytest.approx((0.8, 0.7, 5.0)))
    with pytest.raises(InputError, match="not a scan"):
        prepare_cases([case], CONFIG, tmp_path / "cache")
    (prepared,) = prepare_cases([case], CONFIG, tmp_path / "cache", NPY)
    assert prepared.images.shape == (5, 16, 16, 1)
    assert prepared.lung.any(axis=(1, 2)).all()
    assert not prepared.infection.any()


def test_metadata_may_name_files_of_any_format(tmp_path: Path) -> None:
    data = npy_set(tmp_path / "data")
    row = ",".join(f"{folder}/hospital_7.npy" for folder in ("ct_scans", "lung_mask", "infection_mask"))
    (data / "metadata.csv").write_text(f"ct_scan,lung_mask,infection_mask\n{row}\n")
    (case,) = find_cases(data, NPY)
    assert (case.id, case.infection_mask) == ("hospital_7", data / "infection_mask" / "hospital_7.npy")
    with pytest.raises(InputError, match=r"hospital_7\.npy: not a scan; formats that are read: nifti"):
        find_cases(data)


def test_one_table_may_mix_formats(tmp_path: Path) -> None:
    data = npy_set(tmp_path / "data")
    mask = data / "lung_mask" / "hospital_7.npy"
    labels = np.load(mask)
    mask.unlink()
    nib.Nifti1Image(labels, AFFINE).to_filename(mask.with_suffix(".nii"))
    (case,) = find_cases(data, READERS | NPY)
    volume = read_volume(case.ct, READERS | NPY)
    lung = read_mask(case.lung_mask, case.ct, volume.grid, READERS | NPY)
    np.testing.assert_array_equal(lung, labels.transpose(1, 0, 2))


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    data = npy_set(tmp_path / "data")
    path = data / "ct_scans" / "hospital_7.npy"
    before = digest(path, NPY)
    assert before == hashlib.sha256(path.read_bytes()).hexdigest()
    np.save(path, body() + 1)
    assert digest(path, NPY) != before
    with pytest.raises(InputError, match="not a scan"):
        digest(path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        digest(path, NPY)


def test_changed_content_is_prepared_anew(tmp_path: Path) -> None:
    data = npy_set(tmp_path / "data")
    cases = find_cases(data, NPY)
    (before,) = prepare_cases(cases, CONFIG, tmp_path / "cache", NPY)
    np.save(cases[0].ct, np.where(np.abs(body() - 40) < 30, body() + 20, body()).astype(np.int16))
    (after,) = prepare_cases(cases, CONFIG, tmp_path / "cache", NPY)
    assert float(np.abs(after.images - before.images).max()) == pytest.approx(20 / 1500, rel=1e-3)


def test_a_path_with_several_scans_is_not_one_scan(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", body())
    np.save(tmp_path / "b.npy", body() + 1)
    with pytest.raises(InputError, match="2 scans in it, where one is expected"):
        read_volume(tmp_path, NPY)


def test_one_of_several_scans_at_a_path_is_opened_by_its_source(tmp_path: Path) -> None:
    """As a DICOM folder holds several series."""
    scans = {"first": body(), "second": body() + 1}

    def find(path: Path) -> list[Source]:
        return [Source(path, f"study_{series}", series) for series in scans] if path.name == "study" else []

    @contextmanager
    def open_series(source: Source) -> Iterator[Scan]:
        yield scan_from_array(scans[source.series], AFFINE)

    readers = {"series": Reader(find, open_series, lambda source: source.series)}
    (tmp_path / "study").mkdir()
    first, second = find_sources(tmp_path / "study", readers)
    assert (first.name, second.name) == ("study_first", "study_second")
    for source in (first, second):
        values = read_volume(source, readers).values
        np.testing.assert_array_equal(values, scans[source.series].transpose(1, 0, 2))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("axes", [[0, 1, 2], [2, 0, 1]])
def test_grids_without_a_header_are_written_with_their_affine(tmp_path: Path, suffix: str, axes: list[int]) -> None:
    affine = np.eye(4)
    affine[:3] = AFFINE[:3][:, [*axes, 3]] + [[0, 0, 0, -20.5], [0, 0, 0, 31.25], [0, 0, 0, 100]]
    grid = Grid((7, 6, 5), affine)
    assert form_codes(grid) is None
    labels = np.random.default_rng(0).integers(0, 3, grid.oriented_shape).astype(np.uint8)
    path = tmp_path / f"mask{suffix}"
    write_nifti(path, labels, grid)
    image = nib.load(path)
    assert (image.shape, image.header.get_xyzt_units()[0]) == (grid.shape, "mm")
    np.testing.assert_array_equal(image.affine, affine.astype(np.float32))
    np.testing.assert_array_equal(read_mask(path, Path("scan"), grid), labels)
    np.testing.assert_array_equal(np.asarray(image.dataobj), grid.from_pls(labels))


def test_files_in_folders_below_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They may be masks beside the scans; or the scans of patients, a folder each."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ct.nii.gz").touch()
    (tmp_path / "two" / "._ct.nii.gz").touch()
    (tmp_path / "two" / ".hidden").mkdir()
    (tmp_path / "two" / ".hidden" / "ct.nii.gz").touch()
    left_out = (
        r": files in folders below it are left out \(2, as one.ct\.nii\.gz\); if they are scans, give that folder"
    )
    with pytest.raises(InputError, match=f"no scan in it{left_out}"):
        find_sources(tmp_path)
    (tmp_path / "scan.nii").touch()
    assert [source.name for source in find_sources(tmp_path)] == ["scan"]
    assert re.search(left_out, caplog.text)
