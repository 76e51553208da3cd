"""Many scans, one after another: goes on after a bad one, and a second run does only what is not done."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from resunet_jax.config import to_dict
from resunet_jax.errors import InputError
from resunet_jax.files import write_text
from resunet_jax.inference.segment import Segmenter, mask_paths, prepared_parts, read_ahead, scan_name, write_masks
from resunet_jax.training.checkpoints import fingerprint

RECORD = "masks.json"
"""File of the output folder that says which scans were segmented, and how."""


class Outcome(NamedTuple):
    """What has become of a scan.

    Attributes:
      scan: the file.
      masks: the files written, now or before; empty where it cannot be segmented.
      error: why it cannot be segmented, or None.
      done_before: an earlier run has written the masks, by the same models and settings.
    """

    scan: Path
    masks: list[Path]
    error: InputError | None = None
    done_before: bool = False


def segment_scans(
    scans: Sequence[Path], output_dir: Path, segmenter: Segmenter, *, save_probabilities: bool = False
) -> Iterator[Outcome]:
    """Segments scans as `segment_scan` does; the next one is read while the models work on this one.

    Scans that `output_dir` already has masks of, from the same file by the same models and settings, are not segmented
    again.

    Args:
      scans: .nii or .nii.gz files of different names.
      output_dir: gets the masks, and masks.json: {"settings": ..., "scans": {name: {"bytes", "modified_ns"}}}.
      segmenter: the models.
      save_probabilities: see `segment_scan`.

    Raises:
      InputError: the record of an earlier run cannot be replaced. What concerns one scan is in its `Outcome`.
    """
    settings = _settings(segmenter, save_probabilities)
    done = _read_record(output_dir / RECORD, settings)
    masks = {scan: mask_paths(scan, output_dir, segmenter, save_probabilities) for scan in scans}
    finished = {
        scan
        for scan in scans
        if done.get(scan.name, {}) == _state(scan) != {} and all(p.is_file() for p in masks[scan])
    }
    for scan in scans:
        if scan in finished:
            yield Outcome(scan, masks[scan], done_before=True)
    missing = [scan for scan in scans if scan not in finished]
    for scan in missing:
        done.pop(scan.name, None)
    if missing and (output_dir / RECORD).is_file():  # or it would vouch for masks that are being replaced
        _write_record(output_dir / RECORD, settings, done)
    with contextlib.closing(read_ahead(prepared_parts(missing, segmenter.preprocess))) as parts:
        for scan, own_parts in itertools.groupby(parts, key=lambda part: part.scan):
            try:
                state = _state(scan)
                write_masks(scan, own_parts, output_dir, segmenter, save_probabilities=save_probabilities)
                done[scan.name] = state
                _write_record(output_dir / RECORD, settings, done)
                yield Outcome(scan, masks[scan])
            except InputError as error:
                yield Outcome(scan, [], error)


def _settings(segmenter: Segmenter, save_probabilities: bool) -> dict[str, Any]:
    """All that decides what the masks of a scan are."""
    models = {name: getattr(segmenter, name) for name in segmenter.structures}
    return {
        "models": {
            name: {"fingerprint": fingerprint(model.variables), "config": to_dict(model.config)}
            for name, model in models.items()
        },
        "thresholds": {name: segmenter.threshold(name) for name in models},
        "probabilities": save_probabilities,
    }


def _state(scan: Path) -> dict[str, int]:
    """Tells, without reading it, whether a file is the one of before; of a missing file, nothing."""
    try:
        status = scan.stat()
    except OSError:
        return {}
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _read_record(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The scans that are done by these settings; none where the record is absent or cannot be read."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return dict(record["scans"]) if record["settings"] == settings else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _write_record(file: Path, settings: dict[str, Any], done: dict[str, Any]) -> None:
    record = {"settings": settings, "scans": done}
    write_text(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def find_scans(path: Path) -> list[Path]:
    """The scan itself, or the .nii and .nii.gz files of a folder, sorted.

    Raises:
      InputError: nothing there, no scan in the folder, or two scans of one name.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; check --input")
    scans = sorted(p for p in path.iterdir() if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith("."))
    if not scans:
        raise InputError(f"{path}: no .nii or .nii.gz file in it; check --input")
    names = [scan_name(scan) for scan in scans]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: {name}.nii and {name}.nii.gz would write the same masks; remove one of them")
    return scans
