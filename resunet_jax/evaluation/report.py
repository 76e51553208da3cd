"""An evaluation as files and as a table in the terminal."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from resunet_jax.evaluation.evaluate import METRICS, Evaluation, summarize
from resunet_jax.evaluation.lesions import dice_by_load
from resunet_jax.evaluation.metrics import SOFT_METRICS
from resunet_jax.figures import Overlay, save_boxes, save_overlays, save_reliability, save_volumes
from resunet_jax.files import make_output_dir, whole_file, write_text

_EMPTY = {
    "both": "reference and prediction are empty",
    "reference": "the reference is empty",
    "prediction": "the prediction is empty",
}
_SHORT = {
    "specificity": "specif.",
    "accuracy": "accur.",
    "hd95_mm": "HD95 mm",
    "lesion_recall": "lesions",
    "false_lesions": "false l.",
    "volume_error_ml": "err. ml",
    "lung_part_error": "part err.",
}


def write_report(evaluation: Evaluation, output_dir: Path) -> None:
    """Writes metrics.json, volumes.csv, slices.csv and the pictures.

    Raises:
      InputError: the folder cannot be written.
    """
    make_output_dir(output_dir)
    protocol = evaluation.settings["protocol"]
    write_text(output_dir / "metrics.json", evaluation.to_json())
    write_csv(output_dir / "volumes.csv", [{**row, "protocol": protocol} for row in evaluation.volumes])
    write_csv(output_dir / "slices.csv", evaluation.slices)
    save_boxes(output_dir / "boxes.png", evaluation.volumes, ("dice", "nsd"), protocol)
    save_volumes(output_dir / "volumes.png", evaluation.volumes, protocol)
    save_reliability(
        output_dir / "calibration.png", {s: c.to_dict() for s, c in evaluation.calibration.items()}, protocol
    )
    save_overlays(output_dir / "overlays.png", best_median_worst(evaluation.overlays), protocol)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same keys; NaN is an empty field."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
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
    """A row a case and structure, then the summary, then the original's soft numbers apart."""
    console = wide_console()
    settings = evaluation.settings
    threshold = ", ".join(f"{s} {value:g}" for s, value in settings["threshold"].items())
    tolerance = ", ".join(f"{s} {value:g} mm" for s, value in settings["tolerance_mm"].items())
    console.print(f"Per volume, native grid; threshold: {threshold}; tolerance of the surface Dice (nsd): {tolerance}")
    if settings["protocol"]:
        console.print(f"Protocol: {settings['protocol']}")
    table = _table("case", "structure", metrics=METRICS)
    for row in evaluation.volumes:
        table.add_row(row["case"], row["structure"], *(_format(row[metric]) for metric in METRICS))
    add_summary(table, summarize(evaluation.volumes))
    console.print(table)
    for row in evaluation.volumes:
        if row["empty"] != "neither":
            console.print(
                f"{row['case']}, {row['structure']}: {_EMPTY[row['empty']]}; – is undefined, left out of means"
            )
    if loads := dice_by_load(evaluation.volumes):
        console.print(f"Dice of the infection by how much of the lung it takes: {_describe_loads(loads)}")
    for structure, calibration in evaluation.calibration.items():
        numbers = f"expected error {calibration.expected_error:.4f}, Brier {calibration.brier:.4f}"
        console.print(f"Calibration of {structure}, model grid: {numbers}")
    soft = _table("structure", metrics=SOFT_METRICS)
    for structure, values in evaluation.soft_batch.items():
        soft.add_row(structure, *(_format(values[metric]) for metric in SOFT_METRICS))
    console.print("The original's soft numbers, not comparable with the Dice of volumes", soft, evaluation.soft_note)


def add_summary(table: Table, summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Mean, SD, median, interval and how many volumes are undefined, for each structure."""
    for structure, metrics in summary.items():
        table.add_section()
        for statistic, label in (
            ("mean", "mean"),
            ("sd", "SD"),
            ("median", "median"),
            ("ci_low", "95 % from"),
            ("ci_high", "95 % to"),
        ):
            table.add_row(label, structure, *(_format(metrics[metric][statistic]) for metric in METRICS))
        table.add_row(
            "undefined", structure, *(f"{metrics[m]['undefined']} of {metrics[m]['volumes']}" for m in METRICS)
        )


def _describe_loads(loads: Mapping[str, Mapping[str, float]]) -> str:
    """What `dice_by_load` returns, in a line."""
    return ", ".join(f"{name}: {group['mean']:.3f} ({group['volumes']:.0f} volumes)" for name, group in loads.items())


def wide_console() -> Console:
    """A console that does not fold tables where its output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


def _table(*names: str, metrics: Sequence[str]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for metric in metrics:
        table.add_column(_SHORT.get(metric, metric), justify="right")
    return table


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _format(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
