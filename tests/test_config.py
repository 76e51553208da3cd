import dataclasses
import json
import math

import pytest

from resunet_jax import __version__
from resunet_jax.config import (
    ALIASES,
    SETTINGS,
    AugmentConfig,
    CascadeConfig,
    Config,
    ModelConfig,
    PostprocessConfig,
    PreprocessConfig,
    TrainConfig,
    from_dict,
    non_defaults,
    override,
    to_dict,
)
from resunet_jax.errors import InputError
from resunet_jax.recipes import RECIPES, recipe
from tests.conftest import REFERENCE

ANGLES = (-30.0, -18.0, -6.0, 6.0, 18.0, 30.0)
STILL = {"max_rotation_deg": 0.0, "max_scale": 0.0, "max_contrast": 0.0, "max_brightness": 0.0, "max_gamma": 0.0}


def test_json_round_trip() -> None:
    config = Config(
        task="infection",
        preprocess=PreprocessConfig(image_size=64, normalization="minmax", body_threshold_hu=-300),
        model=ModelConfig(filters=(1, 2, 3, 4), dtype="bfloat16"),
        train=TrainConfig(learning_rate=1e-3, loss="bce:1,dice:2", remat=True, accumulate_steps=4),
        lung_fingerprint="abc",
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_files_say_their_version_and_keep_the_keys_of_0_6_0() -> None:
    values = to_dict(override(Config(), {"cascade.closing_fraction": 0.25, "model.patch_grid": 2}))
    assert values["version"] == __version__
    assert values["model"]["lung_closing"] == values["cascade"]["closing_fraction"] == 0.25
    assert values["train"]["patch_factor"] == values["model"]["patch_grid"] == 2
    for old, new in ALIASES.items():
        (section, field), (new_section, new_field) = old.split("."), new.split(".")
        assert values[section][field] == values[new_section][new_field]


def test_a_file_of_0_1_0_means_what_it_meant() -> None:
    config = from_dict(json.loads((REFERENCE / "config_0.1.0.json").read_text()))
    assert config == Config(
        task="infection",
        preprocess=PreprocessConfig(256, "window", -300.0, (), 5),
        model=ModelConfig("resunet", (16, 32, 64, 128), "float32", 2),
        cascade=CascadeConfig(0.0),
        postprocess=PostprocessConfig(0.5, 0.0, "none", 20.0, 0.0, 0.0, 0.0),
        augment=AugmentConfig(
            vertical_flip_prob=0.0,
            horizontal_flip_prob=0.4,
            rot90_prob=0.1,
            rotation_prob=0.3,
            angles_deg=(-10.0, 10.0),
            fill=0.0,
            **STILL,
            max_noise=0.0,
            lesion_densify_prob=0.0,
            lesion_fade_prob=0.0,
            context_dropout_prob=0.0,
            transforms=("spatial", "lesion_intensity", "intensity"),
        ),
        train=TrainConfig(
            batch_size=4,
            epochs=15,
            schedule="step",
            learning_rate=1e-3,
            decay_epochs=20,
            decay_factor=0.1,
            ema_decay=0.0,
            weight_decay=0.0,
            loss="bce:1,dice:1",
            patience=10,
            accumulate_steps=1,
            skip_nonfinite=False,
            remat=False,
            seed=3,
        ),
        lung_fingerprint="0123456789abcdef",
    )


def test_a_file_of_0_6_0_means_what_it_meant() -> None:
    config = from_dict(json.loads((REFERENCE / "config_0.6.0.json").read_text()))
    assert config == Config(
        task="infection",
        preprocess=PreprocessConfig(96, "air", -220.0, (), 5),
        model=ModelConfig("resunet", (4, 8, 16, 32), "float32", 1),
        cascade=CascadeConfig(0.125),
        postprocess=PostprocessConfig(0.5, 0.1, "none", 20.0, 0.0, 0.0, 0.0),
        augment=AugmentConfig(
            vertical_flip_prob=0.0,
            horizontal_flip_prob=0.5,
            rot90_prob=0.0,
            rotation_prob=0.0,
            angles_deg=ANGLES,
            fill=0.0,
            max_rotation_deg=15.0,
            max_scale=0.2,
            max_contrast=0.1,
            max_brightness=0.03,
            max_gamma=0.2,
            max_noise=0.02,
            lesion_densify_prob=0.33,
            lesion_fade_prob=0.33,
            context_dropout_prob=0.0,
            transforms=("spatial", "lesion_intensity", "intensity"),
        ),
        train=TrainConfig(
            batch_size=8,
            epochs=6,
            schedule="one_cycle",
            learning_rate=2e-3,
            decay_epochs=20,
            decay_factor=0.1,
            ema_decay=0.0,
            weight_decay=1e-4,
            loss="bce:1,pooled_dice:1",
            patience=60,
            accumulate_steps=1,
            skip_nonfinite=False,
            remat=False,
            seed=0,
        ),
        lung_fingerprint=config.lung_fingerprint,
    )
    assert len(config.lung_fingerprint) == 16


OLD_DEFAULTS = Config(
    task="lung",
    preprocess=PreprocessConfig(128, "window", -220.0, (), 5),
    model=ModelConfig("resunet", (64, 128, 256, 512), "float32", 1),
    cascade=CascadeConfig(0.0),
    postprocess=PostprocessConfig(0.5, 0.0, "none", 20.0, 0.0, 0.0, 0.0),
    augment=AugmentConfig(
        vertical_flip_prob=0.4,
        horizontal_flip_prob=0.4,
        rot90_prob=0.2,
        rotation_prob=0.3,
        angles_deg=ANGLES,
        fill=0.0,
        **STILL,
        max_noise=0.0,
        lesion_densify_prob=0.0,
        lesion_fade_prob=0.0,
        transforms=("spatial", "lesion_intensity", "intensity"),
    ),
    train=TrainConfig(
        batch_size=8,
        epochs=60,
        schedule="step",
        learning_rate=1e-4,
        decay_epochs=20,
        decay_factor=0.1,
        ema_decay=0.0,
        weight_decay=0.0,
        loss="bce",
        patience=10,
        accumulate_steps=1,
        skip_nonfinite=False,
        remat=False,
        seed=0,
    ),
    lung_fingerprint="",
)
"""What `Config()` was from 0.1.0 to 0.6.0, under today's names."""


def test_a_file_of_the_original_recipe_of_0_6_0_means_what_it_meant() -> None:
    config = from_dict(json.loads((REFERENCE / "config_0.6.0_original.json").read_text()))
    assert config == dataclasses.replace(
        OLD_DEFAULTS,
        preprocess=PreprocessConfig(128, "minmax", -220.0, (50 / 255, 175 / 255), 5),
        model=ModelConfig("resunet", (64, 128, 256, 512), "float32", 2),
        train=dataclasses.replace(OLD_DEFAULTS.train, loss="bce:1,dice:1"),
    )


def test_defaults_of_0_1_0_mean_what_they_meant() -> None:
    assert from_dict(json.loads((REFERENCE / "config_0.1.0_defaults.json").read_text())) == OLD_DEFAULTS
    assert from_dict({}) == OLD_DEFAULTS


OLD_PATHS = [
    f"{section}.{field}"
    for section, fields in json.loads((REFERENCE / "config_0.6.0.json").read_text()).items()
    if isinstance(fields, dict)
    for field in fields
]


@pytest.mark.parametrize("path", OLD_PATHS)
def test_a_field_that_a_file_of_0_6_0_lacks_takes_the_default_of_0_6_0(path: str) -> None:
    values = json.loads((REFERENCE / "config_0.6.0.json").read_text())
    section, _, field = path.partition(".")
    complete = from_dict(values)
    del values[section][field]
    new = ALIASES.get(path, path)
    new_section, _, new_field = new.partition(".")
    default = getattr(getattr(OLD_DEFAULTS, new_section), new_field)
    assert from_dict(values) == override(complete, {new: default})


def test_a_field_that_a_file_of_this_version_lacks_takes_todays_default() -> None:
    values = to_dict(Config())
    del values["augment"], values["train"]["patience"]
    assert from_dict(values) == Config()


def test_two_names_of_a_field_must_agree() -> None:
    values = {"model": {"lung_closing": 0.1}, "cascade": {"closing_fraction": 0.2}}
    with pytest.raises(InputError, match=r"config.json: model\.lung_closing and cascade\.closing_fraction .* differ"):
        from_dict(values, "config.json")
    with pytest.raises(InputError, match=r"flags: augment\.max_zoom and augment\.max_scale .* differ"):
        override(Config(), {"augment.max_scale": 0.1, "augment.max_zoom": 0.3}, "flags")


@pytest.mark.parametrize(("old", "new"), ALIASES.items())
def test_old_and_new_names_change_the_same_field(old: str, new: str) -> None:
    value = 2 if old == "train.patch_factor" else 0.25
    assert override(Config(), {old: value}) == override(Config(), {new: value}) != Config()
    assert override(Config(), {old: value, new: value}) == override(Config(), {new: value})


def test_the_defaults_are_the_default_recipe() -> None:
    assert Config() == recipe("robust", "lung")


@pytest.mark.parametrize("path", SETTINGS)
def test_every_field_is_described_and_its_default_lies_within_its_bounds(path: str) -> None:
    setting = SETTINGS[path]
    assert setting.description
    for value in setting.default if isinstance(setting.default, tuple) else (setting.default,):
        if isinstance(value, int | float):
            assert setting.low is None or value >= setting.low
            assert setting.high is None or value <= setting.high
            assert setting.above is None or value > setting.above


@pytest.mark.parametrize("path", [path for path, setting in SETTINGS.items() if setting.kind is float])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_named(path: str, value: float) -> None:
    with pytest.raises(InputError, match=path.partition(".")[2]):
        override(Config(), {path: value})


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
        ({"train": {"accumulate_steps": 0}}, "accumulate_steps is 0; it must be at least 1"),
        ({"preprocess": 3}, "JSON object"),
        ({"model": {"filters": [1, 2, 3]}}, "four positive numbers"),
        ({"model": {"lung_closing": 17}}, "closing_fraction is 17.0; it must be at most 1"),
        ({"preprocess": {"normalization": "none"}}, "one of window, air, minmax"),
        ({"train": {"patch_factor": 3}}, "multiple of 24"),
        ({"train": {"epochs": 0}}, "epochs"),
        ({"train": {"loss": ""}}, "loss"),
        ({"train": {"learning_rate": 0.0}}, "learning_rate is 0.0; it must be more than 0"),
        ({"train": {"learning_rate": 10**400}}, "learning_rate is inf; it must be a finite number"),
        ({"train": {"epochs": 10**400}}, "it must be a finite number"),
        ({"preprocess": {"body_thresholds_minmax": [0.3, 1.0]}}, "two numbers between 0 and 1"),
        ({"augment": {"rotation": 1.5}}, "rotation_prob is 1.5; it must be at most 1"),
        ({"augment": {"consolidation": 0.6, "fading": 0.5}}, "denser or fainter"),
        ({"task": "liver"}, "task"),
    ],
)
def test_bad_values_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_dict(change, "config.json")


def test_bounds_themselves_are_allowed() -> None:
    bounds = {"preprocess.context_mm": 50.0, "postprocess.min_component_fraction": 1.0, "augment.rot90_prob": 0.0}
    assert non_defaults(override(Config(), bounds)) == {
        "preprocess.context_mm": 50.0,
        "postprocess.min_component_fraction": 1.0,
    }


def test_slices_with_context_can_come_from_a_lung_model_without() -> None:
    with_context, without = PreprocessConfig(context_mm=5.0), PreprocessConfig()
    assert without.can_feed(with_context)
    assert without.can_feed(without)
    assert not with_context.can_feed(without)
    assert not PreprocessConfig(normalization="window").can_feed(with_context)


def test_override_changes_what_it_names_and_nothing_else() -> None:
    changed = override(
        Config(task="infection"), {"train.loss": "dice", "augment.max_zoom": 0.3, "model.filters": [1, 2, 3, 4]}
    )
    assert (changed.train.loss, changed.augment.max_scale, changed.model.filters) == ("dice", 0.3, (1, 2, 3, 4))
    back = {"train.loss": "bce_pooled_dice", "augment.max_scale": 0.2, "model.filters": (64, 128, 256, 512)}
    assert override(changed, back) == Config(task="infection")


def test_changed_fields_are_all_that_it_takes() -> None:
    assert non_defaults(Config()) == {}
    changed = Config(task="infection", train=TrainConfig(seed=3), model=ModelConfig(filters=(1, 2, 3, 4)))
    assert non_defaults(changed) == {"task": "infection", "train.seed": 3, "model.filters": [1, 2, 3, 4]}
    for config in (recipe(name, task) for name in RECIPES for task in ("lung", "infection")):
        assert override(Config(), non_defaults(config)) == config


def test_a_list_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match=r"model\.filters is '4,8'; expected a list of int, as in \[1, 2\]"):
        override(Config(), {"model.filters": "4,8"})


def test_a_file_of_a_newer_version_is_named() -> None:
    with pytest.raises(
        InputError, match=r"config, which resunet_jax 99\.0\.0 has written, a newer one than this: there"
    ):
        from_dict({"version": "99.0.0", "train": {"later": 1}})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("augment.max_zom", r"flags: there is no augment\.max_zom; there are augment\.vertical_flip_prob, "),
        ("epochs", "flags: there is no epochs; there are task, "),
        ("train", "flags: train is a section; name the field that changes, as in train.loss"),
        ("augmentation.max_zoom", r"flags: there is no augmentation\.max_zoom"),
        ("task.name", r"flags: there is no task\.name"),
        ("train.loss", r"flags: train\.loss is 0\.3; expected str"),
        ("augment.consolidation", "lesion_densify_prob is 3"),
    ],
)
def test_a_bad_override_is_named(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(Config(), {path: 3.0 if "consolidation" in path else 0.3}, "flags")
