import dataclasses
import json

import pytest

from resunet_jax.config import (
    Config,
    ModelConfig,
    PreprocessConfig,
    TrainConfig,
    changed_fields,
    from_dict,
    override,
    to_dict,
)
from resunet_jax.errors import InputError
from resunet_jax.recipes import RECIPES, recipe


def test_json_round_trip() -> None:
    config = Config(
        task="infection",
        preprocess=PreprocessConfig(image_size=64, normalization="minmax", body_threshold_hu=-300),
        model=ModelConfig(filters=(1, 2, 3, 4), dtype="bfloat16"),
        train=TrainConfig(learning_rate=1e-3, loss="bce_dice", remat=True, accumulate_steps=4),
        lung_fingerprint="abc",
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_tuple_is_as_good_as_a_list() -> None:
    assert override(Config(), {"model.filters": (1, 2, 3, 4)}).model.filters == (1, 2, 3, 4)


def test_missing_fields_take_their_defaults() -> None:
    values = to_dict(Config())
    del values["augment"], values["train"]["patience"]
    assert from_dict(values) == Config()


def test_configs_are_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().task = "infection"  # type: ignore[misc]
    assert hash(Config()) == hash(Config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"preprocess": {"image_size": 100}}, "multiple of 8"),
        ({"preprocess": {"image_size": "128"}}, "expected int"),
        ({"preprocess": {"image_size": True}}, "expected int"),
        ({"train": {"remat": 1}}, "expected bool"),
        ({"train": {"accumulate_steps": 0}}, "accumulate_steps"),
        ({"preprocess": 3}, "JSON object"),
        ({"model": {"filters": [1, 2, 3]}}, "four positive numbers"),
        ({"model": {"lung_closing": 17}}, "lung_closing is 17.0; it must be a part"),
        ({"preprocess": {"normalization": "none"}}, "one of window, air, minmax"),
        ({"train": {"patch_factor": 3}}, "multiple of 24"),
        ({"train": {"epochs": 0}}, "epochs"),
        ({"train": {"loss": "mse"}}, "loss"),
        ({"augment": {"rotation": 1.5}}, "probability"),
        ({"augment": {"consolidation": 0.6, "fading": 0.5}}, "denser or fainter"),
        ({"task": "liver"}, "task"),
    ],
)
def test_bad_values_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_dict(change, "config.json")


def test_override_changes_what_it_names_and_nothing_else() -> None:
    changed = override(
        Config(task="infection"), {"train.loss": "dice", "augment.max_zoom": 0.3, "model.filters": [1, 2, 3, 4]}
    )
    assert (changed.train.loss, changed.augment.max_zoom, changed.model.filters) == ("dice", 0.3, (1, 2, 3, 4))
    assert override(
        changed, {"train.loss": "bce", "augment.max_zoom": 0, "model.filters": [64, 128, 256, 512]}
    ) == Config(task="infection")


def test_changed_fields_are_all_that_it_takes() -> None:
    assert changed_fields(Config()) == {}
    changed = Config(task="infection", train=TrainConfig(seed=3), model=ModelConfig(filters=(1, 2, 3, 4)))
    assert changed_fields(changed) == {"task": "infection", "train.seed": 3, "model.filters": [1, 2, 3, 4]}
    for config in (recipe(name, task) for name in RECIPES for task in ("lung", "infection")):
        assert override(Config(), changed_fields(config)) == config


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("augment.max_zom", r"flags: unknown field augment\.max_zom"),
        ("augmentation.max_zoom", r"flags: there is no augmentation\.max_zoom"),
        ("task.name", r"flags: there is no task\.name"),
        ("train.loss", r"flags: train\.loss is 0\.3; expected str"),
        ("augment.consolidation", "consolidation is 3"),
    ],
)
def test_a_bad_override_is_named(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(Config(), {path: 3.0 if "consolidation" in path else 0.3}, "flags")
