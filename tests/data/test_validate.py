import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from resunet_jax.data import validate as module
from resunet_jax.data.cases import Case, find_cases
from resunet_jax.data.readers import READERS
from resunet_jax.data.validate import KNOWN_SLICES, check_data
from resunet_jax.data.volume import Grid
from resunet_jax.errors import InputError


@pytest.fixture
def copy(phantom: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phantom, tmp_path / "set"))


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    image = nib.load(path)
    array = edit(np.asarray(image.dataobj).copy())
    path.unlink()
    nib.Nifti1Image(array, image.affine).to_filename(path)


def corner(mask: Any) -> Any:
    mask[:4, :4] = 1  # in the air around the body
    return mask


def spot(mask: Any) -> Any:
    mask[:3, :3, 5] = 1  # in the air around the body
    return mask


def kinds(folder: Path) -> set[tuple[str, str, str]]:
    return {(finding.severity, finding.case, finding.kind) for finding in check_data(folder).findings}


def test_known_table_adds_up_to_the_published_totals() -> None:
    assert sum(slices for slices, _ in KNOWN_SLICES.values()) == 3520
    # The first eight of each source: 2,879 slices, 1,475 with infection.
    ids = list(KNOWN_SLICES)
    counts = [KNOWN_SLICES[case] for case in ids[:8] + ids[10:18]]
    assert tuple(map(sum, zip(*counts, strict=True))) == (2879, 1475)


def test_counts_are_compared_where_a_case_has_the_known_number_of_slices() -> None:
    def differing(*counts: tuple[int, int]) -> list[str]:
        names = ("coronacases_001", "coronacases_002")
        summaries = [
            SimpleNamespace(case=case, slices=slices, infected_slices=infected)
            for case, (slices, infected) in zip(names, counts, strict=True)
        ]
        return [finding.case for finding in module._against_known(summaries)]

    first, second = KNOWN_SLICES["coronacases_001"], KNOWN_SLICES["coronacases_002"]
    assert differing(first, second) == []
    assert differing(first, (99, second[1])) == ["coronacases_002"]
    assert differing(first, (second[0], 99)) == ["coronacases_002"]
    assert differing((9, 1), (9, 1)) == []


def test_the_full_set_is_complete_with_all_cases_and_slices(phantom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined = [module._examine(case, READERS, None) for case in find_cases(phantom)]
    monkeypatch.setattr(module, "parallel_map", lambda *_: examined)
    known = {one.summary.case: (one.summary.slices, one.summary.infected_slices) for one in examined}
    monkeypatch.setattr(module, "KNOWN_CASES", tuple(known))
    monkeypatch.setattr(module, "KNOWN_SLICES", known)
    check = check_data(phantom)
    assert (check.is_complete, check.missing) == (True, ())
    known["coronacases_001"] = (known["coronacases_001"][0] + 1, 3)
    assert not check_data(phantom).is_complete
    monkeypatch.setattr(module, "KNOWN_CASES", ("coronacases_010",))
    check = check_data(phantom)
    assert (check.is_complete, check.missing) == (False, ())


def test_phantom_is_clean(phantom: Path) -> None:
    check = check_data(phantom)
    assert check.findings == ()
    assert check.can_train
    assert not check.is_complete
    assert len(check.missing) == 14
    assert check.cases[0].case == "coronacases_001"
    first = check.cases[0]
    mask = np.asarray(nib.load(phantom / "infection_mask" / "coronacases_001.nii").dataobj)
    assert first.infected_slices == int(mask.any(axis=(0, 1)).sum())
    assert (first.intensity_scale, first.lung_labels, first.axes) == ("hu", (1, 2), "LPS")


def test_eight_planted_faults_are_all_found(copy: Path) -> None:
    lung, infection, ct = copy / "lung_mask", copy / "infection_mask", copy / "ct_scans"
    # 1 infection outside the lung, 2 raw values without their intercept, 3 a mask of another shape,
    # 4 sides swapped, 5 labels of the combined mask, 6 lung mirrored, 7 one scan under two names, 8 a mask too many
    change(infection / "coronacases_001.nii", spot)
    change(ct / "coronacases_org_002.nii", lambda hu: (hu + 1024).astype(np.int16))
    change(infection / "coronacases_003.nii", lambda mask: mask[:-1])
    change(lung / "coronacases_003.nii", lambda mask: (np.where(mask > 0, 3 - mask, 0)).astype(np.uint8))
    change(infection / "radiopaedia_10_85902_1.nii", lambda mask: (mask * 3).astype(np.uint8))
    change(lung / "radiopaedia_10_85902_3.nii", lambda mask: mask[..., ::-1])
    shutil.copy(ct / "coronacases_org_001.nii", ct / "hospital_1.nii")
    shutil.copy(lung / "coronacases_001.nii", lung / "hospital_1.nii")
    shutil.copy(lung / "coronacases_001.nii", lung / "stray.nii")
    (copy / "metadata.csv").unlink()

    found = kinds(copy)
    assert {
        ("warning", "coronacases_001", "infection outside lung"),
        ("error", "coronacases_002", "scan"),
        ("error", "coronacases_003", "mask"),
        ("warning", "coronacases_003", "sides"),
        ("warning", "radiopaedia_10_85902_1", "labels"),
        ("error", "radiopaedia_10_85902_3", "mirrored"),
        ("error", "hospital_1", "duplicate"),
        ("warning", "", "names"),
    } <= found
    check = check_data(copy)
    assert not check.can_train
    assert [finding.severity for finding in check.findings] == sorted(finding.severity for finding in check.findings)
    texts = [finding.text for finding in check.findings if finding.case or finding.kind == "names"]
    assert all(str(copy) in text and (";" in text or "," in text) for text in texts)


@pytest.mark.parametrize(
    ("folder", "name", "edit", "expected"),
    [
        ("lung_mask", "coronacases_001.nii", np.zeros_like, ("error", "empty")),
        ("infection_mask", "coronacases_001.nii", np.zeros_like, ("warning", "empty")),
        ("lung_mask", "coronacases_001.nii", corner, ("error", "lung outside body")),
        ("ct_scans", "coronacases_org_001.nii", lambda hu: -300 - hu, ("error", "scan")),
    ],
)
def test_one_fault(copy: Path, folder: str, name: str, edit: Callable[[Any], Any], expected: tuple[str, str]) -> None:
    change(copy / folder / name, edit)
    assert (expected[0], "coronacases_001", expected[1]) in kinds(copy)


def test_masks_that_lie_elsewhere(copy: Path) -> None:
    lung, infection, ct = copy / "lung_mask", copy / "infection_mask", copy / "ct_scans"
    image = nib.load(lung / "coronacases_001.nii")
    inside = np.asarray(image.dataobj) > 0
    moved = np.roll(inside, 1, 0)  # as large as the lung
    ml = (moved & ~inside).sum() * abs(np.linalg.det(image.affine[:3, :3])) / 1000
    hu = np.asarray(nib.load(ct / "coronacases_org_002.nii").dataobj)
    change(infection / "coronacases_001.nii", lambda _: moved.astype(np.uint8))
    change(lung / "coronacases_002.nii", lambda _: ((hu > -100) & (hu < 200)).astype(np.uint8))
    change(lung / "coronacases_003.nii", spot)
    findings = check_data(copy).findings
    (first,) = [finding for finding in findings if finding.case == "coronacases_001"]
    assert first.kind == "infection outside lung"
    assert f", {ml:.1f} ml)" in first.text
    found = {(finding.severity, finding.case, finding.kind) for finding in findings}
    assert ("error", "coronacases_002", "lung") in found
    assert ("warning", "coronacases_003", "lung outside body") in found


def test_a_mirrored_mask_is_told_with_its_axis(copy: Path) -> None:
    def mirror(mask: Any, axis: int) -> Any:
        mask = np.where(mask == 1, mask, 0).astype(np.uint8)  # the front of the left lung, which has no symmetry
        columns = np.flatnonzero(mask.any(axis=(0, 2)))
        mask[:, columns[len(columns) // 2] :] = 0
        return np.flip(mask, axis)

    expected = {"coronacases_001": "front to back", "coronacases_002": "head to foot"}
    for case, axis in zip(expected, (1, 2), strict=True):
        change(copy / "lung_mask" / f"{case}.nii", functools.partial(mirror, axis=axis))
    found = [finding for finding in check_data(copy).findings if finding.kind == "mirrored"]
    assert [finding.case for finding in found] == list(expected)
    for finding in found:
        assert f"better mirrored {expected[finding.case]}" in finding.text


def test_empty_masks_are_no_duplicates_and_other_labels_are_told(copy: Path) -> None:
    infection = copy / "infection_mask"
    for name in ("coronacases_001.nii", "coronacases_002.nii"):
        change(infection / name, np.zeros_like)
    change(infection / "coronacases_003.nii", lambda mask: (mask * 2).astype(np.uint8))
    found = kinds(copy)
    assert "duplicate" not in {kind for _, _, kind in found}
    assert ("warning", "coronacases_003", "labels") in found


def test_another_window(copy: Path) -> None:
    scan = next((copy / "ct_scans").glob("radiopaedia*"))
    change(scan, lambda values: np.clip(values.astype(int) + 17, 0, 255).astype(np.uint8))  # HU [-1350, 150]
    case = next(case for case in find_cases(copy) if case.ct == scan)
    assert kinds(copy) == {("warning", case.id, "window")}
    summaries = {summary.case: summary for summary in check_data(copy).cases}
    assert summaries[case.id].air_hu == pytest.approx(-900, abs=9)
    assert summaries["coronacases_001"].air_hu is None


def test_masks_in_each_others_place(copy: Path) -> None:
    lung, infection = (copy / folder / "coronacases_001.nii" for folder in ("lung_mask", "infection_mask"))
    kept = lung.read_bytes()
    lung.write_bytes(infection.read_bytes())
    infection.write_bytes(kept)
    assert ("error", "coronacases_001", "swapped") in kinds(copy)
    lung.write_bytes(kept)
    assert ("error", "coronacases_001", "same") in kinds(copy)


def test_geometry(copy: Path) -> None:
    for folder, name in (
        ("ct_scans", "coronacases_org_001.nii"),
        ("lung_mask", "coronacases_001.nii"),
        ("infection_mask", "coronacases_001.nii"),
    ):
        image = nib.load(copy / folder / name)
        array = np.asarray(image.dataobj).copy()
        (copy / folder / name).unlink()
        plain = nib.Nifti1Image(array, np.diag([-1.0, -1, 1, 1]))
        plain.set_qform(np.diag([1.0, -1, -1, 1]), 1)
        plain.to_filename(copy / folder / name)
    found = kinds(copy)
    assert ("warning", "coronacases_001", "spacing") in found
    assert ("warning", "coronacases_001", "affine") in found


@pytest.mark.parametrize(
    ("spacing", "is_plausible"),
    [
        ((0.7, 0.7, 2.0), True),
        ((0.3, 0.7, 2.0), False),
        ((1.3, 0.7, 2.0), False),
        ((0.7, 0.7, 0.5), False),
        ((0.7, 0.7, 8.0), False),
        ((1.0, 1.0, 1.0), False),
    ],
)
def test_a_spacing_is_plausible_by_the_size_of_the_scan(
    spacing: tuple[float, float, float], is_plausible: bool
) -> None:
    found = []
    affine = np.array([[0, -spacing[1], 0, 0], [-spacing[0], 0, 0, 0], [0, 0, spacing[2], 0], [0, 0, 0, 1.0]])
    case = Case("a", "other", "a", Path("a.nii"), Path("b.nii"), None)
    module._check_geometry(case, Grid((512, 512, 120), affine), lambda severity, kind, text: found.append(kind))
    assert found == ([] if is_plausible else ["spacing"])


@pytest.mark.parametrize(("patients", "count"), [("ab", 0), ("abb", 0), ("abc", 1)])
def test_a_spacing_is_nominal_where_several_patients_share_it(patients: str, count: int) -> None:
    summaries = [SimpleNamespace(spacing_mm=(0.7, 0.7, 1.0), patient=patient) for patient in patients]
    assert len(module._shared_spacing(summaries)) == count


def test_a_missing_file_is_reported_and_the_others_are_checked(copy: Path) -> None:
    (copy / "lung_mask" / "coronacases_002.nii").unlink()
    check = check_data(copy)
    assert [finding.kind for finding in check.findings if finding.severity == "error"] == ["names"]
    assert len(check.cases) == 5


def test_few_patients(copy: Path) -> None:
    rows = (copy / "metadata.csv").read_text().splitlines()
    (copy / "metadata.csv").write_text("\n".join(rows[:3]) + "\n")
    assert ("error", "", "patients") in kinds(copy)


@pytest.mark.parametrize(
    ("patients", "severities"),
    [("a", ["error"]), ("ab", ["error"]), ("abc", ["warning"]), ("abcd", ["warning"]), ("abcde", [])],
)
def test_training_takes_fewer_patients_than_folds(patients: str, severities: list[str]) -> None:
    findings = module._too_few([SimpleNamespace(id=name, patient=name, source="other") for name in patients])
    assert [finding.severity for finding in findings] == severities


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        check_data(tmp_path / "none")
