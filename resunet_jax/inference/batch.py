"""Many scans, one after another: continues after a bad one, and a second run does only what is missing."""

import contextlib
import glob
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from resunet_jax.config import to_dict
from resunet_jax.data.readers import READERS, Reader, Source, digest
from resunet_jax.errors import InputError
from resunet_jax.files import make_output_dir, write_text
from resunet_jax.inference.predictor import Predictor
from resunet_jax.inference.scan import iter_chunks, mask_paths, prefetch, write_masks
from resunet_jax.progress import logger
from resunet_jax.weights.store import fingerprint

MANIFEST = "masks.json"
"""File of the output folder that says which scans were segmented, and how."""

_KINDS = ("lung", "infection", "lung_probability", "infection_probability")


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
    assumed: tuple[float, float] | None = None,
) -> Iterator[ScanResult]:
    """Segments scans as `segment_scan` does; the next one is read while the models work on this one.

    Scans that `output_dir` already has masks of, from the same content by the same models, settings and version, are
    skipped. Several processes may write to one folder.

    Args:
      scans: from `find_sources`, of different names.
      output_dir: gets the masks, and masks.json: {"settings": ..., "scans": {name: {"digest", "bytes"}}}.
      predictor: the models.
      save_probabilities: see `segment_scan`.
      readers: the table of formats.
      assumed: see `open_scan`.

    Raises:
      InputError: the manifest of an earlier run cannot be replaced. What concerns one scan is in its `ScanResult`.
    """
    settings = _settings(predictor, save_probabilities, assumed)
    manifest = _Manifest(output_dir / MANIFEST, settings)
    masks = {scan: mask_paths(scan, output_dir, predictor, save_probabilities) for scan in scans}
    finished = {
        scan
        for scan in scans
        if all(path.is_file() for path in masks[scan]) and manifest.vouches_for(scan, _state(scan, readers))
    }
    for scan in scans:
        if scan in finished:
            yield ScanResult(scan, masks[scan], skipped=True)
    missing = [scan for scan in scans if scan not in finished]
    for scan in missing:
        _warn_of_others(scan, masks[scan])
    manifest.forget(missing)  # or it would vouch for masks that are being replaced
    chunks = iter_chunks(missing, predictor.preprocess, readers, assumed)
    with contextlib.closing(prefetch(chunks)) as fetched:
        for scan, own_chunks in itertools.groupby(fetched, key=lambda chunk: chunk.scan):
            try:
                state = _state(scan, readers)
                write_masks(scan, own_chunks, output_dir, predictor, save_probabilities=save_probabilities)
                manifest.record(scan, state)
                yield ScanResult(scan, masks[scan])
            except InputError as error:
                yield ScanResult(scan, [], error)


def _warn_of_others(scan: Source, masks: Sequence[Path]) -> None:
    """Names masks of the same scan name that stay beside the new ones, and are by other models or settings."""
    for path in sorted(masks[0].parent.glob(f"{glob.escape(scan.name)}_*.nii.gz")) if masks else ():
        kind = path.name[len(scan.name) + 1 :].removesuffix(".nii.gz")
        if kind in _KINDS and path not in masks:
            logger.warning(
                "%s: stays beside the new masks, and is of an earlier prediction; remove it if not needed", path
            )


def _settings(predictor: Predictor, save_probabilities: bool, assumed: tuple[float, float] | None) -> dict[str, Any]:
    """All that decides what the masks of a scan are."""
    models = {name: getattr(predictor, name) for name in predictor.structures}
    return {
        "models": {
            name: {"fingerprint": fingerprint(model.variables), "config": to_dict(model.config)}
            for name, model in models.items()
        },
        "thresholds": {name: predictor.threshold(name) for name in models},
        "probabilities": save_probabilities,
        "assumed": None if assumed is None else list(assumed),
    }


def _key(scan: Source) -> str:
    return f"{scan.path.name}/{scan.series}" if scan.series else scan.path.name


def _state(scan: Source, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """Tells whether a scan is the one of before, by its content; of one that cannot be read, nothing."""
    try:
        return {"digest": digest(scan, readers), "bytes": scan.path.stat().st_size}
    except (InputError, OSError):
        return {}


class _Manifest:
    """What masks.json says; other processes may write to it too."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file, self._settings = file, settings
        self._done = self._read()
        if file.is_file() and not self._done:
            logger.info("%s: of other models, settings or another version; masks are made again", file)

    def vouches_for(self, scan: Source, state: dict[str, Any]) -> bool:
        """Whether this state of a scan has been segmented by these settings."""
        return bool(state) and self._done.get(_key(scan)) == state

    def forget(self, scans: Sequence[Source]) -> None:
        """Takes scans out of an existing manifest."""
        if scans and self._file.is_file():
            self._update({_key(scan): None for scan in scans})

    def record(self, scan: Source, state: dict[str, Any]) -> None:
        """Says that a scan is done."""
        self._update({_key(scan): state})

    def _update(self, changes: Mapping[str, dict[str, Any] | None]) -> None:
        make_output_dir(self._file.parent)
        with FileLock(self._file.with_name(f".{self._file.name}.lock")):
            merged = {**self._read(), **changes}
            self._done = {name: state for name, state in merged.items() if state is not None}
            values = {"settings": self._settings, "scans": self._done}
            write_text(self._file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def _read(self) -> dict[str, Any]:
        """The scans that are done by these settings; none where the manifest is absent or cannot be read."""
        try:
            values = json.loads(self._file.read_text(encoding="utf-8", errors="surrogateescape"))
            return dict(values["scans"]) if values["settings"] == self._settings else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
