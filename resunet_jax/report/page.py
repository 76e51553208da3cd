"""The report of one scan as a single HTML file: viewer, numbers, warnings; it needs no network and no server."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from resunet_jax.files import atomic_file, write_text
from resunet_jax.inference.uncertainty import UNCERTAINTY_STEPS
from resunet_jax.report.markup import fill_page, items, json_block, number, table_row, to_base85
from resunet_jax.report.slices import (
    HU_LOWEST,
    HU_STEP,
    INFECTION_BIT,
    Bytes2D,
    EncodedSlice,
    Sampling,
    choose_sampling,
    pack,
)


class Layer(NamedTuple):
    """What can be laid over the CT.

    Attributes:
      id: of the layer.
      label: what the page calls it.
      key: on the keyboard.
      color: RGB.
      plane: of `EncodedSlice.planes`.
      mask: bits of the plane; 0 where the layer's value is an opacity, 0 to `UNCERTAINTY_STEPS`.
      equals: what these bits are inside the layer.
      on: whether it is shown at first.
    """

    id: str
    label: str
    key: str
    color: tuple[int, int, int]
    plane: str = "masks"
    mask: int = 3
    equals: int = 1
    on: bool = True


LAYERS = (
    Layer("left", "Left lung", "l", (86, 180, 233)),
    Layer("right", "Right lung", "r", (170, 130, 245), equals=2),
    Layer("infection", "Infection", "i", (240, 62, 52), mask=INFECTION_BIT, equals=INFECTION_BIT),
    Layer("uncertainty", "Uncertainty", "u", (255, 204, 0), plane="uncertainty", mask=0, equals=0, on=False),
)
_TILES = 12
_TILE_WIDTH = 200
_GREYS = 48


def write_scan_page(
    path: Path, report: Mapping[str, Any], slices: Sequence[EncodedSlice], size_mm: Sequence[float]
) -> None:
    """Writes the page of a scan, atomically.

    Args:
      path: the .html to write.
      report: the numbers of the scan; keys that are not known are ignored.
      slices: all slices of the scan, from the feet to the head.
      size_mm: of a voxel along rows and columns, and distance of slices.

    Raises:
      InputError: it cannot be written.
      ValueError: there are no slices, they differ in shape, or `by_slice` has another number of them.
    """
    if not slices or any(s.shape != slices[0].shape for s in slices):
        raise ValueError(f"expected slices of one shape, found {sorted({s.shape for s in slices})}")
    counts = [len(values) for values in report["by_slice"].values()]
    if any(count != len(slices) for count in counts):
        raise ValueError(f"expected {len(slices)} values by slice, found {counts}")
    write_text(path, _page(report, slices, size_mm))


def _page(report: Mapping[str, Any], slices: Sequence[EncodedSlice], size_mm: Sequence[float]) -> str:
    infection_ml, sampling = report["by_slice"]["infection_ml"], choose_sampling(slices)
    layers = [layer for layer in LAYERS if layer.plane in slices[0].planes()]
    variables = "".join(f"--{layer.id}:rgb{layer.color};" for layer in LAYERS)
    return fill_page(
        "scan",
        style=f":root{{{variables}}}\n",
        name=escape(str(report["scan"]["name"])),
        scan=_scan_line(report["scan"]),
        warnings=_warnings(report),
        figures=_figures(report),
        layers="".join(_layer_switch(layer) for layer in layers),
        last=str(len(slices)),
        shown=_shown_note(slices[0].shape, sampling),
        bars=_bars(infection_ml),
        most=number(max(infection_ml), 2, "ml"),
        montage=_montage(slices, sampling, size_mm),
        tables=_tables(report),
        notes=items(report.get("notes", ())),
        details=_details(report),
        version=escape(str(report.get("version", ""))),
        data=json_block(_data(infection_ml, slices, sampling, layers, size_mm)),
    )


def _data(
    infection_ml: Sequence[float],
    slices: Sequence[EncodedSlice],
    sampling: Sampling,
    layers: Sequence[Layer],
    size_mm: Sequence[float],
) -> dict[str, Any]:
    """What the page's script reads; planes are base 85 of `pack`."""
    packed: dict[str, list[str]] = {}
    coronal: dict[str, list[Bytes2D]] = {}
    row = _coronal_row(slices, sampling)
    for one in slices:
        for name, plane in one.planes().items():
            packed.setdefault(name, []).append(to_base85(pack(sampling(plane))))
            coronal.setdefault(name, []).append(plane[row, sampling.columns])
    return {
        "hu": {"lowest": HU_LOWEST, "step": HU_STEP},
        "uncertaintySteps": UNCERTAINTY_STEPS,
        "rows": sampling.rows.tolist(),
        "columns": sampling.columns.tolist(),
        "row": row,
        "sizeMm": list(size_mm),
        "stepVoxels": [_step(sampling.rows), _step(sampling.columns)],
        "layers": [layer._asdict() for layer in layers],
        "start": int(np.argmax(infection_ml)) if any(infection_ml) else len(slices) // 2,
        "infection_ml": infection_ml,
        "planes": packed,
        "coronal": {name: to_base85(pack(np.stack(lines[::-1]))) for name, lines in coronal.items()},
    }


def _step(positions: Any) -> float:
    return float(positions[-1] - positions[0]) / (len(positions) - 1) if len(positions) > 1 else 1.0


def _coronal_row(slices: Sequence[EncodedSlice], sampling: Sampling) -> int:
    """The shown row of the scan that cuts most infection, else most lung, else the middle."""
    infected, lung = np.zeros(slices[0].shape[0]), np.zeros(slices[0].shape[0])
    for one in slices:
        masks = one.planes()["masks"]
        infected += (masks & INFECTION_BIT > 0).sum(1)
        lung += (masks > 0).sum(1)
    for count in (infected[sampling.rows], lung[sampling.rows]):
        if count.any():
            return int(sampling.rows[np.argmax(count)])
    return int(sampling.rows[len(sampling.rows) // 2])


def _scan_line(scan: Mapping[str, Any]) -> str:
    shape = " × ".join(str(v) for v in scan["shape"])
    spacing = " × ".join(number(v, 2) for v in scan["spacing_mm"])
    return escape(f"{scan['file']} · {scan['format']} · {shape} voxels of {spacing} mm")


def _warnings(report: Mapping[str, Any]) -> str:
    texts = report.get("warnings", ())
    if not texts:
        return ""
    heading = "1 warning" if len(texts) == 1 else f"{len(texts)} warnings"
    return (
        f'<section class="warnings" aria-labelledby="warnings"><h2 id="warnings">{heading}</h2>'
        f"<ul>{items(texts)}</ul></section>"
    )


def _figures(report: Mapping[str, Any]) -> str:
    lung, infection = report["lung"], report["infection"]
    level = (report.get("uncertainty") or {}).get("interval") or {}
    percent, ml = (
        _interval(infection.get(f"{name}_interval_{unit}"), sign, level)
        for name, unit, sign in (("involvement", "percent", "%"), ("volume", "ml", "ml"))
    )
    pairs = (
        ("Lung involvement", number(infection["involvement_percent"], 1, "%") + percent),
        ("Grade", f"{number(report.get('grade'))}<small> of 5</small>"),
        ("Infection", number(infection["volume_ml"], 1, "ml") + ml),
        ("Lung", number(lung["volume_ml"], 0, "ml")),
        ("Lesions", number(infection["lesions"])),
    )
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)


def _interval(bounds: Sequence[float] | None, unit: str, level: Mapping[str, Any]) -> str:
    """What the number before it may be, and how often it is; the notes say for whom."""
    if not bounds:
        return ""
    sure = f"{100 * level['level']:.0f}\N{NO-BREAK SPACE}%" if level.get("level") else ""
    kind = "" if level.get("guarantee") else "estimate"
    said = f" ({', '.join(word for word in (sure, kind) if word)})" if sure or kind else ""
    return f"<small class=interval>{number(bounds[0], 1)} to {number(bounds[1], 1, unit)}{said}</small>"


def _layer_switch(layer: Layer) -> str:
    checked = " checked" if layer.on else ""
    return (
        f'<label class="switch"><input type="checkbox" data-layer="{layer.id}"{checked}>'
        f'<i class="swatch {layer.id}"></i>{layer.label} <kbd>{layer.key.upper()}</kbd></label>'
    )


def _shown_note(shape: tuple[int, int], sampling: Sampling) -> str:
    rows, columns = len(sampling.rows), len(sampling.columns)
    step = _step(sampling.columns)
    which = (
        "every voxel of the box" if step == 1 else f"one voxel in {step:.2f} along each axis (nearest, not averaged)"
    )
    return (
        f"Shown: {rows} × {columns} pixels of the box around the body, from slices of {shape[0]} × {shape[1]} voxels; "
        f"{which}, CT and masks of the very same voxel, grey levels in steps of {HU_STEP} HU. "
        "Volumes are computed on all voxels."
    )


def _bars(values: Sequence[float]) -> str:
    """SVG path of a bar for each slice, feet below; 100 wide."""
    count, top = len(values), max(values) or 1
    return "".join(f"M0 {count - k - 0.9:g}h{100 * v / top:.1f}v.8H0z" for k, v in enumerate(values) if v > 0)


def write_preview(path: Path, slices: Sequence[EncodedSlice], size_mm: Sequence[float]) -> None:
    """Writes up to 12 slices with the contours of the masks as a PNG, atomically; for arguments see `write_scan_page`.

    Raises:
      InputError: it cannot be written.
    """
    image, _ = _draw_montage(slices, choose_sampling(slices), size_mm)
    with atomic_file(path) as partial:
        image.save(partial, "png", optimize=True)


def _draw_montage(
    slices: Sequence[EncodedSlice], sampling: Sampling, size_mm: Sequence[float]
) -> tuple[Image.Image, str]:
    """Up to 12 slices through the lungs with the contours of the masks, and which they are."""
    with_lung = [k for k, s in enumerate(slices) if s.planes()["masks"].any()] or list(range(len(slices)))
    picks = sorted({with_lung[round(i)] for i in np.linspace(0, len(with_lung) - 1, _TILES)}, reverse=True)
    step = max(1.0, len(sampling.columns) / _TILE_WIDTH)
    thin = Sampling(*(axis[(np.arange(max(1, int(len(axis) / step))) * step).astype(int)] for axis in sampling))
    tiles = [_tile(slices[k], thin) for k in picks]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 4)
    sheet = np.concatenate([np.concatenate(tiles[i : i + 4], axis=1) for i in range(0, len(tiles), 4)])
    image = _indexed(sheet)
    aspect = size_mm[0] * _step(thin.rows) / (size_mm[1] * _step(thin.columns))
    if abs(aspect - 1) > 0.02:
        image = image.resize((image.width, max(1, round(image.height * aspect))), Image.Resampling.NEAREST)
    return image, "Axial slices " + ", ".join(str(k + 1) for k in picks)


def _montage(slices: Sequence[EncodedSlice], sampling: Sampling, size_mm: Sequence[float]) -> str:
    """The same as HTML, the PNG in base64."""
    image, label = _draw_montage(slices, sampling, size_mm)
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return (
        f'<figure><img src="{source}" width="{image.width}" '
        f'height="{image.height}" alt="{label}, lung window, with the contours of lungs and infection">'
        f"<figcaption>{label}, from the head to the feet; lung window.</figcaption></figure>"
    )


def _indexed(sheet: Bytes2D) -> Image.Image:
    image = Image.frombytes("P", (sheet.shape[1], sheet.shape[0]), sheet.tobytes())
    greys = [v for level in range(_GREYS) for v in (round(255 * level / (_GREYS - 1)),) * 3]
    image.putpalette(greys + [v for layer in LAYERS[:3] for v in layer.color])
    return image


def _tile(one: EncodedSlice, thin: Sampling) -> Bytes2D:
    """A slice in the lung window as indices of the montage's palette."""
    planes = {name: thin(plane) for name, plane in one.planes().items()}
    hu = planes["ct"].astype(float) * HU_STEP + HU_LOWEST
    tile = np.rint(np.clip((hu + 1350) / 1500, 0, 1) * (_GREYS - 1)).astype(np.uint8)
    for index, layer in enumerate(LAYERS[:3]):
        inside = np.pad(planes["masks"] & layer.mask == layer.equals, 1)
        core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        tile[inside[1:-1, 1:-1] & ~core] = _GREYS + index
    return tile


def _tables(report: Mapping[str, Any]) -> str:
    infection = report["infection"]
    kinds = {"both": "lungs", "left": "lung", "right": "lung"}
    rows: list[tuple[str, Mapping[str, Any]]] = [
        (f"{key.capitalize()} {kinds.get(key, 'third')}", values) for key, values in report["involvement"].items()
    ]
    lobes = report.get("lobes") or {}
    rows += [(f"Lobe {key}", values) for key, values in lobes.items() if isinstance(values, Mapping)]
    body = "".join(_region_row(name, values) for name, values in rows)
    titles = ("Region", "Lung, ml", "Infection in it, ml", "Involved, %", "Grade")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    facts = [
        ("Ground glass", number(infection["ground_glass_ml"], 1, "ml")),
        (_consolidation(infection), number(infection["consolidation_ml"], 1, "ml")),
        ("Mean density of the infection", number(infection["mean_hu"], 0, "HU")),
        ("Lesions", number(infection["lesions"])),
        ("Largest lesions", _lesions(infection.get("lesion_volumes_ml", ()))),
    ]
    uncertainty = report.get("uncertainty") or {}
    if uncertainty.get("members"):
        facts.append(
            (
                f"Agreement of {number(uncertainty['members'])} predictions (mean pairwise Dice; low is doubtful)",
                number(uncertainty.get("pairwise_dice"), 2),
            )
        )
    if "score" in lobes:
        highest = 5 * (len(lobes) - 1)  # for five lobes 25, the CT severity score
        facts.append(("Score, sum over the lobes", f"{number(lobes['score'])} of {highest}"))
    listed = "".join(table_row([escape(name), value]) for name, value in facts)
    return (
        f'<table class="numbers"><caption>Involvement by region</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
        f'<table class="numbers"><caption>Infection</caption><tbody>{listed}</tbody></table>'
    )


def _region_row(name: str, values: Mapping[str, Any]) -> str:
    numbers = [number(values.get("lung_ml")), number(values.get("infection_ml"), 1), number(values.get("percent"), 1)]
    return table_row([escape(name), *numbers, number(values.get("grade"))])


def _consolidation(infection: Mapping[str, Any]) -> str:
    above = infection.get("consolidation_above_hu")
    return "Consolidation" if above is None else f"Consolidation (from {number(above, 0, 'HU')})"


def _lesions(volumes: Sequence[float]) -> str:
    largest = sorted(volumes, reverse=True)[:5]
    return ", ".join(number(v, 1) for v in largest) + "\N{NO-BREAK SPACE}ml" if largest else number(None)


def _details(report: Mapping[str, Any]) -> str:
    sections = []
    for key in ("models", "settings"):
        rows = "".join(table_row([escape(k), escape(v)]) for k, v in _flatten(report.get(key) or {}))
        sections.append(f"<table><caption>{key.capitalize()}</caption><tbody>{rows}</tbody></table>" if rows else "")
    seconds = number(report.get("seconds"), 1, "s")
    program = table_row(["resunet-jax", escape(str(report.get("version", "")))]) + table_row(["Time", seconds])
    return f"<table><caption>Program</caption><tbody>{program}</tbody></table>{''.join(sections)}"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flatten(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "–" if entry is None else str(entry)
