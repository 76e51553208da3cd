"""Settings as frozen dataclasses, with JSON in and out.

A `Config` travels with every checkpoint and decides how the model is used: nothing about preprocessing or
architecture has to be repeated when a model is restored. Fields that an older file does not have take their
defaults; fields that this version does not know are refused.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from resunet_jax.errors import InputError

Normalization = Literal["window", "air", "minmax"]
LossName = Literal["bce", "dice", "bce_dice", "bce_pooled_dice"]
ScheduleName = Literal["step", "one_cycle"]
TaskName = Literal["lung", "infection", "infection_ct"]
Target = Literal["lung", "infection"]

_MOST_CHANGE = {
    "max_rotation_deg": 180.0,
    "max_zoom": 1.0,
    "max_contrast": 0.9,
    "max_brightness": 0.5,
    "max_gamma": 2.0,
    "max_noise": 0.5,
}
"""Largest sensible values in an `AugmentConfig`; the smallest is 0."""


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """From a scan's values to the square slices that a model sees.

    Attributes:
      image_size: side of the square slice, in pixels.
      normalization: "window" maps HU [-1250, 250] to [0, 1], and takes 0..255 to be that window; "air" does the same,
        and moves scans in 0..255, whose window may have been another, until the air around the patient lies at
        -1000 HU; "minmax" maps each slice's own range to [0, 1].
      body_threshold_hu: what is above it counts as body, in HU, before a scan is moved.
      body_thresholds_minmax: where given, two thresholds on each slice's own range as [0, 1] take the place of
        `body_threshold_hu`: for scans in HU, and for windowed ones. The original's are 50/255 and 175/255.
      body_dilation: iterations by which the body is dilated before its bounding box is taken, in pixels.
    """

    image_size: int = 128
    normalization: Normalization = "window"
    body_threshold_hu: float = -220.0
    body_thresholds_minmax: tuple[float, ...] = ()
    body_dilation: int = 5


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The residual U-Net.

    Attributes:
      filters: feature channels of the four levels, from full to an eighth of the resolution.
      dtype: type of the computation, "float32" or "bfloat16"; parameters stay float32.
      lung_closing: for task "infection": holes and bays of the lung probability narrower than this part of a slice's
        side are filled before the infection model sees it; 0 leaves them.
    """

    filters: tuple[int, int, int, int] = (64, 128, 256, 512)
    dtype: Literal["float32", "bfloat16"] = "float32"
    lung_closing: float = 0.0


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes to a training slice and its masks, each by its own chance (probabilities in [0, 1]).

    Attributes:
      vertical_flip: chance of exchanging front and back of the body.
      horizontal_flip: chance of exchanging left and right.
      quarter_turn: chance of a turn by 90°.
      rotation: chance of a rotation by one of `angles_deg`, each equally likely.
      angles_deg: angles in degrees, positive is counter-clockwise.
      max_rotation_deg: every slice is rotated by up to this angle either way, in degrees.
      max_zoom: every slice is enlarged by up to this part, or made smaller by up to as much.
      max_contrast: grey values are multiplied by up to this part more or less than 1.
      max_brightness: up to this is added to grey values, or taken from them, on their scale of [0, 1].
      max_gamma: grey values are raised to a power between e^-g and e^g.
      max_noise: up to this standard deviation of Gaussian noise is added, on the scale of [0, 1].
      consolidation: chance that what the mask covers is made denser, up to soft tissue: for the infection, of which a
        small training set does not have every density.
      fading: chance that it is made fainter instead, most of the way down to healthy lung.
    """

    vertical_flip: float = 0.4
    horizontal_flip: float = 0.4
    quarter_turn: float = 0.2
    rotation: float = 0.3
    angles_deg: tuple[float, ...] = (-30.0, -18.0, -6.0, 6.0, 18.0, 30.0)
    max_rotation_deg: float = 0.0
    max_zoom: float = 0.0
    max_contrast: float = 0.0
    max_brightness: float = 0.0
    max_gamma: float = 0.0
    max_noise: float = 0.0
    consolidation: float = 0.0
    fading: float = 0.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      batch_size: slices per step.
      epochs: upper limit on passes over the training slices.
      schedule: "step" multiplies the learning rate by `decay_factor` every `decay_epochs`; "one_cycle" raises it from a
        tenth to `learning_rate` over the first 15 % of all steps, and lowers it along a cosine to a thousandth.
      learning_rate: Adam's step size at the start ("step"), or at its highest ("one_cycle").
      decay_epochs: see `schedule`.
      decay_factor: see `schedule`.
      weight_decay: of AdamW, times the learning rate; 0 is Adam.
      loss: "bce", "dice", "bce_dice" (their sum), or "bce_pooled_dice", with one Dice over all slices of a batch.
      patience: epochs without a lower validation loss after which training stops.
      accumulate_steps: k > 1 updates the parameters every k-th step, by the mean of k gradients: the effective batch
        is k · batch_size slices, in the memory of batch_size. Batch statistics are of each step's slices.
      skip_nonfinite: leaves out steps whose loss or gradient is not finite, instead of ending the training.
      remat: see `ResUnet`; less memory for a quarter more computation.
      patch_factor: 1 for whole slices; f > 1 cuts each slice into f × f patches that the model sees apart.
      seed: of the initial parameters, the order of slices and the augmentation.
    """

    batch_size: int = 8
    epochs: int = 60
    schedule: ScheduleName = "step"
    learning_rate: float = 1e-4
    decay_epochs: int = 20
    decay_factor: float = 0.1
    weight_decay: float = 0.0
    loss: LossName = "bce"
    patience: int = 10
    accumulate_steps: int = 1
    skip_nonfinite: bool = False
    remat: bool = False
    patch_factor: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """From probabilities to masks of a whole scan.

    Attributes:
      smallest_region: regions of a lung mask that are smaller than this part of the largest are dropped, and with them
        the infection in slices where no lung is left; 0 drops nothing.
    """

    smallest_region: float = 0.0


@dataclasses.dataclass(frozen=True)
class Config:
    """All that made a model, and all that is needed to use it.

    Attributes:
      task: "lung"; "infection", on CT and lung probability; or "infection_ct", on CT alone.
      preprocess: see `PreprocessConfig`.
      model: see `ModelConfig`.
      augment: see `AugmentConfig`.
      train: see `TrainConfig`.
      predict: see `PredictConfig`; that of the lung model counts.
      lung_fingerprint: for task "infection", which lung model fed the training (see `fingerprint` in
        `training/checkpoints.py`); otherwise empty.
    """

    task: TaskName = "lung"
    preprocess: PreprocessConfig = PreprocessConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()
    lung_fingerprint: str = ""

    def __post_init__(self) -> None:
        check(self)


def _require(condition: bool, field: str, value: object, wanted: str) -> None:
    if not condition:
        raise InputError(f"{field} is {value!r}; it must be {wanted}")


def check(config: Config) -> None:
    """Raises `InputError`, naming the field, where a value makes no sense."""
    preprocess, model, train, augment = config.preprocess, config.model, config.train, config.augment
    chosen: tuple[tuple[str, str, Any], ...] = (
        ("task", config.task, TaskName),
        ("normalization", preprocess.normalization, Normalization),
        ("loss", train.loss, LossName),
        ("schedule", train.schedule, ScheduleName),
    )
    for field, name, names in chosen:
        allowed = typing.get_args(names)
        _require(name in allowed, field, name, "one of " + ", ".join(allowed))
    _require(train.weight_decay >= 0, "weight_decay", train.weight_decay, "0 or more")
    _require(model.dtype in ("float32", "bfloat16"), "dtype", model.dtype, "float32 or bfloat16")
    _require(0 <= model.lung_closing <= 1, "lung_closing", model.lung_closing, "a part in [0, 1]")
    _require(train.patch_factor >= 1, "patch_factor", train.patch_factor, "1 or more")
    multiple = 8 * train.patch_factor
    _require(
        preprocess.image_size > 0 and preprocess.image_size % multiple == 0,
        "image_size",
        preprocess.image_size,
        f"a positive multiple of {multiple} (the model halves the resolution three times in each patch)",
    )
    thresholds = preprocess.body_thresholds_minmax
    _require(
        len(thresholds) in (0, 2) and all(0 < t < 1 for t in thresholds),
        "body_thresholds_minmax",
        thresholds,
        "empty, or two numbers between 0 and 1",
    )
    _require(preprocess.body_dilation >= 0, "body_dilation", preprocess.body_dilation, "0 or more")
    _require(
        len(model.filters) == 4 and all(f > 0 for f in model.filters),
        "filters",
        ",".join(map(str, model.filters)),
        "four positive numbers, as in 64,128,256,512",
    )
    positive = ("batch_size", "epochs", "learning_rate", "decay_epochs", "decay_factor", "patience", "accumulate_steps")
    for field in positive:
        _require(getattr(train, field) > 0, field, getattr(train, field), "more than 0")
    for field in ("vertical_flip", "horizontal_flip", "quarter_turn", "rotation", "consolidation", "fading"):
        _require(0 <= getattr(augment, field) <= 1, field, getattr(augment, field), "a probability in [0, 1]")
    either = augment.consolidation + augment.fading
    _require(either <= 1, "consolidation + fading", either, "at most 1: a lesion is made denser or fainter")
    smallest = config.predict.smallest_region
    _require(0 <= smallest <= 1, "smallest_region", smallest, "a part in [0, 1]")
    for field, most in _MOST_CHANGE.items():
        value = getattr(augment, field)
        _require(0 <= value <= most, field, value, f"between 0 and {most:g}")
    _require(len(augment.angles_deg) > 0, "angles_deg", augment.angles_deg, "at least one angle")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON values: nested dicts, lists, numbers and strings."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def changed_fields(config: Config) -> dict[str, Any]:
    """The fields that are not at their default, by path: what `override` needs to make the config from `Config()`.

    A later version that adds a field gives the same.
    """
    default, values = to_dict(Config()), to_dict(config)
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            changes |= {f"{name}.{field}": inner for field, inner in value.items() if inner != default[name][field]}
        elif value != default[name]:
            changes[name] = value
    return changes


def override(config: Config, changes: Mapping[str, Any], origin: str = "config") -> Config:
    """The config with some fields changed.

    Args:
      config: to start from.
      changes: JSON values by path, as in {"train.loss": "bce", "augment.max_zoom": 0.3}.
      origin: where they come from, for error messages.

    Raises:
      InputError: see `from_dict`.
    """
    values = to_dict(config)
    for path, value in changes.items():
        section, _, field = path.rpartition(".")
        if section and not isinstance(values.get(section), dict):
            raise InputError(f"{origin}: there is no {path}; fields look like train.loss")
        (values[section] if section else values)[field] = value
    return from_dict(values, origin)


_T = TypeVar("_T")


def _build(cls: type[_T], values: Any, where: str, origin: str) -> _T:
    if not isinstance(values, dict):
        raise InputError(f"{origin}: {where or 'the config'} must be a JSON object, found {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(f"{origin}: unknown field {where}{unknown[0]}; was it written by a newer resunet_jax?")
    fields: dict[str, Any] = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            fields[name] = _build(typing.cast(type, kind), value, f"{where}{name}.", origin)
        else:
            fields[name] = _convert(kind, value, f"{where}{name}", origin)
    return cls(**fields)


def _convert(kind: Any, value: Any, where: str, origin: str) -> Any:
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(typing.get_args(kind)[0], item, where, origin) for item in items)
    wanted = str if typing.get_origin(kind) is Literal else kind
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is float and number:
        return float(value)
    if isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool):
        return value
    raise InputError(f"{origin}: {where} is {value!r}; expected {wanted.__name__}")


def from_dict(values: Any, origin: str = "config") -> Config:
    """The inverse of `to_dict`.

    Args:
      values: nested dicts as from JSON; missing fields take their defaults.
      origin: the file that they came from, for error messages.

    Raises:
      InputError: an unknown field, or a value of the wrong type or range.
    """
    return _build(Config, values, "", origin)
