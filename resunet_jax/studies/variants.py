"""Variants of the recipes that studies compare."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from resunet_jax.config import Config, Structure, override
from resunet_jax.errors import InputError
from resunet_jax.recipes import DEFAULT_RECIPE, RecipeName, recipe


@dataclasses.dataclass(frozen=True)
class Variant:
    """A recipe, and what is changed in it.

    Attributes:
      name: in tables and figures.
      recipe: to start from.
      lung: changes of the lung model's config, see `override`.
      infection: changes of the infection model's; None trains and tests the lung model alone.
    """

    name: str
    recipe: RecipeName = DEFAULT_RECIPE
    lung: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    infection: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)

    def configs(self, changes: Mapping[str, Any], seed: int) -> dict[Structure, Config]:
        """The configs of its models, in the order of their training; its own changes override those of all variants.

        Raises:
          InputError: see `override`.
        """
        own: dict[Structure, Mapping[str, Any] | None] = {"lung": self.lung, "infection": self.infection}
        return {
            task: override(recipe(self.recipe, task), {**changes, **mine, "train.seed": seed}, f"variant {self.name!r}")
            for task, mine in own.items()
            if mine is not None
        }


_BCE = {"train.loss": "bce:1"}
_SLICE_DICE = {"train.loss": "bce:1,dice:1"}
_STEPS = {"train.schedule": "step", "train.learning_rate": 1e-4, "train.weight_decay": 0.0}
_NO_INTENSITY = dict.fromkeys(
    ("augment.max_contrast", "augment.max_brightness", "augment.max_gamma", "augment.max_noise"), 0.0
)
_ORIGINAL_SPATIAL = {
    "augment.vertical_flip_prob": 0.4,
    "augment.horizontal_flip_prob": 0.4,
    "augment.rot90_prob": 0.2,
    "augment.rotation_prob": 0.3,
    "augment.max_rotation_deg": 0.0,
    "augment.max_scale": 0.0,
}
_MINMAX = {
    "preprocess.normalization": "minmax",
    "augment.lesion_densify_prob": 0.0,  # which are in HU
    "augment.lesion_fade_prob": 0.0,
    "augment.fill": 0.0,
}
_WINDOW = {"preprocess.normalization": "window"}
_NO_AVERAGE = {"train.ema_decay": 0.0}

VARIANTS: tuple[Variant, ...] = (
    Variant("robust", "robust"),
    Variant("original", "original"),
    Variant("infection: single slices", infection={"preprocess.context_mm": 0.0}),
    Variant("infection: no context dropout", infection={"augment.context_dropout_prob": 0.0}),
    Variant("infection: random beginning", infection={"cascade.start_from_lung": False}),
    Variant("infection: unprocessed lung probability", infection={"cascade.closing_fraction": 0.0}),
    Variant("infection: no densified lesions", infection={"augment.lesion_densify_prob": 0.0}),
    Variant("infection: no faded lesions", infection={"augment.lesion_fade_prob": 0.0}),
    Variant("infection: cross-entropy alone", infection=_BCE),
    Variant("infection: per-slice Dice", infection=_SLICE_DICE),
    Variant("infection: the original's optimizer", infection=_STEPS),
    Variant("infection: the original's spatial augmentation", infection=_ORIGINAL_SPATIAL),
    Variant("infection: no intensity augmentation", infection=_NO_INTENSITY),
    Variant("lung: cross-entropy alone", lung=_BCE, infection=None),
    Variant("lung: the original's optimizer", lung=_STEPS, infection=None),
    Variant("lung: the original's spatial augmentation", lung=_ORIGINAL_SPATIAL, infection=None),
    Variant("lung: no intensity augmentation", lung=_NO_INTENSITY, infection=None),
    Variant("lung: all components kept", lung={"postprocess.min_component_fraction": 0.0}, infection=None),
    Variant("both: per-slice min–max", lung=_MINMAX, infection=_MINMAX),
    Variant("both: no moving average", lung=_NO_AVERAGE, infection=_NO_AVERAGE),
    Variant("both: no air calibration", lung=_WINDOW, infection=_WINDOW),
)
"""The variants of an ablation: the default recipe, the original, and the default with one thing changed."""

ALIASES = {
    "lung probability as it comes": "unprocessed lung probability",
    "no lesions made denser": "no densified lesions",
    "no lesions made fainter": "no faded lesions",
    "Dice of each slice": "per-slice Dice",
    "the original's moves": "the original's spatial augmentation",
    "grey values as they are": "no intensity augmentation",
    "small regions stay": "all components kept",
    "air where the file has it": "no air calibration",
}
"""What stood after the colon of a variant's name in 0.6.0, and what stands there now."""


def find_variants(names: Sequence[str]) -> list[Variant]:
    """The variants of `VARIANTS` with these names, each once, in the order of the names; all of them without a name.

    Raises:
      InputError: a name is unknown.
    """
    by_name, found = {variant.name: variant for variant in VARIANTS}, {}
    for name in names:
        model, colon, change = name.partition(": ")
        current = model + colon + ALIASES.get(change, change)
        if current not in by_name:
            raise InputError(f"variant {name!r}: there is none of that name; there are {', '.join(by_name)}")
        found[current] = by_name[current]
    return list((found or by_name).values())
