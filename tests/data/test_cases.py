import csv
import os
import shutil
import sys
from pathlib import Path

import pytest

from resunet_jax.data.cases import KNOWN_CASES, find_cases, identify, require_infection_masks
from resunet_jax.errors import InputError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coronacases_org_001.nii", ("coronacases_001", "coronacases", "coronacases_001")),
        ("Coronacases_ORG_001.nii", ("coronacases_001", "coronacases", "coronacases_001")),
        ("coronacases_010.nii.gz", ("coronacases_010", "coronacases", "coronacases_010")),
        ("coronacases_org_case007.nii", ("coronacases_007", "coronacases", "coronacases_007")),
        (
            "radiopaedia_org_covid-19-pneumonia-10_85902_3-dcm.nii",
            ("radiopaedia_10_85902_3", "radiopaedia", "radiopaedia_10"),
        ),
        ("radiopaedia_10_85902_1.nii", ("radiopaedia_10_85902_1", "radiopaedia", "radiopaedia_10")),
        ("radiopaedia_29_86491_1.nii.gz", ("radiopaedia_29_86491_1", "radiopaedia", "radiopaedia_29")),
        ("hospital_7.nii.gz", ("hospital_7", "other", "hospital_7")),
    ],
)
def test_names(name: str, expected: tuple[str, str, str]) -> None:
    assert identify(name) == expected


def test_the_full_set_has_eighteen_patients() -> None:
    assert len(KNOWN_CASES) == 20
    assert len({identify(case)[2] for case in KNOWN_CASES}) == 18


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """Empty files in Kaggle's layout, sorted differently in the two folders."""
    touch(tmp_path / "ct_scans", "coronacases_org_001.nii", "radiopaedia_org_covid-19-pneumonia-7_85703_0-dcm.nii")
    for folder in ("lung_mask", "infection_mask"):
        touch(tmp_path / folder, "coronacases_001.nii", "radiopaedia_7_85703_0.nii")
    return tmp_path


def write_csv(folder: Path, *rows: tuple[str, str, str], columns=("ct_scan", "lung_mask", "infection_mask")) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


ROWS = (
    (
        "../input/covid19-ct-scans/ct_scans/radiopaedia_org_covid-19-pneumonia-7_85703_0-dcm.nii",
        "../input/covid19-ct-scans/lung_mask/radiopaedia_7_85703_0.nii",
        "../input/covid19-ct-scans/infection_mask/radiopaedia_7_85703_0.nii",
    ),
    (
        "../input/covid19-ct-scans/ct_scans/coronacases_org_001.nii",
        "../input/covid19-ct-scans/lung_mask/coronacases_001.nii",
        "../input/covid19-ct-scans/infection_mask/coronacases_001.nii",
    ),
)


def test_csv_order_and_prefix(kaggle: Path) -> None:
    write_csv(kaggle, *ROWS)
    first, second = find_cases(kaggle)
    assert (first.id, second.id) == ("radiopaedia_7_85703_0", "coronacases_001")
    assert first.ct == kaggle / "ct_scans" / "radiopaedia_org_covid-19-pneumonia-7_85703_0-dcm.nii"
    assert second.infection_mask == kaggle / "infection_mask" / "coronacases_001.nii"


def test_csv_takes_gzipped_files_for_plain_ones(kaggle: Path) -> None:
    write_csv(kaggle, *ROWS)
    ct = kaggle / "ct_scans" / "coronacases_org_001.nii"
    ct.rename(ct.with_name("coronacases_org_001.nii.gz"))
    assert find_cases(kaggle)[1].ct.name == "coronacases_org_001.nii.gz"


def test_csv_without_infection_mask_still_serves_the_lung(kaggle: Path) -> None:
    write_csv(kaggle, (*ROWS[0][:2], ""), ROWS[1])
    cases = find_cases(kaggle)
    assert cases[0].infection_mask is None
    with pytest.raises(InputError, match="radiopaedia_7_85703_0: no infection mask"):
        require_infection_masks(cases)


def test_csv_may_name_patients(kaggle: Path) -> None:
    rows = [(*row, "one person") for row in ROWS]
    write_csv(kaggle, *rows, columns=("ct_scan", "lung_mask", "infection_mask", "patient"))
    assert {case.patient for case in find_cases(kaggle)} == {"one person"}


def test_folders_are_matched_by_name(kaggle: Path) -> None:
    first, second = find_cases(kaggle)
    assert (first.id, first.lung_mask.name) == ("coronacases_001", "coronacases_001.nii")
    assert (second.id, second.lung_mask.name) == ("radiopaedia_7_85703_0", "radiopaedia_7_85703_0.nii")


def test_zenodo_folders(tmp_path: Path) -> None:
    for folder in ("COVID-19-CT-Seg_20cases", "Lung_Mask", "Infection_Mask", "Lung_and_Infection_Mask"):
        touch(
            tmp_path / folder, "coronacases_001.nii.gz", "radiopaedia_4_85506_1.nii.gz", "radiopaedia_40_86625_0.nii.gz"
        )
    # As in metadata.csv, 40 stands before 4.
    assert [case.id for case in find_cases(tmp_path)] == [
        "coronacases_001",
        "radiopaedia_40_86625_0",
        "radiopaedia_4_85506_1",
    ]


def test_known_order_is_the_sorted_order() -> None:
    assert tuple(sorted(KNOWN_CASES)) == KNOWN_CASES


def bad_missing_folder(root: Path) -> str:
    shutil.rmtree(root)
    return "no such folder"


def bad_empty_folder(root: Path) -> str:
    shutil.rmtree(root)
    root.mkdir()
    return "neither metadata.csv nor a folder"


def bad_no_scans(root: Path) -> str:
    for path in (root / "ct_scans").iterdir():
        path.unlink()
    return "no scan in it"


def bad_columns(root: Path) -> str:
    write_csv(root, columns=("ct_scan", "infection_mask", "other"))
    return "no column lung_mask"


def bad_missing_mask(root: Path) -> str:
    (root / "lung_mask" / "coronacases_001.nii").unlink()
    return r"coronacases_org_001\.nii: no lung mask"


def bad_double_mask(root: Path) -> str:
    touch(root / "lung_mask", "coronacases_001.nii.gz")
    return "both match case coronacases_001"


def bad_csv_missing_file(root: Path) -> str:
    write_csv(root, *ROWS)
    (root / "infection_mask" / "coronacases_001.nii").unlink()
    return r"coronacases_001\.nii: no such file, though .*line 3"


def bad_csv_double(root: Path) -> str:
    write_csv(root, ROWS[0], ROWS[0])
    return "is there twice"


def bad_csv_mixed_up(root: Path) -> str:
    write_csv(root, (ROWS[0][0], ROWS[1][1], ROWS[1][2]))
    return "does not belong to"


def bad_csv_infection_mixed_up(root: Path) -> str:
    write_csv(root, (*ROWS[0][:2], ROWS[1][2]))
    return "does not belong to"


def bad_csv_no_lung_mask(root: Path) -> str:
    write_csv(root, (ROWS[0][0], "", ROWS[0][2]))
    return "must both name a file"


def bad_csv_outside(root: Path) -> str:
    write_csv(root, (ROWS[0][0], "../../etc/passwd", ""))
    return "lies outside"


def bad_csv_absolute(root: Path) -> str:
    write_csv(root, (ROWS[0][0], "/etc/passwd", ""))
    return "lies outside"


def bad_csv_binary(root: Path) -> str:
    (root / "metadata.csv").write_bytes(b"\xff\xfe\x00\x01")
    return "not a CSV file"


@pytest.mark.parametrize("spoil", [v for k, v in list(globals().items()) if k.startswith("bad_")])
def test_bad_folders_are_refused_by_name(kaggle: Path, spoil) -> None:
    message = spoil(kaggle)
    with pytest.raises(InputError, match=message):
        find_cases(kaggle)


def test_a_patient_is_known_by_the_scan_or_the_mask(kaggle: Path) -> None:
    """Masks of a second reader have names of their own, which must not make two patients of one."""
    touch(kaggle / "lung_mask", "reader2_a.nii", "reader2_b.nii")
    touch(kaggle / "ct_scans", "scan_x.nii")
    first, second = "ct_scans/coronacases_org_001.nii", "ct_scans/scan_x.nii"
    write_csv(
        kaggle,
        (first, "lung_mask/reader2_a.nii", ""),
        (second, "lung_mask/reader2_b.nii", ""),
        (second, "lung_mask/coronacases_001.nii", ""),
    )
    assert [case.patient for case in find_cases(kaggle)] == ["coronacases_001"] * 3


WITH_PATIENT = ("ct_scan", "lung_mask", "infection_mask", "patient")


def test_rows_of_one_scan_are_of_one_patient(kaggle: Path) -> None:
    """However its path is written, and whether or not each row names the patient."""
    touch(kaggle / "ct_scans", "a.nii")
    touch(kaggle / "lung_mask", "a.nii", "a2.nii", "a3.nii")
    scans = ("ct_scans/a.nii", "ct_scans/../ct_scans/a.nii", "ct_scans/a.nii")
    rows = [(scan, f"lung_mask/{mask}.nii", "") for scan, mask in zip(scans, ("a", "a2", "a3"), strict=True)]
    write_csv(kaggle, *rows)
    assert {case.patient for case in find_cases(kaggle)} == {"a"}
    write_csv(kaggle, *((*row, name) for row, name in zip(rows, ("", "anna", ""), strict=True)), columns=WITH_PATIENT)
    assert {case.patient for case in find_cases(kaggle)} == {"anna"}
    write_csv(kaggle, (*rows[0], "eva"), (*rows[1], "anna"), columns=WITH_PATIENT)
    with pytest.raises(InputError, match=r"metadata\.csv: .*a\.nii is of the patients anna and eva; fix the rows"):
        find_cases(kaggle)


def test_a_known_patient_that_one_row_names_is_the_same_in_the_others(kaggle: Path) -> None:
    names = [f"radiopaedia_10_85902_{number}" for number in (1, 3)]
    for folder in ("ct_scans", "lung_mask"):
        touch(kaggle / folder, *(f"{name}.nii" for name in names))
    rows = [(f"ct_scans/{name}.nii", f"lung_mask/{name}.nii", "") for name in names]
    write_csv(kaggle, (*rows[0], "eva"), (*rows[1], ""), columns=WITH_PATIENT)
    assert [case.patient for case in find_cases(kaggle)] == ["eva", "eva"]


def test_other_columns_are_left_alone(kaggle: Path) -> None:
    write_csv(kaggle, *((*row, "61") for row in ROWS), columns=(*WITH_PATIENT[:3], "patient_age"))
    assert len(find_cases(kaggle)) == 2


@pytest.mark.parametrize("header", [" patient", "Patient", "PATIENT "])
def test_the_column_of_patients_is_known_in_any_case(kaggle: Path, header: str) -> None:
    write_csv(kaggle, *((*row, "eva") for row in ROWS), columns=(" CT_scan", "lung_mask ", "infection_mask", header))
    assert [case.patient for case in find_cases(kaggle)] == ["eva", "eva"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((*WITH_PATIENT[:3], "patient_id"), "the column patient_id is not read; call it patient"),
        ((*WITH_PATIENT, "Patient"), "two columns patient"),
    ],
)
def test_a_column_that_may_tell_patients_is_not_passed_over(
    kaggle: Path, columns: tuple[str, ...], message: str
) -> None:
    write_csv(kaggle, *((*row, *["eva"] * (len(columns) - 3)) for row in ROWS), columns=columns)
    with pytest.raises(InputError, match=rf"metadata\.csv: {message}"):
        find_cases(kaggle)


def test_lines_are_those_of_the_file(kaggle: Path) -> None:
    row = ",".join((ROWS[0][0], "", ""))
    (kaggle / "metadata.csv").write_text(f'ct_scan,lung_mask,infection_mask,"a\nnote"\n\n\n{row},x\n')
    with pytest.raises(InputError, match=r"metadata\.csv, line 5: ct_scan and lung_mask must both"):
        find_cases(kaggle)


def test_a_missing_file_that_two_may_stand_for_is_refused(kaggle: Path) -> None:
    write_csv(kaggle, *ROWS)
    (kaggle / "lung_mask" / "coronacases_001.nii").rename(kaggle / "lung_mask" / "coronacases_001.nii.gz")
    assert find_cases(kaggle)[1].lung_mask.name == "coronacases_001.nii.gz"
    touch(kaggle / "lung_mask", "coronacases_001.mha")
    with pytest.raises(
        InputError, match=r"line 3: .*coronacases_001\.nii may be .*\.mha or .*\.nii\.gz; name the file"
    ):
        find_cases(kaggle)


def test_scans_of_one_name_in_several_folders_are_of_several_patients(kaggle: Path) -> None:
    for patient in ("p1", "p2", "p3"):
        touch(kaggle / patient, "ct.nii", f"{patient}_lung.nii")
    rows = [(f"{patient}/ct.nii", f"{patient}/{patient}_lung.nii", "") for patient in ("p1", "p2", "p3")]
    write_csv(kaggle, *rows)
    assert [case.patient for case in find_cases(kaggle)] == ["p1_lung", "p2_lung", "p3_lung"]
    touch(kaggle / "p1", "second_reader.nii")
    write_csv(kaggle, *rows, ("p1/ct.nii", "p1/second_reader.nii", ""))
    assert [case.patient for case in find_cases(kaggle)] == ["p1_lung", "p2_lung", "p3_lung", "p1_lung"]
    columns = ("ct_scan", "lung_mask", "infection_mask", "patient")
    write_csv(kaggle, (*rows[0], "anna"), (*rows[1], "anna"), (*rows[2], ""), columns=columns)
    assert [case.patient for case in find_cases(kaggle)] == ["anna", "anna", "ct"]


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="such names cannot be made there")
def test_a_name_that_is_no_text_is_refused(kaggle: Path) -> None:
    for folder in ("ct_scans", "lung_mask"):
        (kaggle / folder / "m\udcfcller.nii").touch()
    with pytest.raises(InputError, match=r"the file name of case 'm\\udcfcller' is not UTF-8; rename its files"):
        find_cases(kaggle)


def test_spaces_do_not_make_another_patient_and_empty_lines_are_no_cases(kaggle: Path) -> None:
    row = ("ct_scans/coronacases_org_001.nii", "lung_mask/coronacases_001.nii", "", " anna ")
    columns = ("ct_scan", "lung_mask", "infection_mask", "patient")
    write_csv(kaggle, row, ("", " ", "", ""), ("", "", "", ""), columns=columns)
    assert [case.patient for case in find_cases(kaggle)] == ["anna"]


def test_paths_of_the_csv_are_inside_however_the_folder_is_named(kaggle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder takes absolute paths into it, and none that lead out of it."""

    def write_rows(folder: str) -> None:
        write_csv(kaggle, *(tuple(path.replace("../input/covid19-ct-scans", folder) for path in row) for row in ROWS))

    monkeypatch.chdir(kaggle)
    write_rows(kaggle.as_posix())
    assert [case.id for case in find_cases(Path())] == ["radiopaedia_7_85703_0", "coronacases_001"]
    write_rows("../elsewhere")
    with pytest.raises(InputError, match="lies outside"):
        find_cases(Path())


def test_csv_with_a_name_that_no_file_can_have_is_one_line(kaggle: Path) -> None:
    write_csv(kaggle, ("ct_scans/" + "x" * 300 + ".nii", *ROWS[0][1:]))
    with pytest.raises(InputError, match="no such file"):
        find_cases(kaggle)


def test_csv_with_an_open_quote_is_one_line(kaggle: Path) -> None:
    write_csv(kaggle, *ROWS)
    with (kaggle / "metadata.csv").open("a") as file:
        file.write('"ct_scans/a.nii,lung_mask/a.nii,\nct_scans/b.nii,lung_mask/b.nii,\n')
    with pytest.raises(InputError, match=r"^[^\n]*not a CSV file[^\n]*$"):
        find_cases(kaggle)


def test_a_linked_folder_lies_inside(kaggle: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    disk = tmp_path_factory.mktemp("disk")
    shutil.move(kaggle / "ct_scans", disk / "ct_scans")
    (kaggle / "ct_scans").symlink_to(disk / "ct_scans")
    write_csv(kaggle, *ROWS)
    assert len(find_cases(kaggle)) == len(ROWS)
