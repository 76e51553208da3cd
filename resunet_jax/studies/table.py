"""The tables of a study: variants compared with the first one, or folds with published results; slices for pictures."""

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE
from rich.table import Table

from resunet_jax.data.cases import KNOWN_CASES
from resunet_jax.data.splits import NUM_FOLDS
from resunet_jax.errors import InputError
from resunet_jax.evaluation.compare import STRUCTURES, summarize
from resunet_jax.evaluation.report import wide_console
from resunet_jax.metrics import METRICS, Metric
from resunet_jax.metrics.intervals import summary_statistics
from resunet_jax.plots import Overlay
from resunet_jax.studies.published import PUBLISHED

Record = Mapping[str, Any]
"""What runs.jsonl holds of a run, see `run_study`; undefined values are None."""

_LEFT = ("variant", "structure", "source", "protocol", "remark")  # columns of text


def summarize_runs(records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """One row per variant, compared with the first one, volume by volume, split by split and seed by seed.

    Args:
      records: by variant, those of its runs, of the same seeds and splits for each.

    Returns:
      for each row "name"; for "lung" and, where it was trained, "infection" a dict of "mean", "ci_low", "ci_high",
      "volumes" (by case, means over seeds and splits), "lowest" (of these), "difference" to the first row with
      "difference_low" and "difference_high" (95 % intervals, see `patient_interval`), "seconds_per_step",
      "parameters" and "step_gb"; "lesion_recall" and "false_positive_lesions" (means). Undefined numbers are NaN.
    """
    dice = {name: {s: _dice(runs, s) for s in runs[0]["cost"]} for name, runs in records.items()}
    first = next(iter(dice.values()))
    return [
        {
            "name": name,
            **{s: {**_compare(own, first[s]), **_median_cost(runs, s)} for s, own in dice[name].items()},
            **{metric: _infection_mean(runs, metric) for metric in ("lesion_recall", "false_positive_lesions")},
        }
        for name, runs in records.items()
    ]


_Dice = tuple[npt.NDArray[np.float64], list[str], list[str]]


def _dice(runs: Sequence[Record], structure: str) -> _Dice:
    """Dice (seeds, columns), and the case and patient of each column; a case has a column for each split."""
    cells, patients = {}, {}
    for run in runs:
        for row in run["volumes"]:
            if row["structure"] == structure:
                column = (row["case"], tuple(run["split"]["train"]), tuple(run["split"]["val"]))
                cells[run["seed"], column] = row["dice"]
                patients[column] = row["patient"]
    columns, seeds = sorted(patients), sorted({seed for seed, _ in cells})
    values = np.array([[cells.get((seed, column)) for column in columns] for seed in seeds], float)
    return values, [column[0] for column in columns], [patients[column] for column in columns]


def _compare(own: _Dice, first: _Dice) -> dict[str, Any]:
    values, cases, patients = own
    dice, change = _over_seeds(values), _over_seeds(values - first[0])
    volumes = {case: _mean(dice[np.array(cases) == case]) for case in dict.fromkeys(cases)}
    own_statistics, changes = summary_statistics(dice, patients), summary_statistics(change, patients)
    return {
        **{name: own_statistics[name] for name in ("mean", "ci_low", "ci_high")},
        "volumes": volumes,
        "lowest": min((mean for mean in volumes.values() if not math.isnan(mean)), default=math.nan),
        "difference": changes["mean"],
        "difference_low": changes["ci_low"],
        "difference_high": changes["ci_high"],
    }


def _over_seeds(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of each column over the seeds for which it is defined; NaN where there is none."""
    return np.array([_mean(column) for column in values.T])


def _median_cost(runs: Sequence[Record], structure: str) -> dict[str, float]:
    costs = [run["cost"][structure] for run in runs]
    return {name: float(np.median([c[name] for c in costs])) for name in ("seconds_per_step", "parameters", "step_gb")}


def _infection_mean(runs: Sequence[Record], metric: str) -> float:
    rows = [row for run in runs for row in run["volumes"] if row["structure"] == "infection"]
    return _mean(np.array([row[metric] for row in rows], float))


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Of what is defined; NaN where nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def summarize_folds(records: Sequence[Record], metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """The test volumes of all folds, next to published results.

    Args:
      records: by fold.
      metrics: the table of metrics.

    Returns:
      "protocol", "cases" (how many), "full_set" (whether they are those of the data set), "settings", "seen_patients"
      (see there), "volumes" (a row per case and structure, with its fold), "summary" (see `summarize`) and "published".
    """
    split = records[0]["split"]
    cases = {case for subset in ("train", "val", "test") for case in split[subset]}
    name, full_set = split["protocol"].partition(",")[0], cases == set(KNOWN_CASES)
    volumes = [{"fold": fold, **row} for fold, record in enumerate(records) for row in record["volumes"]]
    published = sorted(PUBLISHED, key=lambda row: STRUCTURES.index(row.structure))
    return {
        "protocol": split["protocol"].replace(f"fold 0 of {NUM_FOLDS}", f"{NUM_FOLDS} folds"),
        "cases": len(cases),
        "full_set": full_set,
        "settings": {setting: records[-1]["settings"][setting] for setting in ("threshold", "tolerance_mm")},
        "seen_patients": seen_patients(records),
        "volumes": volumes,
        "summary": summarize(volumes, metrics),
        "published": [{**row._asdict(), "remark": row.remarks(name, full_set)} for row in published],
    }


def seen_patients(records: Sequence[Record]) -> list[str]:
    """Test patients whom a model had seen before, as one that it began with: they tell nothing of new patients."""
    return sorted({patient for record in records for patient in record["settings"].get("seen_patients", [])})


def _seen_note(results: Mapping[str, Any]) -> tuple[str, ...]:
    seen = ", ".join(results.get("seen_patients", []))
    return (f"Seen before by the models, so no test of new patients: {seen}",) if seen else ()


_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "variant": lambda row: row["name"],
    "lung Dice": lambda row: _number(row["lung"]["mean"], ".4f"),
    "lowest volume": lambda row: _number(row["lung"]["lowest"], ".4f"),
    "lung change": lambda row: _with_interval(row["lung"], "difference", "difference", "+.3f"),
    "infection Dice": lambda row: _with_interval(row.get("infection"), "mean", "ci"),
    "infection change": lambda row: _with_interval(row.get("infection"), "difference", "difference", "+.3f"),
    METRICS["lesion_recall"].heading: lambda row: _number(row["lesion_recall"], ".2f"),
    METRICS["false_positive_lesions"].heading: lambda row: _number(row["false_positive_lesions"], ".1f"),
    "s/step": lambda row: " + ".join(f"{model['seconds_per_step']:.2g}" for model in _models(row)),
    "parameters": lambda row: f"{sum(model['parameters'] for model in _models(row)) / 1e6:.2f} M",
    "GB/step": lambda row: f"{max(model['step_gb'] for model in _models(row)):.2f}",
}


def _models(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row[structure] for structure in ("lung", "infection") if structure in row]


def _with_interval(values: Mapping[str, float] | None, name: str, interval: str, form: str = ".3f") -> str:
    if values is None:
        return "–"
    low, high = values[f"{interval}_low"], values[f"{interval}_high"]
    return _number(values[name], form) + ("" if math.isnan(low) else f" ({low:{form}} to {high:{form}})")


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None or math.isnan(value) else f"{value:{form}}"


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The table of an ablation for a document, then for each structure one with a row per volume."""
    tables = [_markdown([list(_COLUMNS), *([cell(row) for cell in _COLUMNS.values()] for row in summary["rows"])])]
    for structure in ("lung", "infection"):
        variants = {row["name"]: row[structure]["volumes"] for row in summary["rows"] if structure in row}
        cases = dict.fromkeys(case for volumes in variants.values() for case in volumes)
        rows = [[case, *(_number(volumes.get(case)) for volumes in variants.values())] for case in cases]
        if rows:
            tables.append(_markdown([[structure, *variants], *rows]))
    return "\n".join([*tables, *(f"{note}\n" for note in _seen_note(summary))])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def print_ablation(summary: Mapping[str, Any]) -> None:
    """The table of `ablate` in the terminal."""
    notes = (
        f"Seeds: {', '.join(map(str, summary['seeds']))}; {'; '.join(summary['splits'])}",
        "Dice on the native grid; change against the first variant; in brackets 95 % CI, Student's t over patients "
        "with seeds averaged",
        *_seen_note(summary),
    )
    _print(notes, list(_COLUMNS), [[[cell(row) for cell in _COLUMNS.values()] for row in summary["rows"]]])


def print_cross_validation(results: Mapping[str, Any]) -> None:
    """The table of `cross_validate` in the terminal: for each structure this study, then published results."""
    tolerance, sections = results["settings"]["tolerance_mm"], []
    notes = (
        f"Protocol: {results['protocol']}; {results['cases']} cases",
        f"Means over volumes; surface Dice (NSD) at {tolerance['lung']:g} mm, infection {tolerance['infection']:g} mm",
        "In brackets 95 % CI, Student's t over patients",
        *_seen_note(results),
    )
    for structure, metrics in results["summary"].items():
        dice, nsd, name = metrics["dice"], metrics["nsd"], results["protocol"].partition(",")[0]
        volumes = f"{dice['volumes'] - dice['undefined']} of {dice['volumes']}"
        numbers = (_with_interval(dice, "mean", "ci"), _number(dice["sd"]), _number(nsd["mean"]), volumes)
        published = [row for row in results["published"] if row["structure"] == structure]
        others = [
            ("", row["source"], row["protocol"], _number(row["dice"]), "", _number(row["nsd"]), "", row["remark"])
            for row in published
        ]
        sections.append([(structure, "this study", name, *numbers, ""), *others])
    _print(notes, ("structure", "source", "protocol", "Dice", "SD", "NSD", "volumes", "remark"), sections)


def _print(notes: Sequence[str], columns: Sequence[str], sections: Sequence[Sequence[Sequence[str]]]) -> None:
    console, table = wide_console(), Table(box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in _LEFT else "right")
    for rows in sections:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    console.print(*notes, table, sep="\n")


def save_slices(file: Path, slices: Sequence[tuple[float, Overlay]]) -> list[dict[str, Any]]:
    """Writes the slices of `Evaluation.overlays`; returns the title, Dice and structures of each, for the record."""
    arrays = [np.stack([o.image, *o.reference.values(), *o.predicted.values()], dtype=np.float32) for _, o in slices]
    np.savez_compressed(file, *arrays)
    return [{"title": o.title, "dice": dice, "structures": list(o.reference)} for dice, o in slices]


def load_slices(file: Path, rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, Overlay]]:
    """The inverse of `save_slices`; raises `InputError` where the file is damaged."""
    slices = []
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for number, row in enumerate(rows):
                names, (image, *masks) = row["structures"], arrays[f"arr_{number}"]
                reference, predicted = (dict(zip(names, m, strict=False)) for m in (masks, masks[len(names) :]))
                dice = math.nan if row["dice"] is None else row["dice"]
                slices.append((dice, Overlay(row["title"], image, reference, predicted)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: damaged ({error}); delete {file.parent}, the run is tested again") from error
    return slices
