"""From prepared slices to masks on the scan's own grid, in the one way that this package has.

Two stages: `Predictor.slice_probabilities` runs the models over any slices; `Predictor.postprocess` works on the
probabilities of a whole scan. `Predictor.to_native_grid` then gives probabilities and masks on the grid of the scan.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from resunet_jax.config import GateName, PostprocessConfig, PreprocessConfig, Structure, override
from resunet_jax.data.roi import Box, resize_paste
from resunet_jax.data.slice_cache import PreparedCase
from resunet_jax.data.volume import Array, FloatArray, Grid
from resunet_jax.errors import InputError
from resunet_jax.inference.postprocess import (
    add_lesions,
    gate_infection,
    remove_low_confidence_lesions,
    remove_small_components,
)
from resunet_jax.metrics.calibration import apply_temperature
from resunet_jax.metrics.overlap import COUNTS, confusion_counts, hard_metrics
from resunet_jax.model.build import ARCHITECTURES, Architecture, adds_lesions, averaging_of, infection_postprocess
from resunet_jax.model.cascade import arithmetic_mean, geometric_mean, infection_input, lung_input, predict_views
from resunet_jax.model.resunet import Variables
from resunet_jax.model.winograd import default_convolution
from resunet_jax.progress import logger, progress
from resunet_jax.weights.pretrained import load_pair, load_pair_record
from resunet_jax.weights.store import LoadedModel, fingerprint, load_model_for, load_threshold
from resunet_jax.weights.uncertainty import UNCERTAINTY_FILE, UncertaintyRecord, load_record

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""Those that `choose_threshold` chooses from."""

GEOMETRIC_MEAN = "infection_geometric_mean"
"""Of the views' probabilities of infection: among the probabilities of slices where the masks need it, until
`Predictor.postprocess` has used it."""

_BATCHES_ON_CPU = 2  # side by side: one alone leaves a third of two cores idle
_SLICES_ON_CPU = 4  # at most in a batch: slices go through one by one, and a last batch holds less padding
_CHUNK_SLICES = 64  # pasted at a time: a scan may have any number of slices


class NativeSlices(NamedTuple):
    """Some slices of a structure on the scan's own grid.

    Attributes:
      probability: float32 (rows, columns, slices) in [0, 1], 0 outside the body's boxes.
      mask: bool, the same shape.
    """

    probability: FloatArray
    mask: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The restored models, ready for slices; make it with `load_predictor`.

    Attributes:
      lung: on CT, or None.
      infection: on CT or on [CT, lung probability], or None.
      batch_size: slices at a time, at most; on CPUs no more than four.
      thresholds: by structure, in (0, 1), instead of the models' own, see `PostprocessConfig`.
      record: of these models' errors, or None; it changes what is reported of the infection, never a mask.
    """

    lung: LoadedModel | None
    infection: LoadedModel | None
    batch_size: int = 8
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    record: UncertaintyRecord | None = None

    @functools.cached_property
    def models(self) -> dict[str, LoadedModel]:
        """By structure, those that there are."""
        both = {"lung": self.lung, "infection": self.infection}
        return {name: model for name, model in both.items() if model is not None}

    @property
    def structures(self) -> tuple[str, ...]:
        """What it segments: "lung", "infection" or both."""
        return tuple(self.models)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """By structure, of the model's variables."""
        return {name: fingerprint(model.variables) for name, model in self.models.items()}

    @property
    def mask_thresholds(self) -> dict[str, float]:
        """By structure, see `threshold`."""
        return {name: self.threshold(name) for name in self.models}

    @property
    def preprocess(self) -> PreprocessConfig:
        """How slices have to be prepared; the lung model sees their first channels."""
        return next(model.config.preprocess for model in (self.infection, self.lung) if model is not None)

    def threshold(self, structure: str) -> float:
        """A voxel belongs to the structure where its probability is above this."""
        model: LoadedModel | None = getattr(self, structure)
        own = PostprocessConfig().threshold if model is None else model.config.postprocess.threshold
        return self.thresholds.get(structure, own)

    @property
    def min_component_fraction(self) -> float:
        """Components of the lung mask smaller than this fraction of the largest are removed."""
        return self.lung.config.postprocess.min_component_fraction if self.lung is not None else 0.0

    @property
    def gate(self) -> GateName:
        """Where infection may lie, see `PostprocessConfig`; "none" without both models."""
        if self.lung is None or self.infection is None:
            return "none"
        return self.infection.config.postprocess.gate

    @property
    def infection_postprocess(self) -> dict[str, Any]:
        """How the infection's mask is made of its probabilities, see `PostprocessConfig`; {} without a model of it."""
        if self.infection is None:
            return {}
        return {**infection_postprocess(self.infection.config), "gate": self.gate}

    @functools.cached_property
    def without_averaging(self) -> "Predictor":
        """The same with models that see a slice once, see `Averaging`; kept, because its programs are."""

        def plain(loaded: LoadedModel | None) -> LoadedModel | None:
            if loaded is None or not any(averaging_of(loaded.config)):
                return loaded
            model = dataclasses.replace(loaded.config.model, mirroring=False, context_averaging=False)
            return loaded._replace(config=dataclasses.replace(loaded.config, model=model))

        lung, infection = plain(self.lung), plain(self.infection)
        is_plain = lung is self.lung and infection is self.infection
        return self if is_plain else dataclasses.replace(self, lung=lung, infection=infection)

    @property
    def mask_settings(self) -> dict[str, Any]:
        """What besides the models decides the masks, in JSON values."""
        return {
            "thresholds": self.mask_thresholds,
            "min_component_fraction": self.min_component_fraction,
            "infection_postprocess": self.infection_postprocess,
        }

    @property
    def interval_record(self) -> UncertaintyRecord | None:
        """What intervals are made from: the record, where its residuals are of masks made as these are."""
        return self.record if self.record is not None and self.record.settings == self.mask_settings else None

    def reported_probability(self, structure: str, native: NativeSlices) -> FloatArray:
        """The probability to report: that of the infection calibrated by the record's temperature.

        Args:
          structure: whose.
          native: as `to_native_grid` returns it.

        Returns:
          float32, the same shape; above `reported_threshold` in the mask, and nowhere else.
        """
        temperature = self._temperature(structure)
        if temperature == 1:
            return native.probability
        limit = np.float32(self.reported_threshold(structure))
        slices = [apply_temperature(native.probability[..., k], temperature) for k in range(native.mask.shape[-1])]
        scaled: FloatArray = np.moveaxis(np.stack(slices), 0, -1)
        # Rounding must not put two probabilities to either side of the threshold onto it.
        return np.where(native.mask, np.maximum(scaled, np.nextafter(limit, np.float32(1))), np.minimum(scaled, limit))

    def reported_threshold(self, structure: str) -> float:
        """The threshold of the masks, as `reported_probability` has it."""
        threshold, temperature = self.threshold(structure), self._temperature(structure)
        if temperature == 1:
            return threshold
        scaled = apply_temperature(np.full(1, threshold, np.float32), temperature)[0]
        return float(min(scaled, np.nextafter(np.float32(1), np.float32(0))))  # the masks lie above it

    def _temperature(self, structure: str) -> float:
        return self.record.temperature if self.record is not None and structure == "infection" else 1.0

    def slice_probabilities(self, images: FloatArray) -> dict[str, FloatArray]:
        """Runs the models over prepared slices; after a lung model, the infection model only where it found lung.

        Args:
          images: float32 (slices, S, S, C) in [0, 1], see `prepare_volume`.

        Returns:
          for each structure, and `GEOMETRIC_MEAN` where lesions may be added (`infected_scan_ml`), float32
          (slices, S, S) in [0, 1]; it does not depend on the batch size. In slices without a lung mask the infection's
          probability is 0.
        """
        outputs: dict[str, FloatArray] = {}
        if self.lung is not None:
            (outputs["lung"],) = self._run("lung", lung_input(self.lung.model, images))
        if self.infection is None:
            return outputs
        if self.lung is None:
            infection = self._run("infection", images)
        else:
            with_lung = np.flatnonzero((outputs["lung"] > self.threshold("lung")).any(axis=(1, 2)))
            inputs = np.concatenate([images[with_lung], outputs["lung"][with_lung, ..., None]], axis=-1)
            found = self._run("infection", inputs)
            infection = np.zeros((len(found), *images.shape[:-1]), np.float32)
            infection[:, with_lung] = found
        return {**outputs, **dict(zip(("infection", GEOMETRIC_MEAN), infection, strict=False))}

    def postprocess(
        self, probabilities: dict[str, FloatArray], boxes: npt.NDArray[np.int32], grid: Grid
    ) -> npt.NDArray[np.bool_] | None:
        """Removes, in place, what cannot be part of a mask, and adds lesions; for the slices of a whole scan.

        Args:
          probabilities: as `slice_probabilities` returns them; what is removed becomes 0, and `GEOMETRIC_MEAN` goes.
          boxes: (slices, 4), see `prepare_volume`.
          grid: of the scan.

        Returns:
          the added lesions, bool (slices, S, S), or None without `GEOMETRIC_MEAN`.
        """
        geometric = probabilities.pop(GEOMETRIC_MEAN, None)
        remove_small_components(probabilities, self.threshold("lung"), self.min_component_fraction)
        if self.infection is None or "infection" not in probabilities:
            return None
        infection, threshold = probabilities["infection"], self.threshold("infection")
        config = self.infection.config.postprocess
        if self.gate == "closed_lung":
            gate_infection(probabilities, self.threshold("lung"), boxes, grid, config.gate_closing_mm)
        if geometric is not None:
            geometric[infection == 0] = 0  # no lesion is added where infection cannot lie
        remove_low_confidence_lesions(infection, threshold, boxes, grid, config)
        if geometric is None:
            return None
        return add_lesions(infection, geometric, threshold, boxes, grid, config)

    def scan_probabilities(self, images: FloatArray, boxes: npt.NDArray[np.int32], grid: Grid) -> dict[str, FloatArray]:
        """Both stages for a whole scan in memory; for arguments and result see the stages."""
        probabilities = self.slice_probabilities(images)
        self.postprocess(probabilities, boxes, grid)
        return probabilities

    def to_native_grid(
        self, probabilities: Mapping[str, FloatArray], boxes: npt.NDArray[np.int32], shape: tuple[int, int]
    ) -> dict[str, NativeSlices]:
        """Pastes prepared slices back to where they were cropped, and applies the thresholds.

        Args:
          probabilities: by structure, (slices, S, S), after `postprocess`; `GEOMETRIC_MEAN` is left out.
          boxes: (slices, 4), see `prepare_volume`.
          shape: (rows, columns) of the scan's slices, in pixels.
        """
        native = {}
        for name, slices in probabilities.items():
            if name == GEOMETRIC_MEAN:
                continue
            pasted: FloatArray = np.stack(
                [resize_paste(one, Box(*map(int, box)), shape) for one, box in zip(slices, boxes, strict=True)]
            )
            # Each slice stays contiguous, and is the last axis of a view: several times faster to go through.
            probability = np.moveaxis(pasted, 0, -1)
            native[name] = NativeSlices(probability, probability > self.threshold(name))
        return native

    def _run(self, name: str, inputs: FloatArray) -> FloatArray:
        """One model over (slices, S, S, C), by batches of one size, so that it is compiled once.

        Returns:
          float32 (1, slices, S, S), or with the geometric mean of the views (2, slices, S, S).
        """
        outputs = np.empty((1 + adds_lesions(self.models[name].config), *inputs.shape[:-1]), np.float32)
        on_cpu, variables = jax.default_backend() == "cpu", getattr(self, name).variables
        size = min(self.batch_size, _SLICES_ON_CPU) if on_cpu else self.batch_size

        def run_batch(start: int) -> None:
            batch = inputs[start : start + size]
            padded = np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0), (0, 0)))
            maps = np.asarray(self._jitted[name](variables, padded.astype(np.float32)))
            outputs[:, start : start + len(batch)] = np.moveaxis(maps[: len(batch)], -1, 0)

        starts, program = range(0, len(inputs), size), (name, inputs.shape[1:])
        alone = program not in self._compiled
        for start in starts[:alone]:  # side by side, both would compile
            run_batch(start)
            self._compiled.add(program)
        with ThreadPoolExecutor(_BATCHES_ON_CPU if on_cpu else 1) as executor:
            for _ in executor.map(run_batch, starts[alone:]):  # raises what a batch did
                pass
        return outputs

    @functools.cached_property
    def _compiled(self) -> set[tuple[str, tuple[int, ...]]]:
        """The programs that have run, by structure and shape of a slice."""
        return set()

    @functools.cached_property
    def _jitted(self) -> dict[str, Callable[[Variables, FloatArray], jax.Array]]:
        return {name: jitted_maps(model) for name, model in self.models.items()}


def jitted_maps(loaded: LoadedModel) -> Callable[[Variables, FloatArray], jax.Array]:
    """A model's compiled forward pass; on CPUs one slice after another, whose arrays stay in the caches.

    Returns:
      from variables and float32 (slices, S, S, C), as the model takes them, to probabilities (slices, S, S, 1); with
      the geometric mean of the views as a second channel where the model `adds_lesions`.
    """
    model = loaded.model.clone(convolution=default_convolution())

    def of_slices(variables: Variables, x: jax.Array) -> jax.Array:
        channels, config = loaded.config.preprocess.channels, loaded.config.model
        x = infection_input(model, x[..., :channels], x[..., channels:])
        views = predict_views(model, variables, x, patch_grid=config.patch_grid, averaging=averaging_of(loaded.config))
        maps = [arithmetic_mean(views), *[geometric_mean(views)] * adds_lesions(loaded.config)]
        return jnp.concatenate(maps, axis=-1)

    def probability(variables: Variables, x: jax.Array) -> jax.Array:
        if jax.default_backend() != "cpu":
            return of_slices(variables, x)
        return jax.lax.map(lambda one: of_slices(variables, one[None])[0], x)

    return jax.jit(probability)


def load_pretrained(batch_size: int = 8, *, infection_postprocess: Mapping[str, Any] | None = None) -> Predictor:
    """The pair of models that the package ships; for arguments see `load_predictor`.

    Raises:
      InputError: their files are damaged.
    """
    return load_predictor(batch_size=batch_size, infection_postprocess=infection_postprocess)


def load_predictor(
    lung_checkpoint: str | Path | None = None,
    infection_checkpoint: str | Path | None = None,
    batch_size: int = 8,
    *,
    thresholds: Mapping[str, float] | None = None,
    validated_threshold: bool = False,
    min_component_fraction: float | None = None,
    infection_postprocess: Mapping[str, Any] | None = None,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
) -> Predictor:
    """Restores one or both models of the cascade; with neither path, the pair that the package ships.

    Args:
      lung_checkpoint: for `load_model`, or None to segment no lungs.
      infection_checkpoint: for `load_model`, or None to segment no infection.
      batch_size: slices at a time, at most; see `Predictor`.
      thresholds: by structure, in (0, 1), instead of the models' own.
      validated_threshold: takes the thresholds that the trainings chose on their validation cases, where `thresholds`
        has none.
      min_component_fraction: in [0, 1], instead of the lung model's own; see `PostprocessConfig`.
      infection_postprocess: fields of `PostprocessConfig` instead of the infection model's own.
      architectures: the table of models.

    Raises:
      InputError: a folder holds no such model or threshold, the two do not belong together, or an argument makes no
        sense.
    """
    if batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size}; it must be at least 1")
    thresholds = thresholds or {}
    lung = load_model_for(lung_checkpoint, "lung", architectures) if lung_checkpoint else None
    infection = load_model_for(infection_checkpoint, "infection", architectures) if infection_checkpoint else None
    record = load_record(infection_checkpoint) if infection_checkpoint else None
    if lung is None and infection is None:
        (lung, infection), record = load_pair(), load_pair_record()
        logger.info("no model is given: using the pair that resunet_jax ships, see its model card (`info`)")
        if validated_threshold:
            raise InputError(
                "`validated_threshold`: the shipped pair has no validated one; leave it out, or give your models"
            )
    _check_pair(lung, infection, lung_checkpoint, infection_checkpoint)
    if min_component_fraction is not None:
        if lung is None:
            raise InputError("`min_component_fraction`: of the lung mask; give `lung_checkpoint` too, or leave it out")
        lung = _with_postprocess(lung, min_component_fraction=min_component_fraction)
    if infection_postprocess:
        infection = _with_infection_postprocess(lung, infection, infection_postprocess)
    if validated_threshold:
        thresholds = _with_validated(thresholds, {"lung": lung_checkpoint, "infection": infection_checkpoint})
    predictor = Predictor(lung, infection, batch_size, _checked_thresholds(thresholds), record)
    if record is None or record.fingerprints == predictor.fingerprints:
        return predictor
    logger.warning(
        "%s: %s was made for other weights than those given, and is not used; give the pair it is of, or run calibrate",
        infection_checkpoint,
        UNCERTAINTY_FILE,
    )
    return dataclasses.replace(predictor, record=None)


def _with_validated(thresholds: Mapping[str, float], paths: Mapping[str, str | Path | None]) -> dict[str, float]:
    """The thresholds, and for what they lack those that the trainings chose."""
    validated = {name: load_threshold(path) for name, path in paths.items() if path and name not in thresholds}
    if not validated:
        raise InputError("`validated_threshold`: `thresholds` gives all of them; drop one of the two")
    return {**validated, **thresholds}


def _checked_thresholds(thresholds: Mapping[str, float]) -> Mapping[str, float]:
    for structure, value in thresholds.items():
        if structure not in ("lung", "infection") or not 0 < value < 1:
            raise InputError(f"`thresholds`: {structure} is {value}; lung and infection may have one, each in (0, 1)")
    return thresholds


def _check_pair(
    lung: LoadedModel | None,
    infection: LoadedModel | None,
    lung_checkpoint: str | Path | None,
    infection_checkpoint: str | Path | None,
) -> None:
    """Refuses models that do not belong together, and warns of those that were not trained together."""
    if infection is not None and infection.config.task == "infection":
        if lung is None:
            raise InputError(f"{infection_checkpoint}: works on [CT, lung probability]; give `lung_checkpoint` too")
        if infection.config.lung_fingerprint not in ("", fingerprint(lung.variables)):
            logger.warning("%s was not trained on %s: expect worse masks", infection_checkpoint, lung_checkpoint)
    if lung and infection and not lung.config.preprocess.can_feed(infection.config.preprocess):
        raise InputError(
            f"{lung_checkpoint} and {infection_checkpoint} were trained on slices prepared differently "
            f"({lung.config.preprocess}, {infection.config.preprocess}); use models trained alike"
        )


def _with_infection_postprocess(
    lung: LoadedModel | None, infection: LoadedModel | None, fields: Mapping[str, Any]
) -> LoadedModel:
    """The infection model with these fields instead of its own; refuses those that would decide nothing."""
    names = ", ".join(f"`{name}`" for name in fields)
    if infection is None:
        raise InputError(f"{names}: of the infection; give `infection_checkpoint` too, or leave it out")
    if lung is None and ("gate_closing_mm" in fields or fields.get("gate", "none") != "none"):
        raise InputError(f"{names}: the gate is made of the lungs; give `lung_checkpoint` too, or leave it out")
    changed = _with_postprocess(infection, **fields)
    if any(name.startswith("infected_scan_") and v for name, v in fields.items()) and not adds_lesions(changed.config):
        raise InputError(
            f"{names}: no lesions are added, as the model has one view of a slice or `infected_scan_ml` is 0; leave "
            "out what begins with `infected_scan_`"
        )
    return changed


def _with_postprocess(loaded: LoadedModel, **changes: Any) -> LoadedModel:
    fields = {f"postprocess.{name}": value for name, value in changes.items()}
    return loaded._replace(config=override(loaded.config, fields))


def choose_threshold(
    predictor: Predictor, structure: Structure, cases: Sequence[tuple[PreparedCase, Array, Grid]]
) -> tuple[float, float] | None:
    """The threshold of `THRESHOLDS` whose masks have the highest mean Dice; of equal ones the nearest to 0.5.

    The masks are those that prediction writes: gated, postprocessed, on the native grid.

    Args:
      predictor: the models.
      structure: whose threshold.
      cases: prepared slices with the reference mask, bool (rows, columns, slices), on the native grid, and that grid.

    Returns:
      (threshold, its mean Dice), or None where no reference has the structure.
    """
    with_structure = [case for case in cases if case[1].any()]
    if not with_structure:
        return None
    dice = dict.fromkeys(THRESHOLDS, 0.0)
    with progress("choosing the threshold", len(with_structure)) as advance:
        for prepared, reference, grid in with_structure:
            unprocessed = predictor.slice_probabilities(prepared.images)
            for threshold in THRESHOLDS:
                chosen = dataclasses.replace(predictor, thresholds={**predictor.thresholds, structure: threshold})
                probabilities = {name: array.copy() for name, array in unprocessed.items()}
                chosen.postprocess(probabilities, prepared.boxes, grid)
                counts = _counts(chosen, structure, probabilities[structure], prepared, reference)
                dice[threshold] += hard_metrics(counts)["dice"] / len(with_structure)
            advance(prepared.case.id)
    best = max(THRESHOLDS, key=lambda threshold: (dice[threshold], -abs(threshold - 0.5)))
    return best, dice[best]


def _counts(
    predictor: Predictor, structure: Structure, probability: FloatArray, prepared: PreparedCase, reference: Array
) -> dict[str, int]:
    """Confusion counts of a scan on its own grid, some slices at a time."""
    counts = dict.fromkeys(COUNTS, 0)
    for start in range(0, len(probability), _CHUNK_SLICES):
        some = slice(start, start + _CHUNK_SLICES)
        native = predictor.to_native_grid({structure: probability[some]}, prepared.boxes[some], reference.shape[:2])
        for name, count in confusion_counts(native[structure].mask, reference[..., some]).items():
            counts[name] += int(count)
    return counts
