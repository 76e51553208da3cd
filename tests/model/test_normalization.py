from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resunet_jax.model.normalization import BatchNorm, batch_normalize


def plain(x: jax.Array, scale: jax.Array, bias: jax.Array, *, relu: bool) -> jax.Array:
    mean = x.mean((0, 1, 2), keepdims=True)
    variance = ((x - mean) ** 2).mean((0, 1, 2), keepdims=True)
    y = (x - mean) / jnp.sqrt(variance + 1e-5) * scale[None, None, None] + bias[None, None, None]
    return nn.relu(y) if relu else y


def arguments(mean: float = 0.5) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        mean + jax.random.normal(keys[0], (3, 6, 5, 4)),
        jax.random.normal(keys[1], (4,)),
        jax.random.normal(keys[2], (4,)),
    )


@pytest.mark.parametrize("relu", [False, True])
def test_value_and_gradient_are_those_of_the_plain_formula(relu: bool) -> None:
    args = arguments()
    weights = jax.random.normal(jax.random.key(1), args[0].shape)
    functions = (lambda *a: batch_normalize(*a, relu=relu)[0], partial(plain, relu=relu))
    ours, expected = (
        (f(*args), jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), (0, 1, 2))(*args)) for f in functions
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, expected)


@pytest.mark.parametrize("relu", [False, True])
def test_forward_mode_and_second_order_are_those_of_the_plain_formula(relu: bool) -> None:
    args, tangents = arguments(), tuple(jnp.cos(a) for a in arguments())

    def derivatives(f):
        def slope(*args):
            return jax.jvp(f, args, tangents)[1]

        return slope(*args), jax.grad(lambda *a: (slope(*a) ** 2).sum(), (0, 1, 2))(*args)

    ours = derivatives(lambda *a: batch_normalize(*a, relu=relu)[0])
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), ours, derivatives(partial(plain, relu=relu))
    )


def test_derivatives_of_the_statistics() -> None:
    x, scale, bias = arguments()
    mean, variance = (jax.grad(lambda x, i=i: batch_normalize(x, scale, bias)[i].sum())(x) for i in (1, 2))
    count = x.size // x.shape[-1]
    np.testing.assert_allclose(mean, jnp.full(x.shape, 1 / count), rtol=1e-5)
    np.testing.assert_allclose(variance, 2 * (x - x.mean((0, 1, 2), keepdims=True)) / count, rtol=1e-4, atol=1e-6)


def test_statistics_are_the_mean_and_the_biased_variance() -> None:
    x, scale, bias = arguments(mean=10)  # ten standard deviations from 0, where x² − mean² has lost two digits
    _, mean, variance = batch_normalize(x, scale, bias)
    np.testing.assert_allclose(mean, np.asarray(x, np.float64).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(variance, np.asarray(x, np.float64).var((0, 1, 2)), rtol=1e-4)


def test_a_constant_channel_becomes_its_bias() -> None:
    y, _, variance = batch_normalize(jnp.full((2, 4, 4, 1), 1000.1), jnp.ones(1), jnp.full(1, 0.25))
    assert float(variance.min()) >= 0  # rounding alone would make it negative now and then
    np.testing.assert_allclose(y, 0.25, atol=0.5)


@pytest.mark.parametrize("train", [False, True])
def test_the_layer_is_flax_s_with_the_offset_added(train: bool) -> None:
    x, scale, bias = arguments()
    offset = jnp.arange(4.0)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": jnp.full(4, 0.3), "var": jnp.full(4, 1.5)},
    }
    flax = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False)
    expected, theirs = flax.apply(variables, x + offset[None, None, None], mutable=["batch_stats"])
    y, ours = BatchNorm(train, relu=True).apply(variables, x, offset, mutable=["batch_stats"])
    np.testing.assert_allclose(y, nn.relu(expected), rtol=1e-4, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), ours, theirs)


def test_bfloat16_gives_bfloat16_from_float32_statistics() -> None:
    x, scale, bias = arguments()
    layer = BatchNorm(train=True, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    variables["params"].update(scale=scale, bias=bias)
    y, stats = layer.apply(variables, x.astype(jnp.bfloat16), mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert stats["batch_stats"]["mean"].dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), plain(x, scale, bias, relu=False), atol=0.05)
