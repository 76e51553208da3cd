"""Figures: curves, overlays, augmented batches, the steps of the region of interest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.preprocess import air_offset, body_scale, prepare_slice, slice_box
from resunet_jax.data.roi import body_mask
from resunet_jax.data.volume import Array, FloatArray, Volume
from resunet_jax.files import atomic_file

COLORS = {"lung": "tab:cyan", "infection": "tab:red"}

# Names may hold dollar signs; texts take the setting when they are made, not when they are drawn.
_literal_text = mpl.rc_context({"text.parse_math": False})


class Overlay(NamedTuple):
    """One slice to look at; masks by structure, each (H, W), above 0 inside.

    Attributes:
      title: what it is.
      image: float (H, W) in [0, 1].
      reference: {"lung": ..., "infection": ...}, what there is.
      predicted: the same.
    """

    title: str
    image: FloatArray
    reference: Mapping[str, Array]
    predicted: Mapping[str, Array]


def _grid(rows: int, columns: int, cell: float) -> tuple[Figure, Any]:
    # A Figure of its own, not pyplot, which keeps global state.
    figure = Figure(figsize=(columns * cell, rows * cell), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _tiles(rows: int, columns: int, note: str = "") -> tuple[Figure, Any]:
    """Places for pictures with titles; fixed, because matplotlib takes as long to lay them out as to draw them."""
    top = 0.6 if note else 0.4  # inches: titles of two lines
    width, height = 2.6 * columns, 2.6 * rows + top
    figure = Figure(figsize=(width, height))
    figure.suptitle(note, fontsize=8, y=1 - 0.05 / height, va="top")
    margins = {"left": 0.05 / width, "right": 1 - 0.05 / width, "bottom": 0.05 / height, "top": 1 - top / height}
    places = {**margins, "wspace": 0.04, "hspace": 0.15}
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=places)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=dpi)


def _show(axes: Axes, image: Array, title: str = "") -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()


def _tint(axes: Axes, masks: Mapping[str, Array]) -> None:
    for name, mask in masks.items():
        rgba = np.zeros((*mask.shape, 4))
        rgba[...] = mpl.colors.to_rgba(COLORS[name])
        rgba[..., 3] = 0.4 * (mask > 0)
        axes.imshow(rgba, interpolation="nearest")


@_literal_text
def save_overlays(path: Path, overlays: Sequence[Overlay], note: str = "") -> None:
    """One row per slice: CT, reference, prediction; lungs in cyan, infection in red; `note` above it all."""
    figure, axes = _tiles(len(overlays), 3, note)
    for row, overlay in zip(axes, overlays, strict=True):
        for column, masks, title in zip(
            row, ({}, overlay.reference, overlay.predicted), (overlay.title, "reference", "prediction"), strict=True
        ):
            _show(column, overlay.image, title)
            _tint(column, masks)
    _save(figure, path, dpi=110)


@_literal_text
def save_comparison(path: Path, slices: Mapping[str, Sequence[tuple[float, Overlay]]]) -> None:
    """One row per slice: CT, reference, and the prediction of several models with its Dice of the volume.

    By the name of the model, `slices` are (Dice, slice) of the same slices in the same order; of these, the first
    model's best, median and worst are drawn.
    """
    dice = [dice for dice, _ in next(iter(slices.values()))]
    ranked = sorted((i for i, value in enumerate(dice) if not np.isnan(value)), key=lambda i: -dice[i])
    picks = dict.fromkeys((ranked[0], ranked[len(ranked) // 2], ranked[-1])) if ranked else [0]
    figure, axes = _tiles(len(picks), 2 + len(slices))
    for pick, row in zip(picks, axes, strict=True):
        overlay = next(iter(slices.values()))[pick][1]
        _show(row[0], overlay.image, overlay.title)
        _show(row[1], overlay.image, "reference")
        _tint(row[1], overlay.reference)
        for axis, (name, own) in zip(row[2:], slices.items(), strict=True):
            value, overlay = own[pick]
            _show(axis, overlay.image, f"{name}, Dice {'–' if np.isnan(value) else f'{value:.3f}'}")
            _tint(axis, overlay.predicted)
    _save(figure, path, dpi=110)


@_literal_text
def save_loss_curves(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Training and, where there is one, validation loss and Dice by epoch, with the chosen epoch's values marked."""
    figure, axes = _grid(1, 2, cell=4.5)
    epochs = [record["epoch"] for record in history]
    validated = history[-1]["val_loss"] is not None
    best = int(np.argmin([record["val_loss"] for record in history])) if validated else len(history) - 1
    for axis, metric, label in zip(axes[0], ("loss", "dice"), ("loss", "pooled Dice"), strict=True):
        for part in ("train", "val") if validated else ("train",):
            values = [
                np.nan if record[f"{part}_{metric}"] is None else record[f"{part}_{metric}"] for record in history
            ]
            axis.plot(epochs, values, ".-", label=f"{part}, {values[best]:.4f} at epoch {epochs[best]}")
        axis.axvline(epochs[best], color="gray", linewidth=0.8, linestyle=":")
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
    _save(figure, path, dpi=110)


@_literal_text
def save_batch(path: Path, images: Array, masks: Array, structure: str) -> None:
    """A training batch (N, S, S, C), the first channel of each slice with its mask tinted."""
    figure, axes = _tiles(-(-len(images) // 4), 4)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, mask in zip(axes.flat, images, masks, strict=False):
        _show(axis, image[..., 0])
        _tint(axis, {structure: mask[..., 0]})
    _save(figure, path, dpi=110)


@_literal_text
def save_roi_steps(path: Path, volumes: Mapping[str, Volume], config: PreprocessConfig) -> None:
    """For three slices of each scan, by title: slice, threshold, dilation, box, and the crop that a model sees."""
    offsets = {title: air_offset(volume, config) for title, volume in volumes.items()}
    picks = [(title, volume, k) for title, volume in volumes.items() for k in _picks(volume)]
    figure, axes = _tiles(len(picks), 5)
    for row, (title, volume, k) in zip(axes, picks, strict=True):
        (image, threshold), box = body_scale(volume, k, config), slice_box(volume, k, config)
        _show(row[0], image, f"{title} slice {k}")
        _show(row[1], body_mask(image, threshold, 0), f"above {threshold:.3f} of the range")
        _show(row[2], body_mask(image, threshold, config.body_dilation), f"dilated {config.body_dilation} times")
        _show(row[3], image, "box of the largest component")
        corner = (box.column - 0.5, box.row - 0.5)
        row[3].add_patch(mpl.patches.Rectangle(corner, box.width, box.height, fill=False, color="yellow"))
        crop = prepare_slice(volume, k, config, offsets[title])
        _show(row[4], crop, f"crop, {config.image_size}×{config.image_size}")
    _save(figure, path, dpi=90)


def _picks(volume: Volume) -> list[int]:
    slices = volume.values.shape[-1]
    return sorted({slices // 6, slices // 2, slices * 5 // 6})


@_literal_text
def save_boxes(path: Path, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """Box plots of Dice and surface Dice by structure, one point per volume; `note` above it all.

    Undefined values of the rows, as in `Evaluation.volumes`, are left out and counted under the box.
    """
    figure, axes = _grid(1, 2, cell=4.5)
    figure.suptitle(note, fontsize=8)
    structures = list(dict.fromkeys(row["structure"] for row in rows))
    for axis, metric in zip(axes[0], ("dice", "nsd"), strict=True):
        values = [np.array([row[metric] for row in rows if row["structure"] == s], float) for s in structures]
        defined = [v[np.isfinite(v)] for v in values]
        names = [f"{s}\n{len(d)} of {len(v)}" for s, d, v in zip(structures, defined, values, strict=True)]
        axis.boxplot(defined, tick_labels=names, showfliers=False)
        for place, points in enumerate(defined, start=1):
            axis.plot(np.full(len(points), place), points, ".", color=_color(structures[place - 1]), alpha=0.6)
        axis.set_ylim(-0.02, 1.02)
        axis.set_title(metric)
        axis.tick_params(labelsize=7)
    _save(figure, path, dpi=110)


@_literal_text
def save_differences(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Difference of variants from the first in mean Dice, with 95 % CI; a panel per structure; see `summarize_runs`."""
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, structure in zip(axes, ("lung", "infection"), strict=True):
        axis.axvline(0, color="gray", linewidth=0.8)
        for place, values in enumerate(row.get(structure) for row in rows):
            if values is None:
                continue
            axis.plot(values["difference"], place, "o", color=COLORS[structure])
            axis.plot((values["difference_low"], values["difference_high"]), (place, place), color=COLORS[structure])
        axis.locator_params(axis="x", nbins=5)  # small changes have long numbers
        axis.set_title(f"{structure}: change in Dice against {rows[0]['name']!r}, 95 % CI", fontsize=9)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0].invert_yaxis()
    _save(figure, path, dpi=110)


@_literal_text
def save_cases(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Dice of each volume by each variant, mean over seeds; one panel per structure; see `summarize_runs`."""
    cases = list(dict.fromkeys(case for row in rows for case in row["lung"]["volumes"]))
    figure = Figure(figsize=(10, 1.4 + 0.32 * len(cases)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, structure in zip(axes, ("lung", "infection"), strict=True):
        for row in rows:
            volumes = row[structure]["volumes"] if structure in row else {}
            axis.plot(
                list(volumes.values()), [cases.index(case) for case in volumes], "o", label=row["name"], alpha=0.8
            )
        axis.set_title(f"{structure}: Dice", fontsize=9)
        axis.grid(axis="y", linewidth=0.5)
    axes[1].set_xlim(-0.02, 1.02)
    axes[0].set_yticks(range(len(cases)), cases)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=7)
    _save(figure, path, dpi=110)


@_literal_text
def save_volumes(path: Path, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """Predicted against reference volume in ml, with the identity line; one panel per structure."""
    structures = list(dict.fromkeys(row["structure"] for row in rows))
    figure, axes = _grid(1, len(structures), cell=4)
    figure.suptitle(note, fontsize=8)
    for axis, structure in zip(axes[0], structures, strict=True):
        pairs = np.array([(r["reference_ml"], r["volume_ml"]) for r in rows if r["structure"] == structure])
        top = float(pairs.max()) * 1.05 or 1.0
        axis.plot((0, top), (0, top), color="gray", linewidth=0.8)
        axis.plot(*pairs.T, "o", color=_color(structure), alpha=0.7)
        axis.set_title(structure)
        axis.set_xlabel("reference, ml")
        axis.set_ylabel("predicted, ml")
    _save(figure, path, dpi=110)


@_literal_text
def save_reliability(path: Path, calibration: Mapping[str, Mapping[str, Any]], note: str = "") -> None:
    """Observed frequency against predicted probability, of {structure: `Calibration.to_dict()`}; `note` above all."""
    figure, axes = _grid(1, len(calibration), cell=4)
    figure.suptitle(note, fontsize=8)
    for axis, (structure, values) in zip(axes[0], calibration.items(), strict=True):
        axis.plot((0, 1), (0, 1), color="gray", linewidth=0.8)
        means = [bin_["mean_probability"] for bin_ in values["bins"]]
        axis.plot(means, [bin_["frequency"] for bin_ in values["bins"]], "o-", color=_color(structure))
        axis.set_title(f"{structure}: ECE {values['ece']:.4f}, Brier {values['brier']:.4f}", fontsize=9)
        axis.set_xlabel("predicted probability, mean of the bin")
        axis.set_ylabel("observed frequency")
    _save(figure, path, dpi=110)


def _color(structure: str) -> str:
    return COLORS["infection" if structure == "infection" else "lung"]
