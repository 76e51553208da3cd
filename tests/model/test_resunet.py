import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resunet_jax.errors import InputError
from resunet_jax.model.resunet import ResUnet, init_variables
from resunet_jax.weights.torch import params_from_state_dict
from tests.conftest import REFERENCE

NARROW = (4, 8, 16, 32)


def reference(channels: int) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "resunet_narrow.npz") as arrays:
        prefix = f"in{channels}/"
        return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def subtree(arrays: dict[str, np.ndarray], name: str) -> dict:
    return params_from_state_dict(
        {k.removeprefix(f"{name}/"): v for k, v in arrays.items() if k.startswith(f"{name}/")}
    )


@partial(jax.jit, static_argnums=0)
def apply_eval(model: ResUnet, variables: dict, x: jax.Array) -> jax.Array:
    return model.apply(variables, x, train=False)


def nhwc(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("channels", "expected"), [(1, 13_040_705), (2, 13_041_857)])
def test_parameter_count(channels: int, expected: int) -> None:
    model = ResUnet(channels)
    x = jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == expected


@pytest.mark.parametrize("channels", [1, 2])
def test_agrees_with_the_original(channels: int) -> None:
    ref = reference(channels)
    model, variables = ResUnet(channels, NARROW), subtree(ref, "state_dict")
    x, target = nhwc(ref["x_nchw"]), nhwc(ref["target_nchw"])
    probability = jax.nn.sigmoid(apply_eval(model, variables, x))
    np.testing.assert_allclose(probability, nhwc(ref["prob_eval_nchw"]), atol=1e-5, rtol=0)

    def loss(params):
        state = {**variables, "params": params}
        logits, updates = model.apply(state, x, train=True, mutable=["batch_stats"])
        return optax.sigmoid_binary_cross_entropy(logits, target).mean(), (logits, updates["batch_stats"])

    (value, (logits, batch_stats)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    np.testing.assert_allclose(jax.nn.sigmoid(logits), nhwc(ref["prob_train_nchw"]), atol=1e-5, rtol=0)
    np.testing.assert_allclose(value, ref["bce_train"], atol=1e-6, rtol=0)

    expected = subtree(ref, "grad")["params"]
    after = subtree(ref, "after_adam_1e-4")
    optimizer = optax.adam(1e-4)
    updates, _ = optimizer.update(gradient, optimizer.init(variables["params"]))
    stepped = optax.apply_updates(variables["params"], updates)
    leaves = zip(*(jax.tree.leaves(tree) for tree in (gradient, expected, stepped, after["params"])), strict=True)
    for ours, theirs, moved, theirs_moved in leaves:
        # A convolution's bias before a normalisation has a gradient of 0: what is there is rounding, and Adam turns
        # rounding into whole steps.
        if np.abs(theirs).max() > 1e-6:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
            np.testing.assert_allclose(moved, theirs_moved, rtol=0, atol=5e-6)
        else:
            assert np.abs(ours).max() < 1e-6

    # Their running variance is of the unbiased estimate, ours of the biased one: apart by n / (n - 1).
    n_by_level = {f: x.shape[0] * x.shape[1] * x.shape[2] // 4**level for level, f in enumerate(NARROW)}
    for path, ours in jax.tree_util.tree_leaves_with_path(batch_stats):
        names = [entry.key for entry in path]
        before, theirs = variables["batch_stats"], after["batch_stats"]
        for name in names:
            before, theirs = before[name], theirs[name]
        if names[-1] == "mean":
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
        else:
            n = n_by_level[_level(names[:-1])]
            batch_variance = (np.asarray(ours) - 0.9 * before) / 0.1 * n / (n - 1)
            np.testing.assert_allclose(0.9 * before + 0.1 * batch_variance, theirs, atol=2e-6, rtol=1e-5)


def _level(layer: list[str]) -> int:
    """The filter count of the resolution at which a norm stands."""
    if layer[0] == "input_norm":
        return NARROW[0]
    deep = {"residual_conv_1": 1, "residual_conv_2": 2, "bridge": 3}
    if layer[0] in deep:
        return NARROW[deep[layer[0]] - (layer[1] == "norm1")]
    return NARROW[{"up_residual_conv1": 2, "up_residual_conv2": 1, "up_residual_conv3": 0}[layer[0]]]


def test_missing_weights_are_named() -> None:
    with pytest.raises(InputError, match=r"input_layer\.0\.weight"):
        params_from_state_dict({})


def test_initialisation_is_uniform_within_pytorchs_bound() -> None:
    params = init_variables(ResUnet(2, (8, 8, 8, 8)), jax.random.key(0))["params"]
    kernel, bias = params["input_conv1"]["kernel"], params["input_conv1"]["bias"]
    bound = 1 / np.sqrt(3 * 3 * 2)
    for values in (kernel, bias):
        assert 0.5 * bound < np.abs(values).max() <= bound
    upsample = params["upsample_1"]["kernel"]
    assert 0.9 / np.sqrt(32) < np.abs(upsample).max() <= 1 / np.sqrt(32)
    np.testing.assert_array_equal(params["input_norm"]["scale"], 1)


def test_initialisation_under_vmap_is_that_of_each_key() -> None:
    model, keys = ResUnet(1, (2, 2, 2, 2)), jax.random.split(jax.random.key(0), 2)
    stacked = jax.jit(jax.vmap(lambda key: init_variables(model, key)))(keys)
    for member, key in enumerate(keys):
        alone = init_variables(model, key)
        jax.tree.map(lambda a, b, i=member: np.testing.assert_allclose(a[i], b, rtol=1e-6), stacked, alone)


@pytest.mark.parametrize(
    "key", [jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3)), jax.random.key(3, impl="rbg")]
)
def test_any_kind_of_key_initialises_and_under_a_jit_of_other_arguments_too(key: jax.Array) -> None:
    model = ResUnet(1, (2, 2, 2, 2))
    x = jnp.ones((1, 16, 16, 1))
    inside = jax.jit(lambda x: model.apply(init_variables(model, key), x, train=False))(x)
    np.testing.assert_allclose(inside, apply_eval(model, init_variables(model, key), x), rtol=1e-4, atol=1e-6)


def test_variables_lie_where_the_key_does_or_on_the_default_device() -> None:
    code = """
import jax
from resunet_jax import ResUnet, init_variables
model, key, (first, second) = ResUnet(1, (2, 2, 2, 2)), jax.random.key(0), jax.devices()
def devices(key):
    return jax.tree.leaves(init_variables(model, key))[0].devices()
assert devices(key) == {first}
with jax.default_device(second):
    assert devices(key) == {second}
assert devices(jax.device_put(key, second)) == {second}
everywhere = jax.sharding.NamedSharding(jax.make_mesh((2,), ("devices",)), jax.sharding.PartitionSpec())
for one in (key, jax.random.PRNGKey(0)):
    assert devices(jax.device_put(one, everywhere)) == {first}
"""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_same_numbers_are_another_key_by_another_generator() -> None:
    model, key, drawn = ResUnet(1, (2, 2, 2, 2)), np.zeros(4, np.uint32), []
    for generator in ("rbg", "unsafe_rbg", "rbg"):
        with jax.default_prng_impl(generator):
            drawn.append(init_variables(model, key)["params"]["output_conv"]["kernel"])
    expected = init_variables(model, jax.random.wrap_key_data(key, impl="unsafe_rbg"))["params"]["output_conv"][
        "kernel"
    ]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    np.testing.assert_array_equal(drawn[1], expected)
    partitionable = jax.config.jax_threefry_partitionable
    key = jax.random.key(0)
    first = init_variables(model, key)
    jax.config.update("jax_threefry_partitionable", not partitionable)
    try:
        other = init_variables(model, key)
    finally:
        jax.config.update("jax_threefry_partitionable", partitionable)
    kernels = [one["params"]["bridge"]["conv1"]["kernel"] for one in (first, other)]
    assert not np.array_equal(*kernels)


def test_same_key_same_parameters_other_key_others() -> None:
    model = ResUnet(1, (2, 2, 2, 2))
    first, again, other = (init_variables(model, jax.random.key(seed)) for seed in (1, 1, 2))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, again)))
    assert not bool(
        (first["params"]["bridge"]["conv1"]["kernel"] == other["params"]["bridge"]["conv1"]["kernel"]).all()
    )


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 20, 16, 1), "divisible by 8"), ((1, 16, 16, 2), "expects"), ((16, 16, 1), "expects")]
)
def test_refuses_other_shapes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResUnet(1, NARROW).init(jax.random.key(0), jnp.zeros(shape), train=False)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters() -> None:
    model = ResUnet(1, (2, 2, 2, 2), jnp.bfloat16)
    variables = init_variables(model, jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (1, 16, 16, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = apply_eval(model, variables, x)
    exact = apply_eval(ResUnet(1, (2, 2, 2, 2)), variables, x)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1
