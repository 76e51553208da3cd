"""Lung and infection masks of a whole scan, on the scan's own grid."""

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import numpy.typing as npt

from resunet_jax.config import PredictConfig, PreprocessConfig
from resunet_jax.data.prepared import air_offset, prepare_volume
from resunet_jax.data.roi import Box, resize_paste
from resunet_jax.data.volumes import Array, FloatArray, Grid, nifti_writer, open_scan
from resunet_jax.errors import InputError
from resunet_jax.files import make_output_dir
from resunet_jax.inference.regions import large_regions
from resunet_jax.model.cascade import infection_input, predict_probability
from resunet_jax.model.conv import fastest_convolution
from resunet_jax.model.resunet import Variables
from resunet_jax.progress import logger, progress
from resunet_jax.training.checkpoints import LoadedModel, fingerprint, load_model_for, load_threshold

_SLICES_IN_MEMORY = 64  # of a scan at a time: a scan may have any number of them

_T = TypeVar("_T")

THRESHOLD = 0.5
"""A voxel whose probability is above it belongs to the mask, unless another threshold is asked for."""


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """The restored models, ready for slices; make it with `load_segmenter`.

    Attributes:
      lung: on CT, or None.
      infection: on CT or on [CT, lung probability], or None.
      batch_size: slices at a time.
      thresholds: by structure, in (0, 1); `THRESHOLD` where there is none.
    """

    lung: LoadedModel | None
    infection: LoadedModel | None
    batch_size: int = 8
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def structures(self) -> tuple[str, ...]:
        """What it segments: "lung", "infection" or both."""
        models = {"lung": self.lung, "infection": self.infection}
        return tuple(name for name, model in models.items() if model is not None)

    @property
    def preprocess(self) -> PreprocessConfig:
        """How slices have to be prepared."""
        return next(model.config.preprocess for model in (self.lung, self.infection) if model is not None)

    def threshold(self, structure: str) -> float:
        """A voxel belongs to the structure where its probability is above this."""
        return self.thresholds.get(structure, THRESHOLD)

    @property
    def smallest_region(self) -> float:
        """Regions of the lung mask smaller than this part of the largest are dropped; see `PredictConfig`."""
        return self.lung.config.predict.smallest_region if self.lung is not None else 0.0

    def probabilities(self, images: FloatArray) -> dict[str, FloatArray]:
        """Runs the models over prepared slices; after a lung model, the infection model only where it found lung.

        Args:
          images: float32 (slices, S, S) in [0, 1].

        Returns:
          for each structure, float32 (slices, S, S) in [0, 1]; it does not depend on the batch size. In slices without
          a lung mask the infection's probability is 0.
        """
        outputs: dict[str, FloatArray] = {}
        if self.lung is not None:
            outputs["lung"] = self._run("lung", images)
        if self.infection is not None and self.lung is None:
            outputs["infection"] = self._run("infection", images)
        elif self.infection is not None:
            with_lung = np.flatnonzero((outputs["lung"] > self.threshold("lung")).any(axis=(1, 2)))
            inputs = (images, outputs["lung"])[: self.infection.model.in_channels]
            outputs["infection"] = np.zeros(images.shape, np.float32)
            outputs["infection"][with_lung] = self._run("infection", *(channel[with_lung] for channel in inputs))
        return outputs

    def clean(self, probabilities: Mapping[str, FloatArray]) -> None:
        """Drops, in place, small regions of the lung mask; for the slices of a whole scan.

        Args:
          probabilities: as `probabilities` returns them; what is dropped becomes 0.
        """
        if not self.smallest_region:
            return
        lung = probabilities["lung"]
        mask = lung > self.threshold("lung")
        kept = large_regions(mask, self.smallest_region)
        lung[mask & ~kept] = 0
        if "infection" in probabilities:
            probabilities["infection"][~kept.any(axis=(1, 2))] = 0

    def _run(self, name: str, *channels: FloatArray) -> FloatArray:
        """One model over (slices, S, S) channels, by batches of one size, so that it is compiled once."""
        outputs = np.empty(channels[0].shape, np.float32)
        for start in range(0, len(outputs), self.batch_size):
            batch = np.stack([channel[start : start + self.batch_size] for channel in channels], axis=-1)
            padded = np.pad(batch, ((0, self.batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
            probability = self._jitted[name](getattr(self, name).variables, padded.astype(np.float32))
            outputs[start : start + len(batch)] = np.asarray(probability)[: len(batch), ..., 0]
        return outputs

    @functools.cached_property
    def _jitted(self) -> dict[str, Callable[[Variables, FloatArray], jax.Array]]:
        def jitted(loaded: LoadedModel) -> Callable[[Variables, FloatArray], jax.Array]:
            model = loaded.model.clone(convolution=fastest_convolution())

            def probability(variables: Variables, x: jax.Array) -> jax.Array:
                x = infection_input(model, x[..., :1], x[..., 1:])  # CT alone comes back as it is
                return predict_probability(model, variables, x, patch_factor=loaded.config.train.patch_factor)

            return jax.jit(probability)

        return {name: jitted(getattr(self, name)) for name in self.structures}


def load_segmenter(
    lung_checkpoint: str | Path | None,
    infection_checkpoint: str | Path | None,
    batch_size: int = 8,
    *,
    validated_threshold: bool = False,
    smallest_region: float | None = None,
) -> Segmenter:
    """Restores one or both models of the cascade.

    Args:
      lung_checkpoint: for `load_model`, or None to segment no lungs.
      infection_checkpoint: for `load_model`, or None to segment no infection.
      batch_size: slices at a time.
      validated_threshold: takes the thresholds that the trainings chose on their validation cases, instead of 0.5.
      smallest_region: in [0, 1], in place of what the lung model was trained with; see `PredictConfig`.

    Raises:
      InputError: neither is given, a folder holds no such model or threshold, the two do not belong together, or the
        smallest region makes no sense.
    """
    lung = load_model_for(lung_checkpoint, "lung", "--lung_checkpoint") if lung_checkpoint else None
    infection = (
        load_model_for(infection_checkpoint, "infection", "--infection_checkpoint") if infection_checkpoint else None
    )
    if lung is None and infection is None:
        raise InputError("no model: give --lung_checkpoint, --infection_checkpoint or both")
    if infection is not None and infection.config.task == "infection":
        if lung is None:
            raise InputError(
                f"{infection_checkpoint}: this model works on [CT, lung probability]; give --lung_checkpoint too"
            )
        if infection.config.lung_fingerprint not in ("", fingerprint(lung.variables)):
            logger.warning(
                "%s was trained on another lung model than %s: expect worse masks",
                infection_checkpoint,
                lung_checkpoint,
            )
    if lung and infection and lung.config.preprocess != infection.config.preprocess:
        raise InputError(
            f"{lung_checkpoint} and {infection_checkpoint} were trained on slices prepared differently "
            f"({lung.config.preprocess}, {infection.config.preprocess}); use models trained alike"
        )
    if smallest_region is not None:
        if lung is None:
            raise InputError(
                "smallest_region: regions are of the lung mask; give --lung_checkpoint too, or leave it out"
            )
        lung = lung._replace(config=dataclasses.replace(lung.config, predict=PredictConfig(smallest_region)))
    paths = {"lung": lung_checkpoint, "infection": infection_checkpoint}
    chosen = {name: load_threshold(path) for name, path in paths.items() if path} if validated_threshold else {}
    return Segmenter(lung, infection, batch_size, chosen)


def native_slices(
    probabilities: FloatArray, boxes: npt.NDArray[np.int32], shape: tuple[int, int]
) -> Iterator[FloatArray]:
    """Pastes each prepared slice back: float32 (H, W) in [0, 1], 0 outside its box.

    Args:
      probabilities: (slices, S, S).
      boxes: (slices, 4).
      shape: (H, W) of the scan's slices, in pixels.
    """
    for probability, box in zip(probabilities, boxes, strict=True):
        yield resize_paste(probability, Box(*map(int, box)), shape)


def segment_scan(scan: Path, output_dir: Path, segmenter: Segmenter, *, save_probabilities: bool = False) -> list[Path]:
    """Segments one scan and writes its masks: uint8, 0 or 1, with the scan's own shape, affine and codes.

    Slices are read and written a part at a time, the next while the models work; what the models find meanwhile lies in
    a temporary file.

    Args:
      scan: .nii or .nii.gz.
      output_dir: gets the files of `mask_paths`; made if need be.
      segmenter: the models.
      save_probabilities: also writes the probabilities, float32 in [0, 1].

    Returns:
      the files written.

    Raises:
      InputError: the scan is bad, or the folder cannot be written.
    """
    with contextlib.closing(read_ahead(prepared_parts([scan], segmenter.preprocess))) as parts:
        return write_masks(scan, parts, output_dir, segmenter, save_probabilities=save_probabilities)


def mask_paths(scan: Path, output_dir: Path, segmenter: Segmenter, save_probabilities: bool) -> list[Path]:
    """`<scan>_lung.nii.gz` and so on, and with probabilities `<scan>_lung_probability.nii.gz` and so on."""
    kinds = ("", "_probability") if save_probabilities else ("",)
    return [output_dir / f"{scan_name(scan)}_{name}{kind}.nii.gz" for name in segmenter.structures for kind in kinds]


@dataclasses.dataclass(frozen=True)
class PreparedPart:
    """Some slices of a scan, ready for the models.

    Attributes:
      scan: the file.
      grid: of the whole scan.
      start: number of the first slice.
      images: float32 (slices, S, S) in [0, 1].
      boxes: int32 (slices, 4), see `prepare_volume`.
    """

    scan: Path
    grid: Grid
    start: int
    images: FloatArray
    boxes: npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class BadScan:
    """A scan that cannot be segmented.

    Attributes:
      scan: the file.
      error: why.
    """

    scan: Path
    error: InputError


def prepared_parts(scans: Iterable[Path], preprocess: PreprocessConfig) -> Iterator[PreparedPart | BadScan]:
    """The slices of some scans, a part in memory at a time; a bad scan ends with a `BadScan`, and the next follows."""
    for path in scans:
        try:
            with open_scan(path) as scan:
                slices = scan.grid.oriented_shape[-1]
                offset = air_offset(scan, preprocess)
                for start in range(0, slices, _SLICES_IN_MEMORY):
                    part = scan.part(start, min(start + _SLICES_IN_MEMORY, slices))
                    yield PreparedPart(path, scan.grid, start, *prepare_volume(part, preprocess, offset))
        except InputError as error:
            yield BadScan(path, error)


def read_ahead(items: Iterator[_T]) -> Generator[_T]:
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
    scan: Path,
    parts: Iterable[PreparedPart | BadScan],
    output_dir: Path,
    segmenter: Segmenter,
    *,
    save_probabilities: bool = False,
) -> list[Path]:
    """Runs the models over the parts of one scan, in order, and writes its masks whole; see `segment_scan`."""
    with contextlib.ExitStack() as stack:
        found: dict[str, FloatArray] = {}
        boxes: list[npt.NDArray[np.int32]] = []
        advance: Callable[[str], None]
        for part in parts:
            if isinstance(part, BadScan):
                raise part.error
            if not found:
                make_output_dir(output_dir)
                grid, slices = part.grid, part.grid.oriented_shape[-1]
                shape = (slices, *part.images.shape[1:])
                found = {name: stack.enter_context(_disk_array(shape)) for name in segmenter.structures}
                advance = stack.enter_context(progress(scan.name, 2 * -(-slices // _SLICES_IN_MEMORY)))
            for name, probabilities in segmenter.probabilities(part.images).items():
                found[name][part.start : part.start + len(probabilities)] = probabilities
            boxes.append(part.boxes)
            advance("")
        segmenter.clean(found)
        paths = mask_paths(scan, output_dir, segmenter, save_probabilities)
        kinds = [np.float32 if path.name.endswith("_probability.nii.gz") else np.uint8 for path in paths]
        writers = [stack.enter_context(nifti_writer(p, kind, grid)) for p, kind in zip(paths, kinds, strict=True)]
        all_boxes = np.concatenate(boxes)
        for start in range(0, slices, _SLICES_IN_MEMORY):
            arrays: list[Array] = []
            some = slice(start, start + _SLICES_IN_MEMORY)
            for name, probabilities in found.items():
                pasted = native_slices(probabilities[some], all_boxes[some], grid.oriented_shape[:2])
                native = np.stack(list(pasted), axis=-1)
                arrays += [(native > segmenter.threshold(name)).astype(np.uint8), *([native] * save_probabilities)]
            for write, array in zip(writers, arrays, strict=True):
                write(start, array)
            advance("")
    return paths


@contextlib.contextmanager
def _disk_array(shape: tuple[int, ...]) -> Iterator[FloatArray]:
    """Zeros, float32, in a temporary file that is gone afterwards."""
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 4 * int(np.prod(shape)))  # a full disk is told here, not by a signal
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()}: no room for {shape} numbers ({error}); free the disk"
            ) from error
        yield np.memmap(file, np.float32, "r+", shape=shape)


def scan_name(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")
