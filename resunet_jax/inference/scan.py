"""One scan: from its file to masks on its own grid, a chunk of slices in memory at a time."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.preprocess import air_offset, prepare_volume
from resunet_jax.data.readers import READERS, Reader, Source, find_sources, open_scan
from resunet_jax.data.readers.nifti import nifti_writer
from resunet_jax.data.volume import Array, FloatArray, Grid
from resunet_jax.errors import InputError
from resunet_jax.files import make_output_dir, reserve
from resunet_jax.inference.predictor import Predictor
from resunet_jax.progress import progress

_CHUNK_SLICES = 64  # of a scan at a time: a scan may have any number of them

_T = TypeVar("_T")


def segment_scan(
    scan: str | Path,
    output_dir: str | Path,
    predictor: Predictor,
    *,
    save_probabilities: bool = False,
    readers: Mapping[str, Reader] = READERS,
    assumed: tuple[float, float] | None = None,
) -> list[Path]:
    """Segments one scan and writes its masks: uint8, 0 or 1, with the scan's own shape, affine and codes.

    Slices are read and written a chunk at a time, the next while the models work; the probabilities meanwhile lie in a
    temporary file.

    Args:
      scan: a path that holds one scan.
      output_dir: gets the files of `mask_paths`; created where it is missing.
      predictor: the models.
      save_probabilities: also writes the probabilities, float32 in [0, 1].
      readers: the table of formats.
      assumed: see `open_scan`.

    Returns:
      the files written.

    Raises:
      InputError: the scan is bad, or the folder cannot be written.
    """
    source = find_sources(Path(scan), readers)[0]
    with contextlib.closing(prefetch(iter_chunks([source], predictor.preprocess, readers, assumed))) as chunks:
        return write_masks(source, chunks, Path(output_dir), predictor, save_probabilities=save_probabilities)


def mask_paths(scan: Source, output_dir: Path, predictor: Predictor, save_probabilities: bool) -> list[Path]:
    """`<scan>_lung.nii.gz` and so on, and with probabilities `<scan>_lung_probability.nii.gz` and so on."""
    kinds = ("", "_probability") if save_probabilities else ("",)
    return [output_dir / f"{scan.name}_{name}{kind}.nii.gz" for name in predictor.structures for kind in kinds]


@dataclasses.dataclass(frozen=True)
class ScanChunk:
    """Some slices of a scan, ready for the models.

    Attributes:
      scan: the source.
      grid: of the whole scan.
      start: number of the first slice.
      images: float32 (slices, S, S) in [0, 1].
      boxes: int32 (slices, 4), see `prepare_volume`.
    """

    scan: Source
    grid: Grid
    start: int
    images: FloatArray
    boxes: npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class FailedScan:
    """A scan that cannot be segmented.

    Attributes:
      scan: the source.
      error: why.
    """

    scan: Source
    error: InputError


def iter_chunks(
    scans: Iterable[Source],
    preprocess: PreprocessConfig,
    readers: Mapping[str, Reader] = READERS,
    assumed: tuple[float, float] | None = None,
) -> Iterator[ScanChunk | FailedScan]:
    """The slices of some scans, a chunk in memory at a time; a bad scan ends with a `FailedScan`."""
    for source in scans:
        try:
            with open_scan(source, readers, assumed=assumed, physical=preprocess.is_physical) as scan:
                slices = scan.grid.oriented_shape[-1]
                offset = air_offset(scan, preprocess)
                for start in range(0, slices, _CHUNK_SLICES):
                    volume = scan.read_slices(start, min(start + _CHUNK_SLICES, slices))
                    yield ScanChunk(source, scan.grid, start, *prepare_volume(volume, preprocess, offset))
        except InputError as error:
            yield FailedScan(source, error)


def prefetch(items: Iterator[_T]) -> Generator[_T]:
    """The same items; each is made, in another thread, while the one before is used. Close it when done."""
    executor = ThreadPoolExecutor(1)
    try:
        coming = executor.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = executor.submit(next, items, None)
            yield item
    finally:
        executor.shutdown(wait=False, cancel_futures=True)  # waiting would block the garbage collector


def write_masks(
    scan: Source,
    chunks: Iterable[ScanChunk | FailedScan],
    output_dir: Path,
    predictor: Predictor,
    *,
    save_probabilities: bool = False,
) -> list[Path]:
    """Runs the models over the chunks of one scan, in order, and writes its masks atomically; see `segment_scan`."""
    with contextlib.ExitStack() as stack:
        found: dict[str, FloatArray] = {}
        boxes: list[npt.NDArray[np.int32]] = []
        advance: Callable[[str], None]
        for chunk in chunks:
            if isinstance(chunk, FailedScan):
                raise chunk.error
            if not found:
                make_output_dir(output_dir)
                grid, slices = chunk.grid, chunk.grid.oriented_shape[-1]
                shape = (slices, *chunk.images.shape[1:])
                found = {name: stack.enter_context(_temp_memmap(shape)) for name in predictor.structures}
                advance = stack.enter_context(progress(scan.path.name, 2 * -(-slices // _CHUNK_SLICES)))
            for name, probabilities in predictor.slice_probabilities(chunk.images).items():
                found[name][chunk.start : chunk.start + len(probabilities)] = probabilities
            boxes.append(chunk.boxes)
            advance("")
        predictor.postprocess(found)
        paths = mask_paths(scan, output_dir, predictor, save_probabilities)
        kinds = [np.float32 if path.name.endswith("_probability.nii.gz") else np.uint8 for path in paths]
        writers = [stack.enter_context(nifti_writer(p, kind, grid)) for p, kind in zip(paths, kinds, strict=True)]
        all_boxes = np.concatenate(boxes)
        for start in range(0, slices, _CHUNK_SLICES):
            some = slice(start, start + _CHUNK_SLICES)
            probabilities_of = {name: array[some] for name, array in found.items()}
            arrays: list[Array] = []
            for native in predictor.to_native_grid(probabilities_of, all_boxes[some], grid.oriented_shape[:2]).values():
                arrays += [native.mask.astype(np.uint8), *([native.probability] * save_probabilities)]
            for write, array in zip(writers, arrays, strict=True):
                write(start, array)
            advance("")
    return paths


@contextlib.contextmanager
def _temp_memmap(shape: tuple[int, ...]) -> Iterator[FloatArray]:
    """Zeros, float32, in a temporary file that is gone afterwards."""
    with tempfile.TemporaryFile() as file:
        try:
            reserve(file, 4 * int(np.prod(shape)))  # a full disk is reported here, not by a signal
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()}: no room for {shape} numbers ({error}); free the disk, or set TMPDIR"
            ) from error
        yield np.memmap(file, np.float32, "r+", shape=shape)
