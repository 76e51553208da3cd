"""The table of an ablation: each row against the first, with intervals over seeds and patients, and what it costs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from resunet_jax.evaluation.report import wide_console
from resunet_jax.evaluation.statistics import seed_patient_interval


def summarize_runs(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row a recipe, each compared with the first one, volume by volume and seed by seed.

    Args:
      lines: by row, its runs as in runs.jsonl, the same seeds and splits in each.

    Returns:
      for each row "name"; for "lung" and, where it was trained, "infection" a dict of "mean", "ci_low", "ci_high",
      "volumes" (by case, means over seeds), "lowest" (of these), "difference" to the first row with "difference_low"
      and "difference_high" (95 % intervals over seeds and patients, see `seed_patient_interval`), "seconds_per_step",
      "parameters" and "step_gb"; "lesion_recall" and "false_lesions" (means). Undefined numbers are NaN.
    """
    tables = {name: {s: _table(runs, s) for s in runs[0]["cost"]} for name, runs in lines.items()}
    first = next(iter(tables.values()))
    return [
        {
            "name": name,
            **{s: {**_compare(table, first[s]), **_mean_cost(runs, s)} for s, table in tables[name].items()},
            **{metric: _mean_of(runs, metric) for metric in ("lesion_recall", "false_lesions")},
        }
        for name, runs in lines.items()
    ]


class _Dice(NamedTuple):
    """Dice by seed and volume; volumes of several splits stand side by side, in the order of their names."""

    values: np.ndarray[Any, np.dtype[np.float64]]
    cases: list[str]
    patients: list[str]


def _table(runs: Sequence[Mapping[str, Any]], structure: str) -> _Dice:
    rows = [(run["seed"], row) for run in runs for row in run["volumes"] if row["structure"] == structure]
    seeds, cases = sorted({seed for seed, _ in rows}), sorted({row["case"] for _, row in rows})
    values = np.full((len(seeds), len(cases)), np.nan)
    for seed, row in rows:
        values[seeds.index(seed), cases.index(row["case"])] = math.nan if row["dice"] is None else row["dice"]
    patients = {row["case"]: row["patient"] for _, row in rows}
    return _Dice(values, cases, [patients[case] for case in cases])


def _compare(dice: _Dice, first: _Dice) -> dict[str, Any]:
    low, high = _interval(dice.values, dice.patients)
    change = dice.values - first.values
    change_low, change_high = _interval(change, dice.patients)
    volumes = dict(zip(dice.cases, map(_mean, dice.values.T), strict=True))
    return {
        "mean": _mean(dice.values),
        "ci_low": low,
        "ci_high": high,
        "volumes": volumes,
        "lowest": min((mean for mean in volumes.values() if not math.isnan(mean)), default=math.nan),
        "difference": _mean(change),
        "difference_low": change_low,
        "difference_high": change_high,
    }


def _interval(values: np.ndarray[Any, np.dtype[np.float64]], patients: Sequence[str]) -> tuple[float, float]:
    """Over the volumes that are defined for every seed."""
    whole = ~np.isnan(values).any(axis=0)
    return seed_patient_interval(values[:, whole], [p for p, kept in zip(patients, whole, strict=True) if kept])


def _mean_cost(runs: Sequence[Mapping[str, Any]], structure: str) -> dict[str, float]:
    costs = [run["cost"][structure] for run in runs]
    return {
        name: float(np.median([cost[name] for cost in costs])) for name in ("seconds_per_step", "parameters", "step_gb")
    }


def _mean_of(runs: Sequence[Mapping[str, Any]], metric: str) -> float:
    rows = [row for run in runs for row in run["volumes"] if row["structure"] == "infection"]
    return _mean(np.array([row[metric] for row in rows], float))


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Of what is defined; NaN where nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


_COLUMNS = (
    "row",
    "lung Dice",
    "lowest",
    "change",
    "infection Dice",
    "change",
    "lesions found",
    "false lesions",
    "s/step",
    "parameters",
    "GB/step",
)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    lung, infection = row["lung"], row.get("infection")
    trained = [structure for structure in (lung, infection) if structure]
    return (
        row["name"],
        f"{lung['mean']:.4f}",
        f"{lung['lowest']:.4f}",
        _change(lung),
        _with_interval(f"{infection['mean']:.3f}", infection["ci_low"], infection["ci_high"]) if infection else "–",
        _change(infection) if infection else "–",
        f"{row['lesion_recall']:.2f}" if infection else "–",
        f"{row['false_lesions']:.1f}" if infection else "–",
        " + ".join(f"{structure['seconds_per_step']:.2g}" for structure in trained),
        f"{sum(structure['parameters'] for structure in trained) / 1e6:.2f} M",
        f"{max(structure['step_gb'] for structure in trained):.2f}",
    )


def _change(values: Mapping[str, float]) -> str:
    return _with_interval(f"{values['difference']:+.3f}", values["difference_low"], values["difference_high"], "+")


def _with_interval(text: str, low: float, high: float, sign: str = "") -> str:
    return text if math.isnan(low) else f"{text} ({low:{sign}.3f} to {high:{sign}.3f})"


def print_ablation(summary: Mapping[str, Any]) -> None:
    """The table in the terminal."""
    console = wide_console()
    console.print(f"Seeds: {', '.join(map(str, summary['seeds']))}; {'; '.join(summary['splits'])}")
    console.print("Dice on the native grid; in brackets 95 % over seeds and patients; change against the first row")
    table = Table(box=SIMPLE, pad_edge=False)
    for number, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if number else "left")
    for row in summary["rows"]:
        table.add_row(*_cells(row))
    console.print(table)


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The same table for a document, and one for each structure with a line a volume and a column a row."""
    tables = [_markdown(_COLUMNS, [_cells(row) for row in summary["rows"]])]
    for structure in ("lung", "infection"):
        by_row = {row["name"]: row[structure]["volumes"] for row in summary["rows"] if structure in row}
        cases = list(dict.fromkeys(case for volumes in by_row.values() for case in volumes))
        lines = [(case, *(_dice(volumes.get(case, math.nan)) for volumes in by_row.values())) for case in cases]
        if lines:
            tables.append(_markdown((structure, *by_row), lines))
    return "\n".join(tables)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ("---",) * len(header), *lines))


def _dice(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
