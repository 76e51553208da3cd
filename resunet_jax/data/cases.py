"""Which scans there are: the Kaggle layout, Zenodo's folders, patients."""

import csv
import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from resunet_jax.data.readers import READERS, Reader, list_sources
from resunet_jax.errors import InputError, first_line

Source = Literal["coronacases", "radiopaedia", "other"]

COLUMNS = ("ct_scan", "lung_mask", "infection_mask")
LAYOUTS = (
    ("ct_scans", "lung_mask", "infection_mask"),
    ("COVID-19-CT-Seg_20cases", "Lung_Mask", "Infection_Mask"),
)
"""Folders of Kaggle's and of Zenodo's layout, in the order of `COLUMNS`."""
_PATIENT = "patient"  # a column that may be left out
_LIKE_PATIENT = ("patients", "patientid", "patientname", "subject", "subjectid", "person")

_CORONACASES = re.compile(r"coronacases_(?:org_)?(?:case)?0*(\d+)", re.IGNORECASE)
_RADIOPAEDIA = re.compile(r"radiopaedia_(?:org_covid-19-pneumonia-)?((\d+)_\d+_\d+)(?:-dcm)?", re.IGNORECASE)

KNOWN_CASES = (
    *(f"coronacases_{n:03d}" for n in range(1, 11)),
    *(
        f"radiopaedia_{name}"
        for name in (
            "10_85902_1",
            "10_85902_3",
            "14_85914_0",
            "27_86410_0",
            "29_86490_1",
            "29_86491_1",
            "36_86526_0",
            "40_86625_0",
            "4_85506_1",
            "7_85703_0",
        )
    ),
)
"""Case ids of the full set, in the order of its metadata.csv."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One scan and the masks that belong to it.

    Attributes:
      id: the base name of its masks, as in "coronacases_001" or "radiopaedia_7_85703_0".
      source: where the scan comes from, inferred from its name.
      patient: scans with the same value show the same person.
      ct: the scan.
      lung_mask: labels of the lungs.
      infection_mask: labels of the infection, or None where nobody has drawn them.
    """

    id: str
    source: Source
    patient: str
    ct: Path
    lung_mask: Path
    infection_mask: Path | None


def find_cases(data_dir: Path, readers: Mapping[str, Reader] = READERS) -> list[Case]:
    """Lists the scans of a data folder.

    Takes Kaggle's layout with or without metadata.csv, and Zenodo's. An optional column `patient` in the CSV says which
    scans show the same person; where it is empty, the known doubles are recognised by their names. Rows of one scan, as
    by several readers, are of one patient.

    Returns:
      The cases, in the order of metadata.csv, or by id without one.

    Raises:
      InputError: no such folder, no scan in it, columns or files missing, doubly matched, or outside the folder, a
        scan of two patients.
    """
    cases, problems = list_cases(data_dir, readers)
    if problems:
        raise problems[0]
    return cases


def list_cases(data_dir: Path, readers: Mapping[str, Reader] = READERS) -> tuple[list[Case], list[InputError]]:
    """As `find_cases`, but with the problems of single cases returned next to the good cases.

    Raises:
      InputError: nothing can be listed: no such folder, no scan in it, columns missing or doubled, one scan of two
        patients.
    """
    if not data_dir.is_dir():
        raise InputError(f"{data_dir}: no such folder; give the data set's folder with `data_dir`")
    metadata = data_dir / "metadata.csv"
    problems: list[InputError] = []
    if metadata.is_file():
        cases = _from_csv(metadata, problems, readers)
    else:
        for folders in LAYOUTS:
            if (data_dir / folders[0]).is_dir():
                cases = _from_folders(data_dir, folders, problems, readers)
                break
        else:
            raise InputError(
                f"{data_dir}: neither metadata.csv nor a folder {LAYOUTS[0][0]}/ or {LAYOUTS[1][0]}/ in it; "
                "lay the scans out as the Kaggle set does (README, 'Your data')"
            )
    if not cases and not problems:
        formats = ", ".join(readers)
        raise InputError(f"{data_dir}: no scan in it; formats that are read: {formats} (README, 'Your data')")
    return _without_doubles(metadata if metadata.is_file() else data_dir, cases, problems), problems


def require_infection_masks(cases: Iterable[Case]) -> None:
    """Raises `InputError` if a case has no infection mask, naming it."""
    for case in cases:
        if case.infection_mask is None:
            raise InputError(f"{case.id}: no infection mask for {case.ct}; add it, or leave the case out")


def identify(name: str) -> tuple[str, Source, str]:
    """Infers (case id, source, patient) from the file name of a scan or mask, with or without its suffix."""
    stem = _stem(name)
    if match := _CORONACASES.fullmatch(stem):
        case = f"coronacases_{int(match[1]):03d}"
        return case, "coronacases", case
    if match := _RADIOPAEDIA.fullmatch(stem):
        return f"radiopaedia_{match[1]}", "radiopaedia", f"radiopaedia_{match[2]}"
    return stem, "other", stem


def _stem(name: str) -> str:
    stem = name[:-3] if name.lower().endswith(".gz") else name
    return (stem[:-4] if stem.lower().endswith(".nii") else stem).strip()


def _name(path: Path, readers: Mapping[str, Reader]) -> str:
    """A file's name without the suffix of its format; raises `InputError` where no reader knows that."""
    sources = list_sources(path, readers)
    if not sources:
        raise InputError(f"{path}: not a scan; formats that are read: {', '.join(readers)}; convert it first")
    return sources[0].name


def _without_doubles(where: Path, cases: Iterable[Case], problems: list[InputError]) -> list[Case]:
    found: dict[str, Case] = {}
    for case in cases:
        if case.id.encode(errors="replace").decode() != case.id:  # of a file name in another encoding
            problems.append(InputError(f"{where}: the file name of case {case.id!r} is not UTF-8; rename its files"))
        elif case.id in found:
            problems.append(InputError(f"{where}: case {case.id} is there twice; remove one, or rename its files"))
        else:
            found[case.id] = case
    return list(found.values())


def _from_csv(metadata: Path, problems: list[InputError], readers: Mapping[str, Reader]) -> list[Case]:
    try:
        with metadata.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or []]
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{metadata}: not a CSV file ({error}); export it as UTF-8 CSV") from error
    except OSError as error:
        raise InputError(f"{metadata}: cannot be read ({first_line(error)}); change its permissions") from error
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise InputError(f"{metadata}: no column {missing[0]}; it must have {', '.join(COLUMNS)}")
    for column in (*COLUMNS, _PATIENT):
        if columns.count(column) > 1:
            raise InputError(f"{metadata}: two columns {column}; remove one")
    alike = [column for column in columns if re.sub(r"[\W_]", "", column) in _LIKE_PATIENT]
    if alike and _PATIENT not in columns:
        raise InputError(
            f"{metadata}: the column {alike[0]} is not read; call it {_PATIENT}, or splits may part a person's scans"
        )
    cases = []
    for line, row in rows:
        if not any((row.get(column) or "").strip() for column in COLUMNS):
            continue  # an empty line
        try:
            cases.append(_from_row(metadata, line, row, readers))
        except InputError as problem:
            problems.append(problem)
    return _with_patients(metadata, cases, readers)


def _from_row(metadata: Path, line: int, row: dict[str, str | None], readers: Mapping[str, Reader]) -> Case:
    paths = {column: _resolve(metadata, line, row[column], readers) for column in COLUMNS}
    ct, lung_mask, infection_mask = (paths[column] for column in COLUMNS)
    if ct is None or lung_mask is None:
        raise InputError(f"{metadata}, line {line}: ct_scan and lung_mask must both name a file")
    case_id, source, _ = identify(_name(lung_mask, readers))
    for path in (ct, infection_mask):
        other, other_source, _ = (case_id, source, "") if path is None else identify(_name(path, readers))
        if "other" not in (source, other_source) and other != case_id:
            raise InputError(f"{metadata}, line {line}: {path} does not belong to {lung_mask}; fix the row")
    return Case(case_id, source, (row.get(_PATIENT) or "").strip(), ct, lung_mask, infection_mask)


def _with_patients(metadata: Path, cases: Sequence[Case], readers: Mapping[str, Reader]) -> list[Case]:
    """Tells the patients that the CSV does not name."""
    by_scan: dict[str, list[Case]] = {}
    for case in cases:
        by_scan.setdefault(os.path.realpath(case.ct), []).append(case)
    named, known, alike = {}, {}, Counter[str]()
    also_called: dict[str, set[str]] = {}  # known patients by the names that the CSV has for them
    for scan, rows in by_scan.items():
        names = sorted({row.patient for row in rows} - {""})
        if len(names) > 1:
            raise InputError(f"{metadata}: {rows[0].ct} is of the patients {' and '.join(names)}; fix the rows")
        named[scan], known[scan] = names[0] if names else "", _known_patient(rows, readers)
        if named[scan]:
            also_called.setdefault(known[scan], set()).add(named[scan])
        elif not known[scan]:
            alike[_patient(rows[0].ct, readers)] += 1

    def patient(scan: str) -> str:
        if named[scan] or known[scan]:
            names = also_called.get(known[scan], set())
            return named[scan] or (min(names) if len(names) == 1 else known[scan])
        # Of scans in several folders that have one name, as in p1/ct.nii and p2/ct.nii, it does not say whose they are.
        first, name = by_scan[scan][0], _patient(by_scan[scan][0].ct, readers)
        return first.id if alike[name] > 1 else name

    return [dataclasses.replace(case, patient=patient(os.path.realpath(case.ct))) for case in cases]


def _patient(path: Path, readers: Mapping[str, Reader]) -> str:
    return identify(_name(path, readers))[2]


def _known_patient(rows: Iterable[Case], readers: Mapping[str, Reader]) -> str:
    """Told by the first of the scan's and masks' names that is a known one; "" without one."""
    paths = [path for row in rows for path in (row.ct, row.lung_mask, row.infection_mask) if path is not None]
    identified = (identify(_name(path, readers)) for path in paths)
    return next((patient for _, source, patient in identified if source != "other"), "")


def _resolve(metadata: Path, line: int, text: str | None, readers: Mapping[str, Reader]) -> Path | None:
    """A path of the CSV under the data folder, Kaggle's `../input/<set>/` prefix dropped.

    A file that is not there may be there in another format, as Kaggle's .nii as .nii.gz.
    """
    if not text or not text.strip():
        return None
    parts = PurePosixPath(text.strip().replace("\\", "/")).parts
    if parts[:2] == ("..", "input"):
        parts = parts[3:]
    data_dir = metadata.parent
    path = data_dir / str(PurePosixPath(*parts))
    folder, file = (Path(os.path.normpath(one.absolute())) for one in (data_dir, path))  # folders may be links
    if not file.is_relative_to(folder):
        raise InputError(f"{metadata}, line {line}: {text} lies outside {data_dir}; only files inside are read")
    if os.path.exists(path):  # noqa: PTH110 - false for a name that no file can have, where `Path` raises
        return path
    sources = (source for source in list_sources(path.parent, readers) if source.name == _stem(path.name))
    others = [source.path for source in sources if source.path.exists()]
    if len(others) == 1:
        return others[0]
    if len(others) > 1:
        raise InputError(f"{metadata}, line {line}: {text} may be {' or '.join(map(str, others))}; name the file")
    raise InputError(f"{path}: no such file, though {metadata} names it in line {line}; add it or fix the row")


def _from_folders(
    data_dir: Path, folders: Sequence[str], problems: list[InputError], readers: Mapping[str, Reader]
) -> list[Case]:
    ct_dir, lung_dir, infection_dir = (data_dir / folder for folder in folders)
    lung_masks, infection_masks = (_by_id(folder, problems, readers) for folder in (lung_dir, infection_dir))
    cases = []
    for case_id, ct in sorted(_by_id(ct_dir, problems, readers).items()):
        if case_id in lung_masks:
            lung_mask, infection_mask = lung_masks[case_id], infection_masks.get(case_id)
            case = Case(case_id, identify(case_id)[1], "", ct, lung_mask, infection_mask)
            patient = _known_patient([case], readers) or _patient(ct, readers)
            cases.append(dataclasses.replace(case, patient=patient))
        else:
            problems.append(InputError(f"{ct}: no lung mask for it in {lung_dir}; its name should begin {case_id}.nii"))
    return cases


def _by_id(folder: Path, problems: list[InputError], readers: Mapping[str, Reader]) -> dict[str, Path]:
    """Scans or masks of a folder by case id; an absent folder has none."""
    found: dict[str, Path] = {}
    for source in list_sources(folder, readers):
        case_id = identify(source.name)[0]
        if case_id in found:
            problems.append(
                InputError(f"{found[case_id]} and {source.path} both match case {case_id}; remove one of them")
            )
        else:
            found[case_id] = source.path
    return found
