import dataclasses

import numpy as np
import pytest

from resunet_jax.config import Config
from resunet_jax.errors import InputError
from resunet_jax.recipes import RECIPES, recipe
from resunet_jax.studies.variants import ALIASES, VARIANTS, Variant, find_variants


def test_variants_are_found_by_name_each_once() -> None:
    assert find_variants([]) == list(VARIANTS)
    names = ["original", "robust", "original"]
    assert [variant.name for variant in find_variants(names)] == ["original", "robust"]
    with pytest.raises(InputError, match=r"variant 'nothing': .* there are robust, original"):
        find_variants(["nothing"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("infection: lung probability as it comes", "infection: unprocessed lung probability"),
        ("infection: no lesions made denser", "infection: no densified lesions"),
        ("infection: no lesions made fainter", "infection: no faded lesions"),
        ("infection: Dice of each slice", "infection: per-slice Dice"),
        ("infection: the original's moves", "infection: the original's spatial augmentation"),
        ("infection: grey values as they are", "infection: no intensity augmentation"),
        ("lung: the original's moves", "lung: the original's spatial augmentation"),
        ("lung: grey values as they are", "lung: no intensity augmentation"),
        ("lung: small regions stay", "lung: all components kept"),
        ("both: air where the file has it", "both: no air calibration"),
        ("infection: cross-entropy alone", "infection: cross-entropy alone"),
    ],
)
def test_names_of_0_6_0_are_known(old: str, new: str) -> None:
    (variant,) = find_variants([old, new])
    assert variant.name == new


def test_every_alias_leads_to_a_variant() -> None:
    assert set(ALIASES.values()) <= {variant.name.rpartition(": ")[2] for variant in VARIANTS}


def test_every_variant_is_a_valid_config_and_differs_from_the_others() -> None:
    assert len({tuple(variant.configs({}, 0).values()) for variant in VARIANTS}) == len(VARIANTS)
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def test_a_variant_overrides_the_changes_of_its_study() -> None:
    variant = Variant("mine", lung={"train.epochs": 2}, infection={"train.loss": "bce:1"})
    configs = variant.configs({"train.epochs": 5, "train.seed": 9}, seed=3)
    assert [config.train.epochs for config in configs.values()] == [2, 5]
    assert [config.train.seed for config in configs.values()] == [3, 3]
    assert configs["infection"] == dataclasses.replace(
        recipe("robust", "infection"),
        train=dataclasses.replace(recipe("robust", "infection").train, epochs=5, loss="bce:1", seed=3),
    )
    assert set(Variant("lung alone", infection=None).configs({}, 0)) == {"lung"}
    with pytest.raises(InputError, match=r"variant 'mine': there is no train\.epoch;"):
        variant.configs({"train.epoch": 5}, seed=3)


def test_recipes() -> None:
    original, robust = (recipe(name, "infection") for name in RECIPES)
    assert original.task == robust.task == "infection"
    assert recipe("robust", "lung") == Config()
    assert original.preprocess.normalization == "minmax"
    assert robust != original
    with pytest.raises(InputError, match="original and robust"):
        recipe("best", "lung")  # type: ignore[arg-type]
    np.testing.assert_allclose(original.preprocess.body_thresholds_minmax, (50 / 255, 175 / 255))
