"""The page and the table of many scans."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from resunet_jax.files import atomic_file, write_text
from resunet_jax.report.markup import fill_page, number

Report = Mapping[str, Any]
Cell = str | int | float | None

COHORT_COLUMNS: dict[str, str] = {
    "name": "scan.name",  # of the scan; its page is <name>_report.html
    "file": "scan.file",  # file or folder it was read from
    "slices": "scan.slices",  # axial slices
    "lung_ml": "lung.volume_ml",  # volume of the lung mask, ml
    "left_lung_ml": "lung.left_ml",  # volume of the left lung, ml
    "right_lung_ml": "lung.right_ml",  # volume of the right lung, ml
    "infection_ml": "infection.volume_ml",  # volume of the infection, ml
    "involvement_percent": "infection.involvement_percent",  # lung involvement, %
    "left_percent": "involvement.left.percent",  # the same of the left lung, %
    "right_percent": "involvement.right.percent",  # the same of the right lung, %
    "grade": "grade",  # 0 to 5: none, below 5, 25, 50, 75 %, and from 75 %
    "ground_glass_ml": "infection.ground_glass_ml",  # infection that is not consolidation, ml
    "consolidation_ml": "infection.consolidation_ml",  # infection above the threshold of consolidation, ml
    "infection_mean_hu": "infection.mean_hu",  # mean of the infection, HU
    "lesions": "infection.lesions",  # connected components of the infection
    "warnings": "warnings",  # warnings, joined by ' | '
    "version": "version",  # of resunet-jax
    "seconds": "seconds",  # time it took, s
    "infection_low_ml": "infection.volume_interval_ml.0",  # its interval, from, ml; the report says what it is worth
    "infection_high_ml": "infection.volume_interval_ml.1",  # to, ml
    "involvement_low_percent": "infection.involvement_interval_percent.0",  # interval of the involvement, from, %
    "involvement_high_percent": "infection.involvement_interval_percent.1",  # to, %
    "pairwise_dice": "uncertainty.pairwise_dice",  # agreement of predictions, 0 to 1: low where the mask is doubtful
}
"""Columns of the CSV in order, and where a report has them; an undefined value is an empty cell."""

_SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "slices": ("Slices", number),
    "lung_ml": ("Lung, ml", number),
    "infection_ml": ("Infection, ml", lambda value: number(value, 1)),
    "involvement_percent": ("Involved, %", lambda value: number(value, 1)),
    "left_percent": ("Left, %", lambda value: number(value, 1)),
    "right_percent": ("Right, %", lambda value: number(value, 1)),
    "grade": ("Grade", number),
    "consolidation_ml": ("Consolidation, ml", lambda value: number(value, 1)),
    "lesions": ("Lesions", number),
    "pairwise_dice": ("Agreement", lambda value: number(value, 2)),
}
_OPTIONAL = ("pairwise_dice",)
"""Columns of the page that stand there only where a scan has a value."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def cohort_row(report: Report) -> dict[str, Cell]:
    """One scan as a row: a value for each of `COHORT_COLUMNS`, None where it is not defined."""
    row = {name: _value(report, path) for name, path in COHORT_COLUMNS.items()}
    return {**row, "warnings": " | ".join(map(str, report["warnings"]))}


def _value(report: Report, path: str) -> Any:
    """What stands at a path of keys and indices; None where something on the way is absent or null."""
    value: Any = report
    for key in path.split("."):
        value = (value[int(key)] if key.isdecimal() else value.get(key)) if value else None
    return value


def write_cohort_csv(path: Path, reports: Iterable[Report]) -> None:
    """Writes a row for each scan as CSV (UTF-8, comma), atomically.

    A text that a spreadsheet would take for a formula gets an apostrophe in front; numbers stay numbers.

    Raises:
      InputError: it cannot be written.
    """
    with (
        atomic_file(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COHORT_COLUMNS)
        writer.writerows([_safe(value) for value in cohort_row(report).values()] for report in reports)


def _safe(value: Cell) -> Cell:
    if isinstance(value, float):
        return None if value != value else round(value, 4)  # noqa: PLR0124 - NaN
    return f"'{value}" if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA) else value


def write_cohort_page(path: Path, reports: Sequence[Report]) -> None:
    """Writes the table of all scans as one HTML file, atomically; each links to `<name>_report.html` next to it.

    Raises:
      InputError: it cannot be written.
    """
    rows = [cohort_row(report) for report in reports]
    shown = [key for key in _SHOWN if key not in _OPTIONAL or any(row[key] is not None for row in rows)]
    titles = ["Scan", *(_SHOWN[key][0] for key in shown), "Warnings"]
    with_warnings = sum(bool(report["warnings"]) for report in reports)
    text = fill_page(
        "cohort",
        summary=f"{len(rows)} scan{'s' * (len(rows) != 1)}, {with_warnings} with warnings",
        head="".join(f'<th scope="col"><button type="button">{title}</button></th>' for title in titles),
        rows="\n".join(_table_row(row, shown, report["warnings"]) for row, report in zip(rows, reports, strict=True)),
    )
    write_text(path, text)


def _table_row(row: Mapping[str, Cell], shown: Sequence[str], warnings: Sequence[str]) -> str:
    name = str(row["name"])
    link = quote(f"{name}_report.html", safe="", errors="surrogateescape")
    cells = [f'<th scope="row"><a href="{link}">{escape(name)}</a></th>']
    for key in shown:
        value = row[key]
        text = _SHOWN[key][1](value)
        cells.append(f'<td data-value="{value}">{text}</td>' if text != number(None) else f"<td>{text}</td>")
    listed = "<br>".join(escape(str(warning)) for warning in warnings)
    return f'<tr>{"".join(cells)}<td data-value="{len(warnings)}">{listed}</td></tr>'
