"""An evaluation as files and as a table in the terminal."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from resunet_jax.evaluation.compare import SOFT_NOTE, Evaluation, summarize
from resunet_jax.files import atomic_file, make_output_dir, write_text
from resunet_jax.metrics import METRICS, Metric, with_legacy_keys
from resunet_jax.metrics.conformal import is_covered, rank_correlation, worst_third_found
from resunet_jax.metrics.lesions import dice_by_burden
from resunet_jax.metrics.overlap import SOFT_METRICS
from resunet_jax.plots import Overlay, save_boxes, save_overlays, save_reliability, save_volumes

_EMPTY = {
    "both": "reference and prediction are empty",
    "reference": "the reference is empty",
    "prediction": "the prediction is empty",
}


def write_report(evaluation: Evaluation, output_dir: Path) -> None:
    """Writes metrics.json, volumes.csv, slices.csv and the pictures.

    Raises:
      InputError: the folder cannot be written.
    """
    make_output_dir(output_dir)
    protocol = evaluation.settings["protocol"]
    write_text(output_dir / "metrics.json", evaluation.to_json())
    write_csv(
        output_dir / "volumes.csv", [{**with_legacy_keys(row), "protocol": protocol} for row in evaluation.volumes]
    )
    write_csv(output_dir / "slices.csv", evaluation.slices)
    save_boxes(output_dir / "boxes.png", evaluation.volumes, protocol)
    save_volumes(output_dir / "volumes.png", evaluation.volumes, protocol)
    save_reliability(
        output_dir / "calibration.png", {s: c.to_dict() for s, c in evaluation.calibration.items()}, protocol
    )
    save_overlays(output_dir / "overlays.png", best_median_worst(evaluation.overlays), protocol)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows, with a column for every key that one of them has; NaN is an empty field."""
    with (
        atomic_file(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows({name: "" if _is_nan(value) else value for name, value in row.items()} for row in rows)


def best_median_worst(overlays: Sequence[tuple[float, Overlay]]) -> list[Overlay]:
    """The cases with highest, middle and lowest Dice, titled so; undefined ones only where there are no others."""
    defined = [pair for pair in overlays if not math.isnan(pair[0])]
    if not defined:
        return [overlay for _, overlay in overlays[:1]]
    ranked = sorted(defined, key=lambda pair: -pair[0])
    places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
    if len(ranked) < 3:
        del places["median"]
    names: dict[int, list[str]] = {}
    for name, place in places.items():
        names.setdefault(place, []).append(name)
    return [
        ranked[place][1]._replace(title=f"{' and '.join(name)}, Dice {ranked[place][0]:.3f}\n{ranked[place][1].title}")
        for place, name in names.items()
    ]


def print_table(evaluation: Evaluation) -> None:
    """One row per case and structure, then the summary, then the original's soft metrics in a table of their own."""
    console = wide_console(160 + 14 * max(0, len(evaluation.metrics) - len(METRICS)))
    settings = evaluation.settings
    threshold = ", ".join(f"{s} {value:g}" for s, value in settings["threshold"].items())
    tolerance = ", ".join(f"{s} {value:g} mm" for s, value in settings["tolerance_mm"].items())
    console.print(f"Per volume, native grid; threshold: {threshold}; tolerance of the surface Dice (nsd): {tolerance}")
    if settings["protocol"]:
        console.print(f"Protocol: {settings['protocol']}")
    table = _table("case", "structure", metrics=evaluation.metrics)
    for row in evaluation.volumes:
        table.add_row(row["case"], row["structure"], *(_format(row[metric]) for metric in evaluation.metrics))
    add_summary(table, summarize(evaluation.volumes, evaluation.metrics), evaluation.metrics)
    console.print(table)
    for row in evaluation.volumes:
        if row["empty"] != "neither":
            console.print(
                f"{row['case']}, {row['structure']}: {_EMPTY[row['empty']]}; – is undefined, left out of means"
            )
    if burden := dice_by_burden(evaluation.volumes):
        groups = ", ".join(f"{name}: {g['mean']:.3f} (n = {g['volumes']:.0f})" for name, g in burden.items())
        console.print(f"Dice of the infection by disease burden (lung involvement): {groups}")
    for structure, calibration in evaluation.calibration.items():
        numbers = f"ECE {calibration.ece:.4f}, Brier {calibration.brier:.4f}"
        console.print(f"Calibration of {structure}, model grid: {numbers}")
    _print_uncertainty(evaluation, console)
    soft = _table("structure", metrics={name: METRICS[name] for name in SOFT_METRICS})
    for structure, values in evaluation.soft_batch.items():
        soft.add_row(structure, *(_format(values[metric]) for metric in SOFT_METRICS))
    console.print("The original's batch-wise soft metrics, not comparable with the Dice of volumes", soft, SOFT_NOTE)


def _print_uncertainty(evaluation: Evaluation, console: Console) -> None:
    """Calibration of what is reported, coverage of the intervals, and whether members name the bad masks."""
    settings = evaluation.settings
    for name, values in evaluation.reported_calibration().items() if "temperature" in settings else ():
        console.print(
            f"Infection, {name.replace('_', ' ')}, where postprocessing has left it: ECE {_format(values['ece'])}, "
            f"Brier {_format(values['brier'])}"
        )
    rows = [row for row in evaluation.volumes if row["structure"] == "infection"]
    with_interval = [row for row in rows if not math.isnan(row.get("volume_low_ml", math.nan))]
    if with_interval:
        covered = [
            is_covered((row["volume_low_ml"], row["volume_high_ml"]), row["reference_ml"]) for row in with_interval
        ]
        console.print(
            f"Intervals at {settings['interval']['level']:.2f} cover the infection's volume in {sum(covered)} of "
            f"{len(covered)}"
        )
    pairs = [(row["pairwise_dice"], row["dice"]) for row in rows if "pairwise_dice" in row]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    if pairs:
        scores, dice = zip(*pairs, strict=True)
        console.print(
            f"Members' pairwise Dice and the true one: Spearman {_format(rank_correlation(scores, dice))}, of the "
            f"worst third {worst_third_found(scores, dice):.0%} found ({len(pairs)} scans)"
        )


def add_summary(
    table: Table, summary: Mapping[str, Mapping[str, Mapping[str, float]]], columns: Mapping[str, Metric]
) -> None:
    """Mean, SD, median, 95 % CI and how many volumes are undefined, for each structure."""
    for structure, metrics in summary.items():
        table.add_section()
        for statistic, label in (
            ("mean", "mean"),
            ("sd", "SD"),
            ("median", "median"),
            ("ci_low", "95 % CI from"),
            ("ci_high", "95 % CI to"),
        ):
            table.add_row(label, structure, *(_format(metrics[metric][statistic]) for metric in columns))
        table.add_row(
            "undefined", structure, *(f"{metrics[m]['undefined']} of {metrics[m]['volumes']}" for m in columns)
        )


def wide_console(width: int = 160) -> Console:
    """A console that does not fold tables of that many characters where its output is not a terminal."""
    console = Console(markup=False)  # names may hold brackets
    if not console.is_terminal:
        console.width = width
    return console


def _table(*names: str, metrics: Mapping[str, Metric]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for metric in metrics.values():
        table.add_column(f"{metric.heading} {metric.unit}".strip(), justify="right")
    return table


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _format(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
