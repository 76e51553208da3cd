"""Named recipes: whole configs to train by, of which any field can be overridden.

Why "robust" is what it is, what was tried and left out, and what is not proven yet, is in BUILD_NOTES.md.
"""

import dataclasses
from typing import Literal

from resunet_jax.config import (
    AugmentConfig,
    Config,
    PredictConfig,
    PreprocessConfig,
    Target,
    TaskName,
    TrainConfig,
    override,
)
from resunet_jax.errors import InputError

RecipeName = Literal["original", "robust"]

DEFAULT_RECIPE: RecipeName = "robust"

ORIGINAL_BODY_THRESHOLDS = (50 / 255, 175 / 255)
"""On each slice's own range: for Coronacases, which are in HU, and for Radiopaedia, which are windowed."""

_ORIGINAL = Config(preprocess=PreprocessConfig(normalization="minmax", body_thresholds_minmax=ORIGINAL_BODY_THRESHOLDS))
_ROBUST = Config(
    preprocess=PreprocessConfig(normalization="air"),
    augment=AugmentConfig(
        vertical_flip=0.0,
        horizontal_flip=0.5,
        quarter_turn=0.0,
        rotation=0.0,
        max_rotation_deg=15.0,
        max_zoom=0.2,
        max_contrast=0.15,
        max_brightness=0.045,
        max_gamma=0.3,
        max_noise=0.03,
    ),
    train=TrainConfig(
        schedule="one_cycle",
        learning_rate=2e-3,
        weight_decay=1e-4,
        loss="bce_pooled_dice",
        patience=60,  # a cycle is not cut short
    ),
    predict=PredictConfig(smallest_region=0.1),
)

RECIPES: dict[RecipeName, dict[Target, Config]] = {
    "original": {"lung": _ORIGINAL, "infection": _ORIGINAL},
    "robust": {
        "lung": _ROBUST,
        "infection": override(
            _ROBUST,
            {
                "model.lung_closing": 0.125,
                "augment.consolidation": 0.33,
                "augment.fading": 0.33,
                # Less than for the lungs: how bright it is is what tells ground glass.
                "augment.max_contrast": 0.1,
                "augment.max_brightness": 0.03,
                "augment.max_gamma": 0.2,
                "augment.max_noise": 0.02,
            },
        ),
    },
}
"""By name and by what is segmented."""


def recipe(name: RecipeName, task: TaskName) -> Config:
    """A recipe for a task.

    "original" is the recipe of the original project; "robust" is meant for scans of other scanners and other patients.

    Raises:
      InputError: there is none of that name.
    """
    if name not in RECIPES:
        raise InputError(f"recipe {name!r}: there is {' and '.join(RECIPES)}")
    target: Target = "lung" if task == "lung" else "infection"
    return dataclasses.replace(RECIPES[name][target], task=task)
