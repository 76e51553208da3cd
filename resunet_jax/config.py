"""Settings as frozen dataclasses, with JSON in and out.

A `Config` travels with every saved model and decides how it is used: nothing about preprocessing or architecture has to
be repeated when a model is restored. Each field is one line: default, description, unit and bounds; the check and the
scripts' flags are made from it. Names of older versions are read through `ALIASES`, and a field that an older file
lacks takes the default of the version that wrote the file.
"""

import dataclasses
import json
import math
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from resunet_jax import __version__
from resunet_jax.errors import InputError

Normalization = Literal["window", "air", "minmax"]
ScheduleName = Literal["step", "one_cycle"]
GateName = Literal["none", "closed_lung"]
TaskName = Literal["lung", "infection", "infection_ct"]
Structure = Literal["lung", "infection"]


def setting(
    default: Any,
    description: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A field with its description, unit and bounds: `low` and `high` are allowed themselves, `above` is not."""
    metadata = {"description": description, "unit": unit, "low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """From a scan's intensities to the square slices that a model sees."""

    image_size: int = setting(128, "side of the square slices that the model sees", unit="pixels", low=8)
    normalization: Normalization = setting(
        "air",
        "intensity scale: HU [-1250, 250] to [0, 1] (window), the same with scans in 0..255 shifted until the air "
        "around the patient is at -1000 HU (air), or each slice's own range (minmax)",
    )
    body_threshold_hu: float = setting(
        -220.0, "what is above it is body, before the shift of normalization air", unit="HU", low=-1250, high=250
    )
    body_thresholds_minmax: tuple[float, ...] = setting(
        (), "two thresholds on each slice's own range instead of body_threshold_hu: HU scans, windowed scans", above=0
    )
    body_dilation: int = setting(5, "iterations of the body's dilation before its bounding box", unit="pixels", low=0)
    context_mm: float = setting(
        0.0,
        "distance of the slices below and above that are further input channels, in no order; 0 for none",
        unit="mm",
        low=0,
        high=50,
    )

    @property
    def is_physical(self) -> bool:
        """Whether intensities mean the same in every scan, which a slice's own range does not."""
        return self.normalization != "minmax"

    @property
    def channels(self) -> int:
        """C of a prepared slice: itself, and with context the slices below and above."""
        return 3 if self.context_mm else 1

    def can_feed(self, other: "PreprocessConfig") -> bool:
        """Whether a lung model of these slices may feed an infection model of `other`: the same, or without context."""
        return self in (other, dataclasses.replace(other, context_mm=0.0))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model of the cascade."""

    architecture: str = setting("resunet", "name in the table of architectures")
    filters: tuple[int, ...] = setting((64, 128, 256, 512), "channels of the levels, finest first", low=1)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "type of the computation; parameters stay float32")
    patch_grid: int = setting(1, "f cuts each slice into f × f patches that are processed independently", low=1)
    mirroring: bool = setting(
        False,
        "test-time augmentation: at prediction the probability is the mean of those of a slice and of its left–right "
        "mirror image",
    )
    context_averaging: bool = setting(
        False,
        "test-time augmentation: at prediction the probability is the mean of those with the slices around and "
        "without; with mirroring, the mirror image is the one without",
    )


@dataclasses.dataclass(frozen=True)
class CascadeConfig:
    """How the lung probability reaches the infection model."""

    closing_fraction: float = setting(
        0.0, "width of its morphological closing, as a fraction of the slice; 0 for none", low=0, high=1
    )
    start_from_lung: bool = setting(
        False, "the infection training begins with its lung model's variables, where the filters are the same"
    )


@dataclasses.dataclass(frozen=True)
class PostprocessConfig:
    """From probabilities to masks: threshold, components of the lung, gate and lesions of the infection."""

    threshold: float = setting(0.5, "a voxel whose probability is above it is in the mask", above=0, high=0.999)
    min_component_fraction: float = setting(
        0.1,
        "components of the lung mask below this fraction of the largest are removed, and the infection in slices where "
        "no lung is left; 0 for none",
        low=0,
        high=1,
    )
    gate: GateName = setting(
        "closed_lung", "where infection is kept: closed_lung, in the closed mask of either lung, or none, anywhere"
    )
    gate_closing_mm: float = setting(
        20.0,
        "radius of the morphological closing of each lung's mask, for gate closed_lung",
        unit="mm",
        low=0,
        high=100,
    )
    min_lesion_ml: float = setting(
        1.0, "connected components of the infection below this are removed", unit="ml", low=0
    )
    min_lesion_probability: float = setting(
        0.9,
        "components below keep_lesion_ml that nowhere reach this probability are removed (hysteresis thresholding)",
        low=0,
        high=1,
    )
    keep_lesion_ml: float = setting(
        20.0, "components of at least this volume stay, whatever their probability; 0: no exemption", unit="ml", low=0
    )
    infected_scan_ml: float = setting(
        0.0,
        "a scan whose components that reach min_lesion_probability have this volume is surely infected, and further "
        "lesions are added to it, which both views of a slice (test-time augmentation) show; 0: no scan is",
        unit="ml",
        low=0,
    )
    infected_scan_odds: float = setting(
        5.0, "in surely infected scans: factor on the odds of the geometric mean of both views", above=0, high=1000
    )
    infected_scan_lesion_probability: float = setting(
        0.55,
        "in surely infected scans: components above the threshold by these odds are added if they reach this",
        low=0,
        high=1,
    )


INFECTION_POSTPROCESS = (
    "gate",
    "gate_closing_mm",
    "min_lesion_ml",
    "min_lesion_probability",
    "keep_lesion_ml",
    "infected_scan_ml",
    "infected_scan_odds",
    "infected_scan_lesion_probability",
)
"""Fields of `PostprocessConfig` that are the infection model's."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random transforms of a training slice and its mask."""

    vertical_flip_prob: float = setting(0.0, "probability of exchanging front and back", low=0, high=1)
    horizontal_flip_prob: float = setting(0.5, "probability of exchanging left and right", low=0, high=1)
    rot90_prob: float = setting(0.0, "probability of a rotation by 90°", low=0, high=1)
    rotation_prob: float = setting(0.0, "probability of a rotation by one of angles_deg", low=0, high=1)
    angles_deg: tuple[float, ...] = setting(
        (-30.0, -18.0, -6.0, 6.0, 18.0, 30.0), "equally likely, counter-clockwise", unit="degrees", low=-360, high=360
    )
    max_rotation_deg: float = setting(15.0, "every slice is rotated by up to this", unit="degrees", low=0, high=180)
    max_scale: float = setting(
        0.2, "every slice is scaled by a factor of up to 1 + this, or its inverse", low=0, high=1
    )
    fill: float = setting(
        1 / 6, "intensity of what comes from outside the slice: air at -1000 HU is a sixth", low=0, high=1
    )
    max_contrast: float = setting(0.15, "intensities times up to 1 ± this", low=0, high=0.9)
    max_brightness: float = setting(0.045, "up to this is added or subtracted, on [0, 1]", low=0, high=0.5)
    max_gamma: float = setting(0.3, "intensities to a power between e^-this and e^this", low=0, high=2)
    max_noise: float = setting(0.03, "largest standard deviation of Gaussian noise, on [0, 1]", low=0, high=0.5)
    lesion_densify_prob: float = setting(
        0.0, "probability that the infection, where its mask is known, is made denser, up to soft tissue", low=0, high=1
    )
    lesion_fade_prob: float = setting(
        0.0, "probability that it is made fainter instead, towards healthy lung", low=0, high=1
    )
    context_dropout_prob: float = setting(
        0.0, "probability that the slice itself takes the place of those below and above it", low=0, high=1
    )
    transforms: tuple[str, ...] = setting(
        ("spatial", "lesion_intensity", "intensity", "context_dropout"),
        "names in the table of augmentations, in order",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    batch_size: int = setting(8, "slices per step", low=1)
    epochs: int = setting(60, "passes over the training slices, at most", low=1)
    schedule: ScheduleName = setting(
        "one_cycle",
        "learning rate: times decay_factor every decay_epochs (step), or from a tenth up to learning_rate over the "
        "first 15 % of all steps and down a cosine to a thousandth (one_cycle)",
    )
    learning_rate: float = setting(2e-3, "peak learning rate", above=0, high=10)
    decay_epochs: int = setting(20, "see schedule", unit="epochs", low=1)
    decay_factor: float = setting(0.1, "see schedule", above=0, high=1)
    ema_decay: float = setting(
        0.99, "decay of the moving average of the variables, which is the saved model; 0: no average", low=0, high=1
    )
    weight_decay: float = setting(1e-4, "decoupled weight decay of AdamW; 0 for Adam", low=0, high=10)
    loss: str = setting("bce:1,pooled_dice:1", "weighted terms from the table of losses, as in bce:1,pooled_dice:1")
    patience: int = setting(
        60, "with schedule step: epochs without a lower validation loss before training stops", low=1
    )
    accumulate_steps: int = setting(1, "steps over which gradients are averaged for one update", low=1)
    skip_nonfinite: bool = setting(False, "leave out steps whose loss or gradient is not finite")
    remat: bool = setting(False, "recompute residual blocks in the backward pass: less memory, a quarter more work")
    seed: int = setting(0, "of initial parameters, order of slices and augmentation", low=0, high=2**31 - 1)


UNKNOWN_PATIENTS = "(unknown)"
"""Stands among a model's patients for those that are not known."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All that made a model, and all that is needed to use it; the defaults are the default recipe for the lungs.

    Attributes:
      task: "lung"; "infection", on CT and lung probability; or "infection_ct", on CT alone.
      preprocess: see `PreprocessConfig`, as for the other sections.
      model: the architecture.
      cascade: from lung probability to infection model.
      postprocess: from probabilities to masks.
      augment: of training slices.
      train: the training run.
      lung_fingerprint: for task "infection", `fingerprint` of the lung model that fed the training; otherwise empty.
      initial_fingerprint: of the trained model that the training began with (fine-tuning); otherwise empty.
      train_patients: whose scans trained it and the model that it began with, and `UNKNOWN_PATIENTS` for those of a
        model that lists none; empty where it is not known.
      val_patients: whose scans chose its epoch and threshold.
    """

    task: TaskName = "lung"
    preprocess: PreprocessConfig = PreprocessConfig()
    model: ModelConfig = ModelConfig()
    cascade: CascadeConfig = CascadeConfig()
    postprocess: PostprocessConfig = PostprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    lung_fingerprint: str = ""
    initial_fingerprint: str = ""
    train_patients: tuple[str, ...] = ()
    val_patients: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self)

    @property
    def lists_patients(self) -> bool:
        """Whether `train_patients` are all."""
        return bool(self.train_patients) and UNKNOWN_PATIENTS not in self.train_patients


ALIASES = {
    "model.lung_closing": "cascade.closing_fraction",
    "predict.smallest_region": "postprocess.min_component_fraction",
    "augment.vertical_flip": "augment.vertical_flip_prob",
    "augment.horizontal_flip": "augment.horizontal_flip_prob",
    "augment.quarter_turn": "augment.rot90_prob",
    "augment.rotation": "augment.rotation_prob",
    "augment.max_zoom": "augment.max_scale",
    "augment.consolidation": "augment.lesion_densify_prob",
    "augment.fading": "augment.lesion_fade_prob",
    "train.patch_factor": "model.patch_grid",
}
"""Names of 0.6.0 and before, which are still read and written, and what they are called now."""

LOSS_ALIASES = {"bce_dice": "bce:1,dice:1", "bce_pooled_dice": "bce:1,pooled_dice:1"}
"""Losses of 0.6.0 and before as weighted terms."""

DEFAULTS_BY_VERSION: dict[str, dict[str, Any]] = {
    "0.6.0": {
        "preprocess.normalization": "window",
        "augment.vertical_flip_prob": 0.4,
        "augment.horizontal_flip_prob": 0.4,
        "augment.rot90_prob": 0.2,
        "augment.rotation_prob": 0.3,
        "augment.max_rotation_deg": 0.0,
        "augment.max_scale": 0.0,
        "augment.max_contrast": 0.0,
        "augment.max_brightness": 0.0,
        "augment.max_gamma": 0.0,
        "augment.max_noise": 0.0,
        "train.schedule": "step",
        "train.learning_rate": 1e-4,
        "train.weight_decay": 0.0,
        "train.loss": "bce",
        "train.patience": 10,
        "postprocess.min_component_fraction": 0.0,
    },
    "0.7.0": {"augment.fill": 0.0},
    "0.8.0": {
        "postprocess.gate": "none",
        "postprocess.min_lesion_ml": 0.0,
        "postprocess.min_lesion_probability": 0.0,
    },
    "0.10.0": {"train.ema_decay": 0.0},
    "0.12.0": {"augment.transforms": ("spatial", "lesion_intensity", "intensity")},
    "0.13.0": {"postprocess.keep_lesion_ml": 0.0},
}
"""By version, oldest first: what a field that a file of that version or an older one lacks meant, where it is not
today's default. Before 0.7.0 files did not say their version."""


class Setting(NamedTuple):
    """A field of a section: its type, default, and the arguments of `setting`."""

    kind: Any
    default: Any
    description: str
    unit: str
    low: float | None
    high: float | None
    above: float | None

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed values, where they can be listed."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def help(self) -> str:
        """Description, unit and bounds in a line."""
        bounds = {"above": self.above, "at least": self.low, "at most": self.high}
        unit = [f"in {self.unit}"] if self.unit else []
        return "; ".join([self.description, *unit, *(f"{n} {b:.12g}" for n, b in bounds.items() if b is not None)])


def _settings() -> Iterator[tuple[str, Setting]]:
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type):
            hints = typing.get_type_hints(section.type)
            for field in dataclasses.fields(section.type):
                yield f"{section.name}.{field.name}", Setting(hints[field.name], field.default, **field.metadata)


SETTINGS = dict(_settings())
"""Every field of every section, by path, as in "train.epochs"."""


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"{field} is {value!r}; it must be {expected}")


def check(config: Config) -> None:
    """Raises `InputError`, naming the field, where a value makes no sense."""
    _require(config.task in typing.get_args(TaskName), "task", config.task, "one of lung, infection, infection_ct")
    for path, entry in SETTINGS.items():
        section, _, name = path.partition(".")
        value = getattr(getattr(config, section), name)
        for item in value if isinstance(value, tuple) else (value,):
            _check_setting(name, item, entry)
    preprocess, augment = config.preprocess, config.augment
    multiple = 8 * config.model.patch_grid
    _require(
        preprocess.image_size % multiple == 0,
        "image_size",
        preprocess.image_size,
        f"a positive multiple of {multiple} (the model halves the resolution three times in each patch)",
    )
    thresholds = preprocess.body_thresholds_minmax
    _require(
        len(thresholds) in (0, 2) and all(t < 1 for t in thresholds),
        "body_thresholds_minmax",
        thresholds,
        "empty, or two numbers between 0 and 1",
    )
    _require(
        len(config.model.filters) == 4, "filters", config.model.filters, "four positive numbers, as in 64,128,256,512"
    )
    either = augment.lesion_densify_prob + augment.lesion_fade_prob
    name = "lesion_densify_prob + lesion_fade_prob"
    _require(either <= 1, name, either, "at most 1: a lesion is made denser or fainter")
    _require(len(augment.angles_deg) > 0, "angles_deg", augment.angles_deg, "at least one angle")
    _require(bool(config.train.loss), "loss", config.train.loss, "weighted terms, as in bce:1,pooled_dice:1")


def _check_setting(name: str, value: Any, entry: Setting) -> None:
    if entry.choices:
        _require(value in entry.choices, name, value, "one of " + ", ".join(entry.choices))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high, above = entry.low, entry.high, entry.above
    _require(abs(value) <= sys.float_info.max, name, value, "a finite number")
    _require(low is None or value >= low, name, value, f"at least {low}")
    _require(high is None or value <= high, name, value, f"at most {high}")
    _require(above is None or value > above, name, value, f"more than {above}")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON values, with the version that writes it and the names of 0.6.0 next to today's."""
    values = _plain(config)
    for old, new in ALIASES.items():
        _set(values, old, _get(values, new))
    return {"version": __version__, **values}


def _plain(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _get(values: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """A value by its path."""
    section, _, field = path.rpartition(".")
    inner: Mapping[str, Any] = values[section] if section else values
    return inner.get(field, default)


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    section, _, field = path.rpartition(".")
    (values.setdefault(section, {}) if section else values)[field] = value


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, by path, with the JSON value of each config."""
    values = _plain(old), _plain(new)
    paths = [*SETTINGS, "task", "lung_fingerprint", "initial_fingerprint", "train_patients", "val_patients"]
    pairs = {path: (_get(values[0], path), _get(values[1], path)) for path in paths}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def non_defaults(config: Config) -> dict[str, Any]:
    """The fields that are not at their default, by path: what `override` needs to make the config from `Config()`."""
    return {path: value for path, (_, value) in differences(Config(), config).items()}


def override(config: Config, changes: Mapping[str, Any], source: str = "config") -> Config:
    """The config with some fields changed.

    Args:
      config: to start from.
      changes: JSON values by path, as in {"train.loss": "bce", "augment.max_scale": 0.3}; names of 0.6.0 are known too.
      source: where they come from, for error messages.

    Raises:
      InputError: see `from_dict`.
    """
    values = _plain(config)
    for path, value in changes.items():
        section = path.rpartition(".")[0]
        if section and path not in ALIASES and not isinstance(values.get(section), dict):
            raise InputError(f"{source}: there is no {path}; fields look like train.loss")
        name = ALIASES.get(path, path)
        if isinstance(values.get(name), dict):
            raise InputError(f"{source}: {path} is a section; name the field that changes, as in train.loss")
        if changes.get(name, value) != value:
            raise InputError(_contradiction(path, name, source))
        _set(values, name, value)
    return from_dict({"version": __version__, **values}, source)


def from_dict(values: Any, source: str = "config") -> Config:
    """The inverse of `to_dict`, for what any version has written.

    Args:
      values: nested dicts as from JSON; missing fields take the defaults of the version that wrote it.
      source: the file that they came from, for error messages.

    Raises:
      InputError: an unknown field, a value of the wrong type or range, or two names of a field that contradict.
    """
    if not isinstance(values, dict):
        raise InputError(f"{source}: the config must be a JSON object, found {values!r}")
    version = values.get("version", __version__)
    if _order(version) > _order(__version__):
        source = f"{source}, which resunet_jax {version} has written, a newer one than this"
    return _build(Config, _upgrade(values, source), "", source)


def _upgrade(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values of any version under today's names, with the defaults of that version where they lack some."""
    upgraded = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    version = upgraded.pop("version", "0.6.0")
    for old, new in ALIASES.items():
        section, _, field = old.rpartition(".")
        if not isinstance(upgraded.get(section), dict) or field not in upgraded[section]:
            continue
        value = upgraded[section].pop(field)
        if isinstance(upgraded.setdefault(new.partition(".")[0], {}), dict):
            if _get(upgraded, new, value) != value:
                raise InputError(_contradiction(old, new, source))
            _set(upgraded, new, value)
    if upgraded.get("predict") == {}:
        del upgraded["predict"]
    for known, row in DEFAULTS_BY_VERSION.items():
        for path, value in row.items() if _order(version) <= _order(known) else ():
            section, _, field = path.partition(".")
            if isinstance(upgraded.setdefault(section, {}), dict):
                upgraded[section].setdefault(field, value)
    train = upgraded.get("train")
    if isinstance(train, dict) and isinstance(train.get("loss"), str):
        train["loss"] = LOSS_ALIASES.get(train["loss"], train["loss"])
    return upgraded


def _contradiction(old: str, new: str, source: str) -> str:
    return f"{source}: {old} and {new} name one field and differ; make them equal"


def _order(version: Any) -> tuple[int, ...]:
    return tuple(int(number) for number in str(version).split(".") if number.isdecimal())


_T = TypeVar("_T")


def _build(cls: type[_T], values: Any, where: str, source: str) -> _T:
    if not isinstance(values, dict):
        raise InputError(f"{source}: {where.removesuffix('.')} must be a JSON object, found {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(f"{source}: there is no {where}{unknown[0]}; there are {', '.join(where + n for n in hints)}")
    fields: dict[str, Any] = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            fields[name] = _build(typing.cast(type, kind), value, f"{where}{name}.", source)
        else:
            fields[name] = _convert(kind, value, f"{where}{name}", source)
    return cls(**fields)


def _convert(kind: Any, value: Any, where: str, source: str) -> Any:
    if typing.get_origin(kind) is tuple:
        element, *_ = typing.get_args(kind)
        if isinstance(value, str) and element is not str:
            raise InputError(f"{source}: {where} is {value!r}; expected a list of {element.__name__}, as in [1, 2]")
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(element, item, where, source) for item in items)
    expected = str if typing.get_origin(kind) is Literal else kind
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if expected is float and number:
        try:
            return float(value)
        except OverflowError:  # a whole number that is too large for one
            return math.inf if value > 0 else -math.inf
    if isinstance(value, expected) and isinstance(value, bool) == (expected is bool):
        return value
    raise InputError(f"{source}: {where} is {value!r}; expected {expected.__name__}")
