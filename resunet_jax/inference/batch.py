"""Many scans, one after another: continues after a bad one, and a second run does only what is missing."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from resunet_jax.config import to_dict
from resunet_jax.data.readers import READERS, Reader, Source
from resunet_jax.errors import InputError
from resunet_jax.files import write_text
from resunet_jax.inference.predictor import Predictor
from resunet_jax.inference.scan import iter_chunks, mask_paths, prefetch, write_masks
from resunet_jax.weights.store import fingerprint

MANIFEST = "masks.json"
"""File of the output folder that says which scans were segmented, and how."""


class ScanResult(NamedTuple):
    """What has become of a scan.

    Attributes:
      scan: the source.
      masks: the files written, now or before; empty where it cannot be segmented.
      error: why it cannot be segmented, or None.
      skipped: an earlier run has written the masks, by the same models and settings.
    """

    scan: Source
    masks: list[Path]
    error: InputError | None = None
    skipped: bool = False


def segment_scans(
    scans: Sequence[Source],
    output_dir: Path,
    predictor: Predictor,
    *,
    save_probabilities: bool = False,
    readers: Mapping[str, Reader] = READERS,
) -> Iterator[ScanResult]:
    """Segments scans as `segment_scan` does; the next one is read while the models work on this one.

    Scans that `output_dir` already has masks of, from the same file by the same models and settings, are not segmented
    again.

    Args:
      scans: from `find_sources`, of different names.
      output_dir: gets the masks, and masks.json: {"settings": ..., "scans": {name: {"bytes", "modified_ns"}}}.
      predictor: the models.
      save_probabilities: see `segment_scan`.
      readers: the table of formats.

    Raises:
      InputError: the manifest of an earlier run cannot be replaced. What concerns one scan is in its `ScanResult`.
    """
    settings = _settings(predictor, save_probabilities)
    done = _read_manifest(output_dir / MANIFEST, settings)
    masks = {scan: mask_paths(scan, output_dir, predictor, save_probabilities) for scan in scans}
    finished = {
        scan
        for scan in scans
        if done.get(_key(scan), {}) == _state(scan) != {} and all(path.is_file() for path in masks[scan])
    }
    for scan in scans:
        if scan in finished:
            yield ScanResult(scan, masks[scan], skipped=True)
    missing = [scan for scan in scans if scan not in finished]
    for scan in missing:
        done.pop(_key(scan), None)
    if missing and (output_dir / MANIFEST).is_file():  # or it would vouch for masks that are being replaced
        _write_manifest(output_dir / MANIFEST, settings, done)
    with contextlib.closing(prefetch(iter_chunks(missing, predictor.preprocess, readers))) as chunks:
        for scan, own_chunks in itertools.groupby(chunks, key=lambda chunk: chunk.scan):
            try:
                state = _state(scan)
                write_masks(scan, own_chunks, output_dir, predictor, save_probabilities=save_probabilities)
                done[_key(scan)] = state
                _write_manifest(output_dir / MANIFEST, settings, done)
                yield ScanResult(scan, masks[scan])
            except InputError as error:
                yield ScanResult(scan, [], error)


def _settings(predictor: Predictor, save_probabilities: bool) -> dict[str, Any]:
    """All that decides what the masks of a scan are."""
    models = {name: getattr(predictor, name) for name in predictor.structures}
    return {
        "models": {
            name: {"fingerprint": fingerprint(model.variables), "config": to_dict(model.config)}
            for name, model in models.items()
        },
        "thresholds": {name: predictor.threshold(name) for name in models},
        "probabilities": save_probabilities,
    }


def _key(scan: Source) -> str:
    return f"{scan.path.name}/{scan.series}" if scan.series else scan.path.name


def _state(scan: Source) -> dict[str, int]:
    """Tells, without reading it, whether a file is the one of before; of a missing file, nothing."""
    try:
        status = scan.path.stat()
    except OSError:
        return {}
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _read_manifest(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The scans that are done by these settings; none where the manifest is absent or cannot be read."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        return dict(manifest["scans"]) if manifest["settings"] == settings else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _write_manifest(file: Path, settings: dict[str, Any], done: dict[str, Any]) -> None:
    manifest = {"settings": settings, "scans": done}
    write_text(file, json.dumps(manifest, indent=2) + "\n")  # ASCII: names of files need not be Unicode
