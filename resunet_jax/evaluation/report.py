"""An evaluation as files and as a table in the terminal."""

import csv
import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from resunet_jax.evaluation.evaluate import Evaluation
from resunet_jax.evaluation.metrics import HARD_METRICS
from resunet_jax.figures import save_bars, save_overlays
from resunet_jax.files import make_output_dir, whole_file, write_text

_EMPTY = {
    "both": "reference and prediction are empty",
    "reference": "the reference is empty",
    "prediction": "the prediction is empty",
}


def write_report(evaluation: Evaluation, output_dir: Path) -> None:
    """Writes metrics.json, metrics.csv, dice.png and overlays.png.

    Raises:
      InputError: the folder cannot be written.
    """
    make_output_dir(output_dir)
    write_text(output_dir / "metrics.json", evaluation.to_json())
    with (
        whole_file(output_dir / "metrics.csv") as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(evaluation.volumes[0]))
        writer.writeheader()
        writer.writerows(
            {name: "" if _is_nan(value) else value for name, value in row.items()} for row in evaluation.volumes
        )
    dice: dict[str, dict[str, float]] = {}
    for row in evaluation.volumes:
        dice.setdefault(row["structure"], {})[row["case"]] = row["dice"]
    save_bars(output_dir / "dice.png", dice, "Dice on the native grid")
    save_overlays(output_dir / "overlays.png", evaluation.overlays)


def print_table(evaluation: Evaluation) -> None:
    """A row a case and structure, then mean and SD, then the original's soft numbers apart."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print("Per volume: hard masks at 0.5, native grid")
    table = _table("case", "structure")
    for row in evaluation.volumes:
        table.add_row(row["case"], row["structure"], *(_format(row[metric]) for metric in HARD_METRICS))
    for structure, metrics in evaluation.summary().items():
        table.add_section()
        for statistic in ("mean", "sd"):
            table.add_row(statistic, structure, *(_format(metrics[m][statistic]) for m in HARD_METRICS))
    console.print(table)
    for row in evaluation.volumes:
        if row["empty"] != "neither":
            console.print(
                f"{row['case']}, {row['structure']}: {_EMPTY[row['empty']]}; – is undefined, left out of means"
            )
    console.print(
        "The original's soft numbers: batches of 4 slices, model grid; not comparable with the Dice of volumes"
    )
    soft = _table("structure")
    for structure, values in evaluation.soft_batch.items():
        soft.add_row(structure, *(_format(values[metric]) for metric in HARD_METRICS))
    console.print(soft)


def _table(*names: str) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for metric in HARD_METRICS:
        table.add_column(metric, justify="right")
    return table


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _format(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"
