"""Validation of a data set before training: what is there, what is wrong, what to do about it."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.cases import COLUMNS, KNOWN_CASES, LAYOUTS, Case, list_cases
from resunet_jax.data.preprocess import air_level, slice_box
from resunet_jax.data.readers import READERS, Reader, list_sources, nifti, open_scan, read_mask
from resunet_jax.data.splits import patient_five_fold_split, ratio_split
from resunet_jax.data.volume import HU_WINDOW, Grid, Volume
from resunet_jax.errors import InputError
from resunet_jax.metrics.lung_sides import LEFT, RIGHT, labels_are_exchanged
from resunet_jax.progress import parallel_map

Severity = Literal["error", "warning"]
Labels = npt.NDArray[np.uint8]

KNOWN_SLICES = dict(
    zip(
        KNOWN_CASES,
        (
            *((301, 161), (200, 143), (200, 137), (270, 113), (290, 116)),
            *((213, 70), (249, 93), (301, 216), (256, 111), (301, 191)),
            *((39, 14), (418, 148), (110, 103), (66, 44), (42, 2)),
            *((42, 9), (45, 34), (93, 72), (39, 26), (45, 41)),
        ),
        strict=True,
    )
)
"""Slices, and slices with infection, of each case of the full set."""

_MAX_WORKERS = 2  # each holds a volume and two masks in memory
_PLANE_MM = (200.0, 600.0)
_HEIGHT_MM = (100.0, 700.0)
_LUNG_HU = (-1000.0, -300.0)
_MIRRORED_HU = 60.0  # a mask on its own scan is darker than its mirror image by 30 HU and more
_AIR_HU = (-1050.0, -950.0)  # presets of scanners and viewers lie 100 HU apart
_BODY = PreprocessConfig()


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
      severity: "error" where training cannot start or would learn what is wrong; "warning" for all else.
      case: its id, or "" for the set.
      kind: one word for programs, as in "spacing".
      text: the file, what was found, and what to do.
    """

    severity: Severity
    case: str
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class CaseSummary:
    """What a scan and its masks hold.

    Attributes:
      case: its id.
      source: inferred from its name.
      patient: scans with the same value show the same person.
      shape: of the array in the file.
      spacing_mm: along (posterior, left, superior).
      axes: codes of the file's axes.
      codes: sform and qform code; None where the format has none.
      intensity_scale: "hu", "windowed", or "assumed" where it was not inferred.
      low: smallest value of the scan.
      high: largest value.
      air_hu: air around the patient, taking 0..255 to be `HU_WINDOW`; None for a scan in HU, or where none is seen.
      lung_labels: labels present, without 0; None where the mask cannot be read.
      infection_labels: the same; None also where there is no mask.
      slices: number of axial slices.
      infected_slices: those with infection; None without a mask.
      lung_hu: median over the lung mask, clipped to `HU_WINDOW`; None without lung.
      infection_outside_lung: voxels.
      lung_outside_body: voxels outside the body's box, which no model would see.
    """

    case: str
    source: str
    patient: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, float, float]
    axes: str
    codes: tuple[int, int] | None
    intensity_scale: str
    low: float
    high: float
    air_hu: float | None
    lung_labels: tuple[int, ...] | None
    infection_labels: tuple[int, ...] | None
    slices: int
    infected_slices: int | None
    lung_hu: float | None
    infection_outside_lung: int
    lung_outside_body: int


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """Everything that was seen.

    Attributes:
      cases: one record per readable scan.
      findings: errors first.
      missing: ids of the full set that are not there; empty where none of it is, or all.
      is_complete: the full set is there, scan for scan.
      can_train: there is no error.
    """

    cases: tuple[CaseSummary, ...]
    findings: tuple[Finding, ...]
    missing: tuple[str, ...]
    is_complete: bool
    can_train: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the keys of 0.6.0 next to those that have changed since."""
        values = dataclasses.asdict(self)
        cases = [{**case, "encoding": case["intensity_scale"]} for case in values["cases"]]
        return {**values, "cases": cases, "whole": self.is_complete}


@dataclasses.dataclass(frozen=True)
class _Examined:
    summary: CaseSummary | None
    findings: list[Finding]
    digests: dict[str, str]


def check_data(
    data_dir: Path, readers: Mapping[str, Reader] = READERS, *, assumed: tuple[float, float] | None = None
) -> DataCheck:
    """Reads every scan and mask of a folder, see `find_cases`, and lists what is wrong; for `assumed` see `open_scan`.

    Raises:
      InputError: nothing can be listed: no such folder, no scan in it, columns missing.
    """
    cases, problems = list_cases(data_dir, readers)
    findings = [Finding("error", "", "names", str(problem)) for problem in problems]
    findings += _unused_files(data_dir, cases, findings, readers)
    examined = parallel_map("checking scans", lambda case: _examine(case, readers, assumed), cases, _MAX_WORKERS)
    summaries = [result.summary for result in examined if result.summary is not None]
    for result in examined:
        findings += result.findings
    findings += _duplicates(cases, examined) + _shared_spacing(summaries) + _too_few(cases) + _against_known(summaries)
    there = {summary.case for summary in summaries}
    missing = tuple(case for case in KNOWN_CASES if case not in there)
    is_complete = not missing and all(
        summary.slices == KNOWN_SLICES[summary.case][0] for summary in summaries if summary.case in KNOWN_CASES
    )
    findings.sort(key=lambda finding: finding.severity != "error")
    can_train = all(finding.severity != "error" for finding in findings)
    return DataCheck(
        tuple(summaries), tuple(findings), missing if len(missing) < len(KNOWN_CASES) else (), is_complete, can_train
    )


def _unused_files(
    data_dir: Path, cases: Sequence[Case], named: Sequence[Finding], readers: Mapping[str, Reader]
) -> list[Finding]:
    used = {path.resolve() for case in cases for path in (case.ct, case.lung_mask, case.infection_mask) if path}
    findings = []
    for layout in LAYOUTS:
        for folder, column in zip(layout, COLUMNS, strict=True):
            for path in (source.path for source in list_sources(data_dir / folder, readers)):
                if path.resolve() not in used and not any(str(path) in finding.text for finding in named):
                    text = (
                        f"{path}: belongs to no case, so it is not read; name it after its scan, or in column {column}"
                    )
                    findings.append(Finding("warning", "", "names", text))
    return findings


def _examine(case: Case, readers: Mapping[str, Reader], assumed: tuple[float, float] | None) -> _Examined:
    findings: list[Finding] = []

    def add_finding(severity: Severity, kind: str, text: str) -> None:
        findings.append(Finding(severity, case.id, kind, text))

    try:
        with open_scan(case.ct, readers, assumed=assumed) as scan:
            volume = scan.read_slices(0, scan.grid.oriented_shape[-1])
    except InputError as error:
        add_finding("error", "scan", str(error))
        return _Examined(None, findings, {})
    _check_geometry(case, volume.grid, add_finding)
    air_hu = _check_air(case, volume, add_finding)
    masks: dict[str, Labels] = {}
    for name, path in (("lung", case.lung_mask), ("infection", case.infection_mask)):
        if path is None:
            add_finding(
                "warning", "missing", f"{case.ct}: no infection mask; add it, or train only the lung model on this case"
            )
            continue
        try:
            masks[name] = read_mask(path, case.ct, volume.grid, readers)
        except InputError as error:
            add_finding("error", "mask", str(error))
    labels = {name: tuple(map(int, np.flatnonzero(np.bincount(mask.ravel())))) for name, mask in masks.items()}
    labels = {name: tuple(label for label in present if label) for name, present in labels.items()}
    _check_labels(case, labels, add_finding)
    lung, infection = masks.get("lung"), masks.get("infection")
    lung_hu, lung_outside = _check_lung(case, volume, lung, labels, add_finding) if lung is not None else (None, 0)
    infection_outside = _check_infection(case, volume.grid, lung, infection, add_finding)
    summary = CaseSummary(
        case=case.id,
        source=case.source,
        patient=case.patient,
        shape=volume.grid.shape,
        spacing_mm=volume.grid.spacing_mm,
        axes="".join(nib.aff2axcodes(volume.grid.affine)),
        codes=nifti.form_codes(volume.grid),
        intensity_scale=volume.intensity_scale if assumed is None else "assumed",
        low=float(volume.values.min()),
        high=float(volume.values.max()),
        air_hu=air_hu,
        lung_labels=labels.get("lung"),
        infection_labels=labels.get("infection"),
        slices=volume.values.shape[-1],
        infected_slices=None if infection is None else int(infection.any(axis=(0, 1)).sum()),
        lung_hu=lung_hu,
        infection_outside_lung=infection_outside,
        lung_outside_body=lung_outside,
    )
    digests = {"scan": _scan_digest(volume)}
    digests |= {f"{name} mask": _mask_digest(mask) for name, mask in masks.items() if labels[name]}
    return _Examined(summary, findings, digests)


def _check_geometry(case: Case, grid: Grid, add_finding: Any) -> None:
    for kind, problem in nifti.header_problems(grid):
        add_finding("warning", kind, f"{case.ct}: {problem}")
    spacing = grid.spacing_mm
    rows_mm, columns_mm, height_mm = (n * mm for n, mm in zip(grid.oriented_shape, spacing, strict=True))
    plausible = (
        all(_PLANE_MM[0] <= mm <= _PLANE_MM[1] for mm in (rows_mm, columns_mm))
        and _HEIGHT_MM[0] <= height_mm <= _HEIGHT_MM[1]
    )
    if not plausible or spacing == (1.0, 1.0, 1.0):
        add_finding(
            "warning",
            "spacing",
            f"{case.ct}: spacing {_mm(spacing)} makes it {rows_mm:.0f} × {columns_mm:.0f} × {height_mm:.0f} mm, so the "
            "spacing looks nominal; take it from the DICOM files, or do not trust ml and mm",
        )


def _mm(spacing: Iterable[float]) -> str:
    return " × ".join(f"{mm:g}" for mm in np.round(tuple(spacing), 4)) + " mm"


def _check_labels(case: Case, labels: dict[str, tuple[int, ...]], add_finding: Any) -> None:
    expected = {"lung": ({1, 2}, "1 left, 2 right"), "infection": ({1}, "1")}
    paths = {"lung": case.lung_mask, "infection": case.infection_mask}
    for name, present in labels.items():
        allowed, meaning = expected[name]
        if not present:
            severity, remedy = (
                ("error", "draw it, or leave the case out") if name == "lung" else ("warning", "is that true?")
            )
            add_finding(severity, "empty", f"{paths[name]}: the {name} mask is empty; {remedy}")
        elif not set(present) <= allowed:
            found = ", ".join(map(str, present))
            text = f"{paths[name]}: labels {found}, expected {meaning}; all above 0 is taken as {name}, fix the others"
            add_finding("warning", "labels", text)


def _check_air(case: Case, volume: Volume, add_finding: Any) -> float | None:
    """Air around the patient in HU, where 0..255 is taken to be `HU_WINDOW`."""
    level = air_level(volume, _BODY) if volume.intensity_scale == "windowed" else None
    if level is None:
        return None
    low, high = HU_WINDOW
    air_hu = low + (high - low) * level
    if not _AIR_HU[0] <= air_hu <= _AIR_HU[1]:
        add_finding(
            "warning",
            "window",
            f"{case.ct}: if 0..255 is HU [-1250, 250], air lies at {air_hu:.0f} HU and not at -1000, so the scan was "
            "exported with another window; train with the recipe robust (normalization air), or export it again",
        )
    return air_hu


def _check_lung(
    case: Case, volume: Volume, lung: Labels, labels: dict[str, tuple[int, ...]], add_finding: Any
) -> tuple[float | None, int]:
    """Median of the lung in HU and its voxels outside the body's box; whether the mask lies on its scan."""
    total = int((lung > 0).sum())
    if not total:
        return None, 0
    depth = lung.shape[-1]
    histogram = np.zeros(257, np.int64)
    flipped_sums = np.zeros(4)  # as it is, and mirrored along each axis
    outside = 0
    for k in range(depth):
        inside, window = lung[..., k] > 0, volume.normalize_hu(k)
        candidates = (inside, inside[::-1], inside[:, ::-1], lung[..., depth - 1 - k] > 0)
        flipped_sums += [float(window[mask].sum(dtype=np.float64)) for mask in candidates]
        if inside.any():
            histogram += np.bincount((window[inside] * 256).astype(np.int64), minlength=257)
            box = slice_box(volume, k, _BODY)
            outside += int(inside.sum() - inside[box.slices].sum())
    low, high = HU_WINDOW
    median = low + (high - low) * float(np.searchsorted(np.cumsum(histogram), total / 2)) / 256
    if not _LUNG_HU[0] <= median <= _LUNG_HU[1]:
        add_finding(
            "error",
            "lung",
            f"{case.lung_mask}: half of its voxels are above {median:.0f} HU in {case.ct}, and lungs are near -800; "
            "the mask lies elsewhere, or the scan's slope and intercept are wrong",
        )
    means = low + (high - low) * flipped_sums / total
    best = int(means[1:].argmin()) + 1
    if means[0] - means[best] > _MIRRORED_HU:
        axis = ("front to back", "left to right", "head to foot")[best - 1]
        add_finding(
            "error",
            "mirrored",
            f"{case.lung_mask}: fits {case.ct} better mirrored {axis}; mirror it, or fix its affine",
        )
    if outside:
        text = f"{case.lung_mask}: {outside:,} of {total:,} lung voxels lie outside the body in {case.ct}; fix the mask"
        add_finding("error" if outside > 0.01 * total else "warning", "lung outside body", text)
    if set(labels["lung"]) == {LEFT, RIGHT} and labels_are_exchanged(lung):
        add_finding(
            "warning", "sides", f"{case.lung_mask}: label 1 (left) lies on the right by its affine; swap 1 and 2"
        )
    return median, outside


def _check_infection(case: Case, grid: Grid, lung: Labels | None, infection: Labels | None, add_finding: Any) -> int:
    """Infected voxels outside the lung mask."""
    if lung is None or infection is None or not infection.any() or not lung.any():
        return 0
    infected = int((infection > 0).sum())
    outside = int(((infection > 0) & (lung == 0)).sum())
    if outside:
        add_finding(
            "warning",
            "infection outside lung",
            f"{case.infection_mask}: {outside:,} of {infected:,} voxels ({outside / infected:.1%}, "
            f"{outside * grid.voxel_ml:.1f} ml) lie outside {case.lung_mask}; fix one of the two",
        )
    if infected == int((lung > 0).sum()) and not outside:
        add_finding(
            "error", "same", f"{case.infection_mask}: the same as {case.lung_mask}; put the infection mask there"
        )
    elif infected > int((lung > 0).sum()):
        add_finding("error", "swapped", f"{case.infection_mask}: larger than {case.lung_mask}; are the two swapped?")
    return outside


def _scan_digest(volume: Volume) -> str:
    """The same for the same scan in another file, intensity scale or type."""
    digest = hashlib.sha256(str(volume.values.shape).encode())
    for k in range(volume.values.shape[-1]):
        digest.update(np.rint(volume.normalize_hu(k) * 255).astype(np.uint8).tobytes())
    return digest.hexdigest()


def _mask_digest(mask: Labels) -> str:
    return hashlib.sha256(str(mask.shape).encode() + np.packbits(mask > 0).tobytes()).hexdigest()


def _duplicates(cases: Sequence[Case], examined: Sequence[_Examined]) -> list[Finding]:
    first: dict[tuple[str, str], Case] = {}
    findings = []
    for case, result in zip(cases, examined, strict=True):
        paths = {"scan": case.ct, "lung mask": case.lung_mask, "infection mask": case.infection_mask}
        for kind, digest in result.digests.items():
            other = first.setdefault((kind, digest), case)
            if other is not case:
                text = f"{paths[kind]}: the same {kind} as that of {other.id}; leave one of the two cases out"
                findings.append(Finding("error", case.id, "duplicate", text))
    return findings


def _shared_spacing(summaries: Sequence[CaseSummary]) -> list[Finding]:
    """Fields of view are set for each patient: many with the same one have a made-up spacing."""
    patients: dict[tuple[float, ...], set[str]] = {}
    for summary in summaries:
        patients.setdefault(tuple(np.round(summary.spacing_mm[:2], 5)), set()).add(summary.patient)
    return [
        Finding(
            "warning",
            "",
            "spacing",
            f"{len(sharing)} patients share the in-plane spacing {_mm(spacing)} to the digit, so it looks nominal; "
            "take it from the DICOM files, or do not trust ml and mm",
        )
        for spacing, sharing in patients.items()
        if len(sharing) >= 3
    ]


def _too_few(cases: Sequence[Case]) -> list[Finding]:
    severity: Severity = "error"
    try:
        ratio_split(cases, 0)
        severity = "warning"
        patient_five_fold_split(cases, 0)
    except InputError as error:
        return [Finding(severity, "", "patients", str(error))]
    return []


def _against_known(summaries: Sequence[CaseSummary]) -> list[Finding]:
    """Slices and infected slices compared with the full set's; nothing where no case has the known number of slices."""
    known = [case for case in summaries if case.case in KNOWN_SLICES]
    same = [case for case in known if case.slices == KNOWN_SLICES[case.case][0]]
    if not same:
        return []
    findings = []
    for case in known:
        slices, infected = KNOWN_SLICES[case.case]
        if case.slices != slices:
            text = f"{case.case}: {case.slices} slices, the known set has {slices}; another scan, or an incomplete one"
            findings.append(Finding("warning", case.case, "counts", text))
        elif case.infected_slices is not None and case.infected_slices != infected:
            text = (
                f"{case.case}: {case.infected_slices} slices with infection, the known set has {infected}; another "
                "reader's masks, so published numbers are not comparable"
            )
            findings.append(Finding("warning", case.case, "counts", text))
    return findings
