import dataclasses
from functools import partial

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resunet_jax.config import AugmentConfig, CascadeConfig, Config, ModelConfig, PreprocessConfig, TrainConfig
from resunet_jax.metrics.overlap import COUNTS
from resunet_jax.model.build import ARCHITECTURES, build_model
from resunet_jax.model.cascade import cascade
from resunet_jax.model.resunet import ResUnet, init_variables
from resunet_jax.model.winograd import conv_general_dilated
from resunet_jax.recipes import recipe
from resunet_jax.training.augment import AUGMENTATIONS
from resunet_jax.training.losses import LOSSES, make_loss, mean_over_examples
from resunet_jax.training.step import (
    _pixel_counts,
    create_state,
    frozen_lung,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
    transfer,
    update_average,
)
from resunet_jax.weights.store import variable_shapes

PLAIN = TrainConfig(batch_size=4, learning_rate=1e-2, schedule="step", loss="bce", weight_decay=0.0)
CONFIG = Config(
    preprocess=PreprocessConfig(image_size=16),
    model=ModelConfig(filters=(2, 4, 4, 8)),
    augment=AugmentConfig(transforms=()),
    train=PLAIN,
)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def batch():
    image = jax.random.uniform(jax.random.key(1), (4, 16, 16, 1))
    mask = (image > 0.6).astype(jnp.uint8)
    return {"image": image, "mask": mask, "valid": jnp.ones(4, bool), "index": jnp.arange(4)}


@pytest.fixture(scope="module")
def step():
    optimizer = make_optimizer(CONFIG, 10)
    return jax.jit(make_train_step(CONFIG, optimizer)), create_state(CONFIG, optimizer)


def test_one_step_is_adam_on_the_mean_loss(step, batch) -> None:
    train_step, state = step
    after, metrics = train_step(state, batch, KEY, None)
    model, target = build_model(CONFIG), batch["mask"].astype(jnp.float32)

    def loss(params):
        variables = {**state.variables, "params": params}
        logits, _ = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        return optax.sigmoid_binary_cross_entropy(logits, target).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.variables["params"])
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    optimizer = optax.adam(1e-2)
    updates, _ = optimizer.update(gradient, optimizer.init(state.variables["params"]))
    expected = optax.apply_updates(state.variables["params"], updates)["output_conv"]["kernel"]
    np.testing.assert_allclose(after.variables["params"]["output_conv"]["kernel"], expected, atol=1e-6)
    assert int(after.step) == 1
    assert sum(float(metrics[name]) for name in COUNTS) == 4 * 16 * 16


def test_learns(step, batch) -> None:
    train_step, state = step
    losses = []
    for _ in range(30):
        state, metrics = train_step(state, batch, KEY, None)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]


def test_same_state_same_key_same_bytes(step, batch) -> None:
    train_step, state = step
    first, again = (train_step(state, batch, KEY, None)[0] for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_randomness_comes_from_key_and_step(batch) -> None:
    config = dataclasses.replace(CONFIG, augment=recipe("original", "lung").augment)
    optimizer = make_optimizer(config, 10)
    train_step, state = jax.jit(make_train_step(config, optimizer)), create_state(config, optimizer)
    losses = {
        (key, at): float(train_step(state.replace(step=jnp.int32(at)), batch, jax.random.key(key), None)[1]["loss"])
        for key in (0, 1)
        for at in (0, 1)
    }
    assert len(set(losses.values())) == 4
    assert losses[0, 1] == float(
        train_step(state.replace(step=jnp.int32(1)), batch, jax.random.key(0), None)[1]["loss"]
    )


def test_vmap_over_stacked_states_is_the_members_one_by_one(batch) -> None:
    optimizer = optax.sgd(0.1)  # Adam makes whole steps of what is nothing but rounding
    states = [
        create_state(dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, seed=s)), optimizer)
        for s in (0, 1)
    ]
    keys = jax.random.split(KEY, 2)
    train_step = make_train_step(CONFIG, optimizer)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together, metrics = jax.jit(jax.vmap(train_step, in_axes=(0, None, 0, None)))(stacked, batch, keys, None)
    one_by_one = jax.jit(train_step)
    for member, (state, key) in enumerate(zip(states, keys, strict=True)):
        alone, alone_metrics = one_by_one(state, batch, key, None)
        np.testing.assert_allclose(metrics["loss"][member], alone_metrics["loss"], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[member], b, atol=1e-5)


def test_learning_rate_falls_by_epochs() -> None:
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(PLAIN, learning_rate=1.0, decay_epochs=2))
    optimizer = make_optimizer(config, steps_per_epoch=3)
    params, gradient = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    state, sizes = optimizer.init(params), []
    for _ in range(13):
        update, state = optimizer.update(gradient, state, params)
        sizes.append(abs(float(update["w"])))
    np.testing.assert_allclose(sizes, [1.0] * 6 + [0.1] * 6 + [0.01], rtol=1e-3)


def test_one_cycle_rises_and_falls_over_all_steps() -> None:
    train = dataclasses.replace(PLAIN, schedule="one_cycle", learning_rate=1.0, epochs=10)
    rate = make_schedule(dataclasses.replace(CONFIG, train=train), steps_per_epoch=10)
    rates = [float(rate(step)) for step in range(101)]
    np.testing.assert_allclose([rates[0], rates[15], rates[100]], [0.1, 1.0, 1e-3], rtol=1e-4)
    assert np.all(np.diff(rates[:16]) > 0)
    assert np.all(np.diff(rates[15:]) < 0)
    half_way = 15 + 85 // 2
    np.testing.assert_allclose(rates[half_way], 0.5, atol=0.02)  # a cosine is symmetric


@pytest.mark.parametrize("schedule", ["one_cycle", "step"])
def test_any_number_of_epochs_has_a_rate(schedule: str) -> None:
    """Also one whose updates no counter of the device can count."""
    train = dataclasses.replace(PLAIN, schedule=schedule, epochs=10**20, decay_epochs=10**20)
    rate = make_schedule(dataclasses.replace(CONFIG, train=train), steps_per_epoch=10)
    assert np.isfinite(float(rate(5)))


def test_weight_decay_is_decoupled() -> None:
    """What AdamW takes off does not pass through Adam's moments: with no gradient it is rate · decay · weight."""
    train = dataclasses.replace(PLAIN, learning_rate=0.1, weight_decay=0.01)
    optimizer = make_optimizer(dataclasses.replace(CONFIG, train=train), steps_per_epoch=10)
    params = {"w": jnp.array([2.0, -3.0])}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.002, 0.003], rtol=1e-6)


def test_accumulated_steps_are_one_update_by_the_mean_gradient(batch) -> None:
    train = dataclasses.replace(CONFIG.train, accumulate_steps=2)
    config = dataclasses.replace(CONFIG, train=train)
    optimizer = make_optimizer(config, 10)
    train_step, state = jax.jit(make_train_step(config, optimizer)), create_state(config, optimizer)
    other = {**batch, "image": 1 - batch["image"]}
    before = state.variables["params"]

    @jax.jit
    def gradient(batch_stats, batch):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, _ = build_model(config).apply(variables, batch["image"], train=True, mutable=["batch_stats"])
            return optax.sigmoid_binary_cross_entropy(logits, batch["mask"].astype(jnp.float32)).mean()

        return jax.grad(loss)(before)

    once, _ = train_step(state, batch, KEY, None)
    jax.tree.map(np.testing.assert_array_equal, once.variables["params"], before)
    twice, _ = train_step(once, other, KEY, None)
    mean = jax.tree.map(
        lambda a, b: (a + b) / 2,
        gradient(state.variables["batch_stats"], batch),
        gradient(once.variables["batch_stats"], other),
    )
    adam = optax.adam(1e-2)
    updates, _ = adam.update(mean, adam.init(before))
    expected = optax.apply_updates(before, updates)
    for name in ("output_conv", "input_skip"):
        np.testing.assert_allclose(twice.variables["params"][name]["kernel"], expected[name]["kernel"], atol=1e-5)
    assert int(twice.step) == 2


def test_learning_rate_falls_by_epochs_of_updates() -> None:
    train = dataclasses.replace(PLAIN, learning_rate=1.0, decay_epochs=2, accumulate_steps=3)
    optimizer = make_optimizer(dataclasses.replace(CONFIG, train=train), steps_per_epoch=6)
    params, gradient = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    state, sizes = optimizer.init(params), []
    for _ in range(15):
        update, state = optimizer.update(gradient, state, params)
        sizes.append(abs(float(update["w"])))
    np.testing.assert_allclose(sizes, [0, 0, 1.0] * 4 + [0, 0, 0.1], rtol=1e-3)


def test_remat_and_the_fast_convolution_give_the_same_gradient(batch) -> None:
    config = dataclasses.replace(CONFIG, model=ModelConfig(filters=(16, 16, 24, 32)))
    model = build_model(config)
    variables = init_variables(model, jax.random.key(0))

    def gradient(model):
        def loss(params):
            logits, _ = model.apply(
                {**variables, "params": params}, batch["image"], train=True, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.sin(logits))

        return jax.jit(jax.grad(loss))(variables["params"])

    plain = gradient(model)
    norm = optax.tree.norm(plain)
    for other in (model.clone(remat=True), build_model(config, conv_general_dilated)):
        difference = jax.tree.map(jnp.subtract, plain, gradient(other))
        assert float(optax.tree.norm(difference) / norm) < 1e-5


def test_remat_computes_each_residual_block_again() -> None:
    def barriers(remat: bool) -> int:
        model = ResUnet(1, (2, 4, 4, 8), remat=remat)
        x = jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.float32)

        def loss(variables, x):
            return model.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

        return jax.jit(jax.grad(loss)).lower(variable_shapes(model), x).as_text().count("optimization_barrier")

    assert (barriers(remat=False), barriers(remat=True)) == (0, 6)


def test_a_step_of_infinite_loss_is_left_out_though_its_gradient_is_finite(batch) -> None:
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(PLAIN, loss="bce:1,bad:1", skip_nonfinite=True))
    bad = mean_over_examples(lambda logits, mask: jnp.full(len(logits), jnp.inf))
    optimizer = make_optimizer(config, 10)
    step, state = make_train_step(config, optimizer, losses=LOSSES | {"bad": bad}), create_state(config, optimizer)
    after, metrics = jax.jit(step)(state, batch, KEY, None)
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, after.variables, state.variables)


def test_bfloat16_keeps_the_state_in_float32(batch) -> None:
    config = dataclasses.replace(CONFIG, model=ModelConfig(filters=(2, 4, 4, 8), dtype="bfloat16"))
    optimizer = make_optimizer(config, 10)
    after, metrics = jax.jit(make_train_step(config, optimizer))(create_state(config, optimizer), batch, KEY, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.variables)} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    assert np.isfinite(metrics["loss"])


def test_pixel_counts_closed_form() -> None:
    logits = jnp.array([1.0, 1.0, -1.0, -1.0, 0.0]).reshape(1, 1, 5, 1)
    target = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0]).reshape(1, 1, 5, 1)
    counts = {name: value.tolist() for name, value in _pixel_counts(logits, target).items()}
    assert counts == {"tp": [1], "fp": [1], "fn": [1], "tn": [2]}


def test_evaluation_ignores_padding(batch) -> None:
    eval_step = jax.jit(make_eval_step(CONFIG))
    variables = init_variables(build_model(CONFIG), jax.random.key(0))
    padded = {**batch, "image": batch["image"].at[3].set(9.0), "valid": jnp.array([True, True, True, False])}
    sums = eval_step(variables, padded, None)
    one_by_one = [eval_step(variables, {**batch, "valid": jnp.arange(4) == i}, None) for i in range(3)]
    added = jax.tree.map(lambda *values: sum(values), *one_by_one)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), sums, added)
    assert float(sums["loss"]["bce"]["examples"]) == 3
    assert sum(float(sums[name]) for name in COUNTS) == 3 * 16 * 16


def test_infection_step_sees_lung_probability_and_leaves_the_lung_alone(batch) -> None:
    config = dataclasses.replace(CONFIG, task="infection")
    optimizer = make_optimizer(config, 10)
    lung_variables = init_variables(build_model(CONFIG), jax.random.key(3))
    other_lung = init_variables(build_model(CONFIG), jax.random.key(4))
    train_step = jax.jit(make_train_step(config, optimizer, frozen_lung(CONFIG)))
    state = create_state(config, optimizer)
    after, metrics = train_step(state, batch, KEY, lung_variables)
    assert after.variables["params"]["input_conv1"]["kernel"].shape == (3, 3, 2, 2)
    assert float(metrics["loss"]) != float(train_step(state, batch, KEY, other_lung)[1]["loss"])
    closed_config = dataclasses.replace(config, cascade=CascadeConfig(closing_fraction=0.25))
    closed_step = jax.jit(make_train_step(closed_config, optimizer, frozen_lung(CONFIG)))
    assert float(metrics["loss"]) != float(closed_step(state, batch, KEY, lung_variables)[1]["loss"])
    with pytest.raises(ValueError, match="give it a lung model"):
        train_step(state, batch, KEY, None)
    with pytest.raises(ValueError, match="lung"):
        frozen_lung(config)


def test_evaluation_of_the_infection_sees_what_the_cascade_does(batch) -> None:
    config = dataclasses.replace(CONFIG, task="infection", cascade=CascadeConfig(closing_fraction=0.25))
    lung, infection = build_model(CONFIG), build_model(config)
    lung_variables, variables = (init_variables(model, jax.random.key(3)) for model in (lung, infection))
    sums = jax.jit(make_eval_step(config, frozen_lung(CONFIG)))(variables, batch, lung_variables)
    assert infection.closing_fraction == 0.25
    _, probability = jax.jit(cascade, static_argnums=(0, 1))(lung, infection, lung_variables, variables, batch["image"])
    target = batch["mask"].astype(jnp.float32)
    loss = -jnp.mean(target * jnp.log(probability) + (1 - target) * jnp.log1p(-probability))
    np.testing.assert_allclose(make_loss("bce").value(sums["loss"]), loss, rtol=1e-5)


def test_training_on_patches_counts_every_pixel_once(batch) -> None:
    model = dataclasses.replace(CONFIG.model, patch_grid=2)
    config = dataclasses.replace(CONFIG, task="infection_ct", model=model)
    optimizer = make_optimizer(config, 10)
    _, metrics = jax.jit(make_train_step(config, optimizer))(create_state(config, optimizer), batch, KEY, None)
    assert np.isfinite(metrics["loss"])
    assert sum(float(metrics[name]) for name in COUNTS) == 4 * 16 * 16


def test_training_and_evaluation_have_the_loss_of_the_config(batch) -> None:
    """Of weighted terms: in one batch, the evaluation's sums give the same value as the training step's."""
    terms = "bce:1,pooled_dice:0.5"
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(PLAIN, loss=terms))
    optimizer = make_optimizer(config, 10)
    state = create_state(config, optimizer)
    _, metrics = jax.jit(make_train_step(config, optimizer))(state, batch, KEY, None)
    apply = jax.jit(build_model(config).apply, static_argnames=("train", "mutable"))
    logits, _ = apply(state.variables, batch["image"], train=True, mutable="batch_stats")
    loss, target = make_loss(terms), batch["mask"].astype(jnp.float32)
    np.testing.assert_allclose(metrics["loss"], loss.value(loss.sums(logits, target, jnp.ones(4))), rtol=1e-5)
    sums = jax.jit(make_eval_step(config))(state.variables, batch, None)
    logits = apply(state.variables, batch["image"], train=False)
    np.testing.assert_allclose(loss.value(sums["loss"]), loss.value(loss.sums(logits, target, jnp.ones(4))), rtol=1e-5)


def test_rows_that_are_added_to_the_tables_are_used(batch) -> None:
    losses = LOSSES | {"toy": mean_over_examples(lambda logits, mask: jnp.mean(mask + 0 * logits, axis=(1, 2, 3)))}
    augmentations = AUGMENTATIONS | {"toy": lambda key, image, mask, config: (image, jnp.ones_like(mask))}
    built = []

    def architecture(config, convolution):
        built.append(config.model.architecture)
        return ARCHITECTURES["resunet"](config, convolution)

    architectures = ARCHITECTURES | {"toy": architecture}
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, architecture="toy"),
        augment=AugmentConfig(transforms=("toy",)),
        train=dataclasses.replace(PLAIN, loss="toy:3"),
    )
    optimizer = make_optimizer(config, 10)
    state = create_state(config, optimizer, architectures)
    step = make_train_step(config, optimizer, losses=losses, augmentations=augmentations, architectures=architectures)
    _, metrics = jax.jit(step)(state, batch, KEY, None)
    assert float(metrics["loss"]) == 3  # of a mask of ones
    assert float(metrics["tp"] + metrics["fn"]) == 4 * 16 * 16
    eval_step = jax.jit(make_eval_step(config, losses=losses, architectures=architectures))
    sums = eval_step(state.variables, batch, None)
    np.testing.assert_allclose(sums["loss"]["toy"]["total"], 4 * batch["mask"].mean(), rtol=1e-5)
    assert built == ["toy"] * 3


def test_the_average_follows_the_variables_by_the_closed_form() -> None:
    decay, values = 0.5, (3.0, 5.0, -2.0)
    average, expected = {"w": jnp.float32(1)}, 1.0
    for step, value in enumerate(values, start=20):  # late enough for the decay to be the config's
        average = update_average(average, {"w": jnp.float32(value)}, jnp.int32(step), decay)
        expected = decay * expected + (1 - decay) * value
    np.testing.assert_allclose(average["w"], expected, rtol=1e-6)
    first = update_average({"w": jnp.float32(1)}, {"w": jnp.float32(11)}, jnp.int32(0), 0.99)
    np.testing.assert_allclose(first["w"], 0.1 * 1 + 0.9 * 11, rtol=1e-6)
    accumulated = {"w": jnp.float32(1)}
    for step in range(400, 404):  # one update in four steps
        accumulated = update_average(accumulated, {"w": jnp.float32(3)}, jnp.int32(step), decay, accumulate_steps=4)
    np.testing.assert_allclose(accumulated["w"], 0.5 * 1 + 0.5 * 3, rtol=1e-6)


def test_the_model_is_the_average_of_the_variables(batch) -> None:
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(PLAIN, ema_decay=0.5))
    optimizer = make_optimizer(config, 10)
    step = jax.jit(make_train_step(config, optimizer), donate_argnums=0)
    state = create_state(config, optimizer)
    expected = jax.tree.map(np.asarray, state.variables)
    for number in range(3):
        state, _ = step(state, batch, jax.random.key(1), None)
        kept = min(0.5, (1 + number) / (10 + number))
        expected = jax.tree.map(
            lambda old, new, kept=kept: kept * old + (1 - kept) * np.asarray(new), expected, state.variables
        )
    for found, own in zip(jax.tree.leaves(state.model_variables), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-6)
    kernel = state.variables["params"]["output_conv"]["kernel"]
    assert not np.allclose(kernel, state.model_variables["params"]["output_conv"]["kernel"])
    plain = create_state(dataclasses.replace(config, train=dataclasses.replace(PLAIN, ema_decay=0)), optimizer)
    assert plain.model_variables is plain.variables


def test_a_trained_model_starts_one_with_further_channels() -> None:
    """Where the further channels are 0, both give the same."""
    lung, infection = (ResUnet(channels, filters=(2, 4, 4, 8)) for channels in (1, 4))
    source, fresh = init_variables(lung, jax.random.key(0)), init_variables(infection, jax.random.key(1))
    started = transfer(source, fresh)
    image = jax.random.uniform(jax.random.key(2), (2, 16, 16, 1))
    further = jnp.zeros((2, 16, 16, 3))
    apply = jax.jit(lambda model, variables, x: model.apply(variables, x, train=False), static_argnums=0)
    found = apply(infection, started, jnp.concatenate([image, further], axis=-1))
    np.testing.assert_allclose(found, apply(lung, source, image), rtol=1e-5, atol=1e-6)
    for layer in ("input_conv1", "input_skip"):
        kernel = started["params"][layer]["kernel"]
        np.testing.assert_array_equal(kernel[:, :, 1:], fresh["params"][layer]["kernel"][:, :, 1:])
    other = init_variables(ResUnet(1, filters=(2, 4, 8, 8)), jax.random.key(0))
    assert transfer(other, fresh) is fresh
    halves = transfer(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), source), fresh)
    assert {leaf.dtype for leaf in jax.tree.leaves(halves)} == {jnp.dtype("float32")}


def test_a_training_begins_with_variables_of_any_mapping() -> None:
    initial = init_variables(build_model(CONFIG), jax.random.key(5))
    state = create_state(CONFIG, make_optimizer(CONFIG, 10), initial_variables=flax.core.freeze(initial))
    jax.tree.map(np.testing.assert_array_equal, state.variables, initial)


@pytest.mark.parametrize("starts", [True, False])
def test_an_infection_training_starts_from_the_lung_model_where_its_config_says_so(starts: bool) -> None:
    config = dataclasses.replace(CONFIG, task="infection", cascade=CascadeConfig(start_from_lung=starts))
    optimizer = make_optimizer(config, 10)
    lung = init_variables(build_model(CONFIG), jax.random.key(5))
    state = create_state(config, optimizer, lung_variables=lung)
    kernels = [tree["params"]["output_conv"]["kernel"] for tree in (state.variables, state.model_variables, lung)]
    assert [np.array_equal(kernel, kernels[2]) for kernel in kernels[:2]] == [starts, starts]
