"""Lung and infection masks of a whole scan, on the scan's own grid."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
import numpy.typing as npt

from resunet_jax.config import PreprocessConfig
from resunet_jax.data.prepared import prepare_volume
from resunet_jax.data.roi import Box, resize_paste
from resunet_jax.data.volumes import FloatArray, nifti_writer, open_scan
from resunet_jax.errors import InputError
from resunet_jax.files import make_output_dir
from resunet_jax.model.cascade import predict_probability
from resunet_jax.model.conv import fastest_convolution
from resunet_jax.model.resunet import Variables
from resunet_jax.progress import logger, progress
from resunet_jax.training.checkpoints import LoadedModel, fingerprint, load_model_for, load_threshold

_SLICES_IN_MEMORY = 64  # of a scan at a time: a scan may have any number of them

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
            return jax.jit(partial(predict_probability, model, patch_factor=loaded.config.train.patch_factor))

        return {name: jitted(getattr(self, name)) for name in self.structures}


def load_segmenter(
    lung_checkpoint: str | Path | None,
    infection_checkpoint: str | Path | None,
    batch_size: int = 8,
    *,
    validated_threshold: bool = False,
) -> Segmenter:
    """Restores one or both models of the cascade.

    Args:
      lung_checkpoint: for `load_model`, or None to segment no lungs.
      infection_checkpoint: for `load_model`, or None to segment no infection.
      batch_size: slices at a time.
      validated_threshold: takes the thresholds that the trainings chose on their validation cases, instead of 0.5.

    Raises:
      InputError: neither is given, a folder holds no such model or threshold, or the two do not belong together.
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

    The memory it takes does not grow with the number of slices.

    Args:
      scan: .nii or .nii.gz.
      output_dir: gets `<scan>_lung.nii.gz` and `<scan>_infection.nii.gz`; made if need be.
      segmenter: the models.
      save_probabilities: also writes `<scan>_lung_probability.nii.gz` and so on, float32 in [0, 1].

    Returns:
      the files written.

    Raises:
      InputError: the scan is bad, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_scan(scan))
        make_output_dir(output_dir)
        kinds: dict[str, npt.DTypeLike] = {"": np.uint8, **({"_probability": np.float32} if save_probabilities else {})}
        paths = {
            (name, kind): output_dir / f"{scan_name(scan)}_{name}{kind}.nii.gz"
            for name in segmenter.structures
            for kind in kinds
        }
        write = {
            key: stack.enter_context(nifti_writer(path, kinds[key[1]], source.grid)) for key, path in paths.items()
        }
        rows, columns, slices = source.grid.oriented_shape
        starts = range(0, slices, _SLICES_IN_MEMORY)
        with progress(scan.name, len(starts)) as advance:
            for start in starts:
                images, boxes = prepare_volume(
                    source.part(start, min(start + _SLICES_IN_MEMORY, slices)), segmenter.preprocess
                )
                for name, probabilities in segmenter.probabilities(images).items():
                    native = np.stack(list(native_slices(probabilities, boxes, (rows, columns))), axis=-1)
                    write[name, ""](start, (native > segmenter.threshold(name)).astype(np.uint8))
                    if save_probabilities:
                        write[name, "_probability"](start, native)
                advance("")
    return list(paths.values())


def scan_name(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


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
