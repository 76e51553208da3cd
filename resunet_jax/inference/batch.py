"""Many scans, one after another: continues after a bad one, and a second run does only what is missing."""

import contextlib
import dataclasses
import functools
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from resunet_jax.config import to_dict
from resunet_jax.data.readers import READERS, Reader, Source, digest, open_scan
from resunet_jax.data.volume import Grid, Scan
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import expand_user, make_output_dir, sha256, write_json
from resunet_jax.inference.predictor import Predictor
from resunet_jax.inference.scan import SegmentedScan, mask_paths, prefetch, segment_opened
from resunet_jax.progress import logger

MANIFEST = "masks.json"
"""File of the output folder that says which scans were segmented, and how."""

_WAIT_S = 1.0  # for another process, between two looks at whether this one has been stopped
_KINDS = (
    *(f"{kind}.nii.gz" for kind in ("lung", "infection", "lung_probability", "infection_probability", "uncertainty")),
    *("report.json", "report.html", "preview.png", "labels.nii.gz", "seg.dcm"),
)
_MAX_NAME_BYTES = 255  # of a file, on the usual systems
LOCKS = ".locks"
"""Folder of the output folder, for the locks of the processes that share it."""


class Summary(NamedTuple):
    """What an output has to say of a scan.

    Attributes:
      text: one line, or "".
      warnings: what makes the masks doubtful; kept in masks.json.
    """

    text: str = ""
    warnings: tuple[str, ...] = ()


class Output(NamedTuple):
    """Something that is written for each scan in addition to its masks.

    Attributes:
      suffixes: of its files, which are named `<scan><suffix>`.
      write: (source, segmented scan, seconds that it took, output folder), writes the files atomically, or some of
        them where a scan has nothing to write.
      settings: on which the files depend, for masks.json.
      check: (source, grid of the scan), raises `InputError` where it cannot be written; before anything is replaced.
      tables: names of files about all scans of the folder, which the caller of `segment_scans` writes in the end.
    """

    suffixes: tuple[str, ...]
    write: Callable[[Source, SegmentedScan, float, Path], Summary]
    settings: Any = None
    check: Callable[[Source, Grid], object] = lambda source, grid: None
    tables: tuple[str, ...] = ()


class ScanResult(NamedTuple):
    """What has become of a scan.

    Attributes:
      scan: the source.
      masks: the files of masks, written now or before; empty where it cannot be segmented.
      others: the files of further outputs, likewise.
      error: why it cannot be segmented, or None.
      skipped: an earlier run has written the masks, by the same models and settings.
      summary: what the further outputs say of it, in a line.
    """

    scan: Source
    masks: list[Path]
    others: list[Path] = []  # noqa: RUF012
    error: InputError | None = None
    skipped: bool = False
    summary: str = ""


def segment_scans(
    scans: Sequence[Source],
    output_dir: str | Path,
    predictor: Predictor,
    *,
    save_probabilities: bool = False,
    uncertainty: bool = False,
    readers: Mapping[str, Reader] = READERS,
    assumed: tuple[float, float] | None = None,
    outputs: Mapping[str, Output] | None = None,
) -> Iterator[ScanResult]:
    """Segments scans as `segment_scan` does; the next one is opened while the models work on this one.

    Scans that `output_dir` already has masks of, from the same content by the same models, settings and version, are
    skipped. Several processes may work on one folder: each takes the scans that no other is at.

    Args:
      scans: from `find_sources`, of different names.
      output_dir: gets the masks, and masks.json: {"settings": ..., "scans": {file name: {"name", "digest", "bytes",
        "masks", "absent", "warnings"}}, "earlier": ...}, of a DICOM series by path, UID and name; "masks" are the
        digests of their files, "absent" files for which there was nothing to write, "earlier" scans whose masks in it
        are of other settings, or were being replaced. A scan in a file of another name, but of the name of masks in it,
        is refused; so is, without masks.json, one whose files are there.
      predictor: the models.
      save_probabilities: see `segment_scan`.
      uncertainty: see `segment_scan`.
      readers: the table of formats.
      assumed: see `open_scan`.
      outputs: what else is written, by name.

    Raises:
      InputError: masks.json cannot be read or written, or is absent where a table of the folder would be replaced. What
        concerns one scan is in its `ScanResult`.
    """
    outputs, output_dir = outputs or {}, expand_user(output_dir)
    tables = [output_dir / name for output in outputs.values() for name in output.tables]
    existing = [file for file in tables if file.exists()]
    batch = _Batch(output_dir, predictor, save_probabilities, uncertainty, readers, assumed, outputs)
    if existing and not batch.manifest.exists:
        raise _not_predicted(existing[0])
    with contextlib.ExitStack() as stack:
        claimed = stack.enter_context(contextlib.closing(prefetch(batch.claim(scans), dispose=_release)))
        stack.callback(batch.stopped.set)  # or the thread that waits for another process would outlive this one
        for item in claimed:
            if isinstance(item, ScanResult):
                yield item
            else:
                with item.stack:
                    result = batch.segment(item)
                yield result


@dataclasses.dataclass(frozen=True)
class _Claimed:
    """An open scan that this process segments; closing the stack closes it and lets others take it."""

    source: Source
    scan: Scan
    state: dict[str, Any]
    stack: contextlib.ExitStack


def _release(item: "_Claimed | ScanResult") -> None:
    if isinstance(item, _Claimed):
        item.stack.close()


@dataclasses.dataclass(frozen=True)
class _Batch:
    """The arguments of `segment_scans`."""

    output_dir: Path
    predictor: Predictor
    save_probabilities: bool
    uncertainty: bool
    readers: Mapping[str, Reader]
    assumed: tuple[float, float] | None
    outputs: Mapping[str, Output]
    stopped: threading.Event = dataclasses.field(default_factory=threading.Event)

    @functools.cached_property
    def manifest(self) -> "_Manifest":
        """Of the output folder; its settings are all that decides what the files of a scan are."""
        predictor = self.predictor
        record = None if predictor.record is None else json.loads(predictor.record.to_json())
        settings = {
            "models": {
                name: {"fingerprint": predictor.fingerprints[name], "config": to_dict(model.config)}
                for name, model in predictor.models.items()
            },
            "thresholds": predictor.mask_thresholds,
            "probabilities": self.save_probabilities,
            "assumed": None if self.assumed is None else list(self.assumed),
            "outputs": {name: output.settings for name, output in self.outputs.items()},
            **({"uncertainty": True} if self.uncertainty else {}),
            **({"record": record} if record is not None else {}),
        }
        return _Manifest(self.output_dir / MANIFEST, settings)

    def claim(self, scans: Sequence[Source]) -> Iterator[_Claimed | ScanResult]:
        """Opens the scans that nobody else is at, then waits for the others, in case their process was killed."""
        refused = self._too_long(scans)
        refused |= self._unlisted([scan for scan in scans if scan.name not in refused])
        busy = []
        for scan in scans:
            if scan.name in refused:
                yield ScanResult(scan, [], error=refused[scan.name])
                continue
            try:
                yield self._claim(scan, timeout=0)
            except Timeout:
                busy.append(scan)
        for scan in busy:
            if (claimed := self._wait_for(scan)) is not None:
                yield claimed

    @staticmethod
    def _too_long(scans: Sequence[Source]) -> dict[str, InputError]:
        """Why scans are refused, by name: those of their files would be too long."""
        most = _MAX_NAME_BYTES - max(len(f"_{kind}") for kind in _KINDS)
        return {
            scan.name: InputError(f"{scan.path}: too long a name for those of its masks to begin with; shorten it")
            for scan in scans
            if len(os.fsencode(scan.name)) > most
        }

    def _unlisted(self, scans: Sequence[Source]) -> dict[str, InputError]:
        """Why scans are refused, by name: their files are in a folder into which nothing was segmented yet."""
        files = {scan.name: [*self._masks(scan), *self._others(scan)] for scan in scans}
        existing = {name: next((file for file in some if file.exists()), None) for name, some in files.items()}
        if self.manifest.exists:  # looked at last: another process makes it before any of these files
            return {}
        return {name: _not_predicted(file) for name, file in existing.items() if file is not None}

    def _wait_for(self, scan: Source) -> "_Claimed | ScanResult | None":
        """As `_claim`, however long it takes; None once the batch has stopped."""
        while not self.stopped.is_set():
            with contextlib.suppress(Timeout):
                return self._claim(scan, timeout=_WAIT_S)
        return None

    def _claim(self, scan: Source, timeout: float) -> _Claimed | ScanResult:
        file = self.output_dir / LOCKS / f"{scan.name}.lock"
        lock = FileLock(file, thread_local=False)
        try:
            make_output_dir(file.parent)
            lock.acquire(timeout=timeout)
        except Timeout:
            raise
        except OSError as error:
            return ScanResult(scan, [], error=InputError(f"{file}: {first_line(error)}; choose another `output_dir`"))
        try:
            with _transient_errors(scan):
                return self._open(scan, lock)
        except _TransientError as error:
            return ScanResult(scan, [], error=error)

    def segment(self, claimed: _Claimed) -> ScanResult:
        """Segments an open scan and writes everything that is asked for."""
        source, begun = claimed.source, time.perf_counter()
        masks = self._masks(source)
        try:
            _remove(self._others(source))  # or they would lie next to masks that they are not of
            with _transient_errors(source):
                segmented = segment_opened(
                    claimed.scan, self.predictor, source.name, masks, uncertainty=self.uncertainty
                )
                summaries = [
                    output.write(source, segmented, time.perf_counter() - begun, self.output_dir)
                    for output in self.outputs.values()
                ]
            found = [*claimed.scan.warnings, *(warning for summary in summaries for warning in summary.warnings)]
            warnings = list(dict.fromkeys(found))
            others = self._others(source)
            absent = [file.name for file in others if not file.is_file()]
            entry = {**claimed.state, "masks": _digests(masks), "absent": absent, "warnings": warnings}
            self.manifest.record(source, entry)
        except InputError as error:
            return ScanResult(source, [], error=error)
        for warning in warnings:
            logger.warning("%s: %s", source.name, warning)
        text = ", ".join(summary.text for summary in summaries if summary.text)
        return ScanResult(source, masks, [file for file in others if file.name not in absent], summary=text)

    def _masks(self, scan: Source) -> list[Path]:
        return mask_paths(scan, self.output_dir, self.predictor, self.save_probabilities, self.uncertainty)

    def _others(self, scan: Source) -> list[Path]:
        return [self.output_dir / f"{scan.name}{x}" for output in self.outputs.values() for x in output.suffixes]

    def _open(self, scan: Source, lock: FileLock) -> _Claimed | ScanResult:
        stack = contextlib.ExitStack()
        stack.callback(lock.release)
        with contextlib.ExitStack() as on_failure:
            on_failure.push(stack)
            state, masks = _state(scan, self.readers), self._masks(scan)
            others, done = self._others(scan), self.manifest.done(scan, state, masks)
            if done is not None:
                written = [file for file in others if file.name not in done.get("absent", ())]
                if all(file.is_file() for file in written):
                    return ScanResult(scan, masks, written, skipped=True)
            if (refused := self._refusal(scan, state, masks)) is not None:
                return ScanResult(scan, [], error=refused)
            physical = self.predictor.preprocess.is_physical
            try:
                opened = stack.enter_context(open_scan(scan, self.readers, assumed=self.assumed, physical=physical))
            except InputError as error:
                if self.manifest.exists:
                    self.manifest.record(scan, None)
                for file in (file for file in others if file.is_file()):
                    with contextlib.suppress(InputError):
                        _remove([file])  # or the table would have the numbers of what the scan was before
                        logger.warning("%s: removed, of an earlier prediction; its scan can no longer be read", file)
                return ScanResult(scan, [], error=error)
            try:
                for output in self.outputs.values():
                    output.check(scan, opened.grid)
            except InputError as error:
                return ScanResult(scan, [], error=error)
            _warn_of_others(scan, [*masks, *others])
            self.manifest.record(scan, None)  # or it would list masks that are being replaced
            on_failure.pop_all()
            return _Claimed(scan, opened, state, stack)

    def _refusal(self, scan: Source, state: dict[str, Any], masks: Sequence[Path]) -> InputError | None:
        """Why the masks under a scan's name may not be replaced; a warning where they are of what it was before."""
        other = self.manifest.other_of_same_name(scan, state)
        if other is None or not any(file.exists() for file in masks):
            return None
        text = f"{masks[0]}: is of another scan, {other}, than {scan.path}"
        if other != _key(scan):
            return InputError(f"{text}; choose another `output_dir`")
        logger.warning("%s, or of what that was before; it is replaced: `output_dir` may be another folder", text)
        return None


def _not_predicted(file: Path) -> InputError:
    return InputError(
        f"{file}: would be replaced, though no {MANIFEST} there says that it was predicted; remove it, or choose "
        "another `output_dir`"
    )


class _TransientError(InputError):
    """Says nothing of the scan itself, so what was written for it stays."""


@contextlib.contextmanager
def _transient_errors(scan: Source) -> Iterator[None]:
    """Makes a `_TransientError` of a lack of memory or a failing disk, so that other scans are segmented."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # JAX's lack of memory
            raise
        traceback.clear_frames(error.__traceback__)  # they hold arrays of the scan
        if isinstance(error, OSError):
            text = f"{first_line(error)}; check the disks of the scan, of TMPDIR and of `output_dir`"
        else:
            text = "does not fit into memory; close other programs, or give it alone"
        raise _TransientError(f"{scan.path}: {text}") from error


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{file}: cannot be replaced ({first_line(error)}); close what uses it") from error


def _warn_of_others(scan: Source, replaced: Sequence[Path]) -> None:
    """Names files of the same scan name that stay next to the new masks, and are by other models or settings."""
    for kind in _KINDS:
        path = replaced[0].with_name(f"{scan.name}_{kind}")
        if path not in replaced and path.is_file():
            logger.warning("%s: stays next to the new masks, of an earlier prediction; remove it if not needed", path)


def _key(scan: Source) -> str:
    return f"{scan.path.name}/{scan.series}/{scan.name}" if scan.members else scan.path.name


def _digests(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by name, of the files that can be read."""
    digests = {}
    for path in files:
        with contextlib.suppress(OSError):
            digests[path.name] = sha256(path)
    return digests


def _state(scan: Source, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """Tells whether a scan is the one of before, by its content; of one that cannot be read, nothing."""
    try:
        size = {} if scan.path.is_dir() else {"bytes": scan.path.stat().st_size}
        return {"digest": digest(scan, readers), **size}
    except (InputError, OSError):
        return {}


class _Manifest:
    """What masks.json says; other processes may write to it too."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file, self._settings = file, settings
        if file.is_file() and self._read()[0] != settings:
            logger.info("%s: of other models, settings or another version; masks are made again", file)

    @property
    def exists(self) -> bool:
        """Whether scans were segmented into its folder."""
        return self._file.is_file()

    def done(self, scan: Source, state: dict[str, Any], masks: Sequence[Path]) -> dict[str, Any] | None:
        """The entry of a scan in this state, where these are the masks that these settings have made of it."""
        settings, scans, _ = self._read()
        entry = scans.get(_key(scan), {}) if settings == self._settings else {}
        is_of_state = bool(state) and {name: entry.get(name) for name in state} == state
        return entry if is_of_state and entry.get("masks") == _digests(masks) else None

    def other_of_same_name(self, scan: Source, state: dict[str, Any]) -> str | None:
        """What the files with the names of this scan's are of, where the manifest names another content."""
        _, scans, earlier = self._read()
        entries = ((key, entry) for key, entry in {**earlier, **scans}.items() if _is_of(entry, scan))
        return next((key for key, entry in entries if entry.get("digest") != state.get("digest")), None)

    def record(self, scan: Source, entry: Mapping[str, Any] | None) -> None:
        """Says that a scan is done; None vouches no longer for its masks, which are about to be replaced."""
        make_output_dir(self._file.parent / LOCKS)
        with FileLock(self._file.parent / LOCKS / f".{MANIFEST}.lock"):
            settings, scans, earlier = self._read()
            if settings != self._settings:
                scans, earlier = {}, {**earlier, **scans}
            replaced = {
                key: state for key, state in {**earlier, **scans}.items() if key == _key(scan) or _is_of(state, scan)
            }
            scans = {key: state for key, state in scans.items() if key not in replaced}
            earlier = {key: state for key, state in earlier.items() if key not in replaced}
            if entry is None:
                earlier |= replaced
            else:
                scans[_key(scan)] = {"name": scan.name, **entry}
            write_json(self._file, {"settings": self._settings, "scans": scans, "earlier": earlier})

    def _read(self) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Settings, scans and earlier ones; none where the manifest is absent."""
        try:
            values = json.loads(self._file.read_text(encoding="utf-8", errors="surrogateescape"))
            scans, earlier = values["scans"], values.get("earlier", {})
            if not all(isinstance(entry, dict) for entry in (*scans.values(), *earlier.values())):
                raise ValueError("an entry is no object")
            return values["settings"], scans, earlier
        except FileNotFoundError:
            return None, {}, {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{self._file}: cannot be read ({first_line(error)}), so nothing tells what the masks there are of; "
                "restore it, or choose another `output_dir`"
            ) from error


def _is_of(state: Mapping[str, Any], scan: Source) -> bool:
    """Whether files of these names are a scan's, on any disk; before 0.18.0 no name was kept."""
    return str(state.get("name", "")).casefold() == scan.name.casefold()
