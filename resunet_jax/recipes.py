"""Named recipes: whole configs to train by, of which any field can be overridden.

`robust` is the default, and `Config()` is `robust` for the lungs. The argument `recipe` of the training scripts chooses
one; Dice stands in the README, speed and reasons in BUILD_NOTES.md.
"""

import dataclasses
from typing import Literal

from resunet_jax.config import Config, Structure, TaskName, from_dict, override
from resunet_jax.errors import InputError

RecipeName = Literal["original", "robust"]

DEFAULT_RECIPE: RecipeName = "robust"

ORIGINAL_BODY_THRESHOLDS = (50 / 255, 175 / 255)
"""On each slice's own range: for Coronacases, which are in HU, and for Radiopaedia, which are windowed."""

# Up to 0.6.0 the defaults of a config were the original's, but for how slices are normalised.
_ORIGINAL = from_dict(
    {
        "version": "0.6.0",
        "preprocess": {"normalization": "minmax", "body_thresholds_minmax": ORIGINAL_BODY_THRESHOLDS},
    }
)
_ROBUST_INFECTION = override(
    Config(),
    {
        # In a thick slice the dome of the diaphragm is as grey as ground glass; the slices around tell.
        "preprocess.context_mm": 5.0,
        "model.mirroring": True,
        "model.context_averaging": True,
        "cascade.closing_fraction": 0.125,
        "cascade.start_from_lung": True,
        "augment.lesion_densify_prob": 0.33,
        "augment.lesion_fade_prob": 0.33,
        # Where slices lie far apart, those around say little.
        "augment.context_dropout_prob": 0.5,
        # Less than for the lungs: brightness is what tells ground glass.
        "augment.max_contrast": 0.1,
        "augment.max_brightness": 0.03,
        "augment.max_gamma": 0.2,
        "augment.max_noise": 0.02,
        # Chosen on out-of-fold predictions: low, because lesions end softly, where a lesion is certain somewhere.
        "postprocess.threshold": 0.25,
        "postprocess.min_lesion_probability": 0.95,
        "postprocess.min_lesion_ml": 0.1,
        # In a scan that is surely infected a fainter lesion is more likely true than in another.
        "postprocess.infected_scan_ml": 10.0,
    },
)

RECIPES: dict[RecipeName, dict[Structure, Config]] = {
    "original": {"lung": _ORIGINAL, "infection": _ORIGINAL},
    "robust": {"lung": Config(), "infection": _ROBUST_INFECTION},
}
"""By name and by the structure that is segmented."""


def recipe(name: RecipeName, task: TaskName) -> Config:
    """A recipe for a task.

    "original" is the recipe of the original project; "robust" is meant for scans of other scanners and other patients.

    Raises:
      InputError: there is none of that name.
    """
    if name not in RECIPES:
        raise InputError(f"recipe {name!r}: there is {' and '.join(RECIPES)}")
    structure: Structure = "lung" if task == "lung" else "infection"
    return dataclasses.replace(RECIPES[name][structure], task=task)
