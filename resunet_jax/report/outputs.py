"""What is written for a scan in addition to its masks: one function and one row of `make_outputs` for each."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from resunet_jax.data.readers import READERS, Reader, Source, digest, read_mask
from resunet_jax.data.readers.dicom_seg import require_dicom_seg, write_dicom_seg
from resunet_jax.data.readers.disk import temporary_file
from resunet_jax.data.readers.nifti import nifti_writer
from resunet_jax.data.volume import Grid
from resunet_jax.errors import InputError
from resunet_jax.files import make_output_dir, write_json
from resunet_jax.inference.batch import LOCKS, MANIFEST, Output, Summary
from resunet_jax.inference.scan import SegmentedScan
from resunet_jax.metrics.lung_sides import LEFT, RIGHT
from resunet_jax.progress import logger
from resunet_jax.report.cohort import cohort_row, write_cohort_csv, write_cohort_page
from resunet_jax.report.numbers import (
    CONSOLIDATION_HU,
    SCHEMA_VERSION,
    Totals,
    iter_slices,
    measure,
    summary_line,
    warnings_of,
)
from resunet_jax.report.page import write_preview, write_scan_page
from resunet_jax.report.slices import encode_slices

REPORT = "_report.json"
PAGE = "_report.html"
PREVIEW = "_preview.png"
LABELS = "_labels.nii.gz"
SEGMENTATION = "_seg.dcm"
COHORT = "cohort.csv"
INDEX = "index.html"

INFECTION = 3
"""Label of the infection in the file that holds all structures, next to those of the lungs."""


def make_outputs(
    *,
    report: bool = True,
    multilabel: bool = False,
    dicom_seg: bool = False,
    consolidation_hu: float = CONSOLIDATION_HU,
    lobes: Path | None = None,
    readers: Mapping[str, Reader] = READERS,
) -> dict[str, Output]:
    """The outputs that are asked for, by name, for `segment_scans`.

    Args:
      report: numbers as JSON, a page to open in a browser, and a picture; without it, masks are checked all the same.
      multilabel: both lungs and the infection in one file of labels.
      dicom_seg: the same as DICOM-SEG, for DICOM series.
      consolidation_hu: from which HU infection counts as consolidation.
      lobes: a mask whose labels are lobes, on the grid of the one scan; adds their numbers to the report.
      readers: the table of formats.

    Raises:
      InputError: the lobes cannot be read, or there is no report for them; the threshold is no number.
    """
    if lobes is not None and not report:
        raise InputError(
            "`lobes`: their numbers are in the report, which needs both models; ask for it, or leave `lobes` out"
        )
    if not math.isfinite(consolidation_hu):
        raise InputError(f"`consolidation_hu` is {consolidation_hu}; it must be a number")

    def check_lobes(source: Source, grid: Grid) -> None:
        if lobes is not None and not read_mask(lobes, source.path, grid, readers).any():
            raise InputError(f"{lobes}: every voxel is 0; give a mask with a label for each lobe")

    def write_report(source: Source, segmented: SegmentedScan, seconds: float, folder: Path) -> Summary:
        grid, has_uncertainty = segmented.scan.grid, segmented.uncertainty is not None
        labels = None if lobes is None else read_mask(lobes, source.path, grid, readers)
        totals, shown = Totals(segmented, consolidation_hu), []
        with temporary_file((2 + has_uncertainty) * math.prod(grid.oriented_shape), source.path) as file:
            for slices in iter_slices(segmented):
                stop = slices.start + slices.hu.shape[-1]
                totals.add(slices, None if labels is None else labels[..., slices.start : stop])
                masks = slices.lung, slices.infection
                shown.extend(encode_slices(slices.hu, *masks, uncertainty=slices.uncertainty, file=file))
            scan = {"name": source.name, "file": source.path.name, "format": source.format}
            report = measure(segmented, totals, scan, seconds)
            size_mm = (*grid.spacing_mm[:2], grid.slice_distance_mm)
            write_scan_page(folder / f"{source.name}{PAGE}", report, shown, size_mm)
            write_preview(folder / f"{source.name}{PREVIEW}", shown, size_mm)
        write_json(folder / f"{source.name}{REPORT}", report)
        return Summary(summary_line(report), tuple(report["warnings"]))

    settings = [SCHEMA_VERSION, consolidation_hu, None if lobes is None else digest(lobes, readers)]
    table = {
        "report": (report, Output((REPORT, PAGE, PREVIEW), write_report, settings, check_lobes, (COHORT, INDEX))),
        "warnings": (not report, Output((), _warn)),
        "multilabel": (multilabel, Output((LABELS,), _write_labels)),
        "dicom_seg": (
            dicom_seg,
            Output((SEGMENTATION,), _write_segmentation, check=lambda source, _: require_dicom_seg(source)),
        ),
    }
    return {name: output for name, (is_asked_for, output) in table.items() if is_asked_for}


def _warn(_: Source, segmented: SegmentedScan, __: float, ___: Path) -> Summary:
    totals = Totals(segmented)
    for slices in iter_slices(segmented):
        totals.add(slices)
    return Summary("", tuple(warnings_of(segmented, totals)))


def _write_labels(source: Source, segmented: SegmentedScan, _: float, folder: Path) -> Summary:
    with nifti_writer(folder / f"{source.name}{LABELS}", np.uint8, segmented.scan.grid) as write:
        for slices in iter_slices(segmented):
            write(slices.start, np.where(slices.infection, INFECTION, slices.lung).astype(np.uint8))
    return Summary()


def _write_segmentation(source: Source, segmented: SegmentedScan, _: float, folder: Path) -> Summary:
    chunks = list(iter_slices(segmented))
    lung = np.concatenate([slices.lung for slices in chunks], axis=-1)
    infection = np.concatenate([slices.infection for slices in chunks], axis=-1)
    masks = {"left lung": lung == LEFT, "right lung": lung == RIGHT, "infection": infection}
    if not any(mask.any() for mask in masks.values()):
        return Summary("", ("nothing was found, and a DICOM-SEG cannot be empty, so there is none",))
    write_dicom_seg(folder / f"{source.name}{SEGMENTATION}", source, segmented.scan.grid, masks)
    return Summary()


def write_cohort(folder: Path) -> list[Path]:
    """Makes cohort.csv and index.html of all reports in a folder; several processes may do so.

    Returns:
      the files; none where there is no report, and nothing was segmented into the folder.
    """
    make_output_dir(folder / LOCKS)
    with FileLock(folder / LOCKS / f".{COHORT}.lock"):  # or an older list could replace a newer one
        # A hidden one is half written.
        paths = [path for path in sorted(folder.glob(f"*{REPORT}")) if not path.name.startswith(".")]
        reports = [report for path in paths if (report := _read(path)) is not None]
        if not reports and not (folder / MANIFEST).exists():
            return []
        write_cohort_csv(folder / COHORT, reports)
        write_cohort_page(folder / INDEX, reports)
    return [folder / COHORT, folder / INDEX]


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        report = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        if report["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {report['schema_version']}")
        if not cohort_row(report)["name"]:
            raise KeyError("scan.name")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.warning("%s: left out of the table (%s); remove it, or segment the scan again", path, error)
        return None
    return report
