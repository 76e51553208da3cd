"""The convolution with fast gradients against XLA's own."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from resunet_jax.model.winograd import conv_general_dilated

NHWC = ("NHWC", "HWIO", "NHWC")
Conv = Callable[..., jax.Array]

# (input, kernel, strides, padding). The first go Winograd's way: wider in, wider out, blocks of rows and of images,
# sides that are no multiple of a tile, padding that is none, one-sided and more than the kernel. Of the next, only the
# gradient to the kernel does.
LAYERS = {
    "winograd, narrowing": ((2, 16, 16, 80), (3, 3, 80, 64), (1, 1), ((1, 1), (1, 1))),
    "winograd, widening": ((2, 16, 16, 64), (3, 3, 64, 80), (1, 1), ((1, 1), (1, 1))),
    "winograd, rows of an image": ((2, 64, 256, 72), (3, 3, 72, 64), (1, 1), ((1, 1), (1, 1))),
    "winograd, rows, widening": ((1, 64, 256, 64), (3, 3, 64, 72), (1, 1), ((1, 1), (1, 1))),
    "winograd, images together": ((12, 8, 8, 64), (3, 3, 64, 64), (1, 1), ((1, 1), (1, 1))),
    "winograd, odd sides": ((2, 7, 13, 64), (3, 3, 64, 72), (1, 1), ((1, 1), (1, 1))),
    "winograd, one column": ((1, 5, 3, 72), (3, 3, 72, 64), (1, 1), "VALID"),
    "winograd, one-sided": ((1, 9, 10, 64), (3, 3, 64, 64), (1, 1), ((2, 0), (0, 3))),
    "winograd, more padding than kernel": ((1, 6, 6, 64), (3, 3, 64, 64), (1, 1), ((3, 3), (3, 4))),
    "winograd gradient, narrowing": ((2, 16, 16, 48), (3, 3, 48, 16), (1, 1), ((1, 1), (1, 1))),
    "winograd gradient, rows, widening": ((1, 64, 512, 16), (3, 3, 16, 40), (1, 1), ((1, 1), (1, 1))),
    "winograd gradient, odd sides": ((2, 7, 13, 16), (3, 3, 16, 24), (1, 1), ((1, 1), (1, 1))),
    "narrowing": ((2, 16, 16, 12), (3, 3, 12, 4), (1, 1), ((1, 1), (1, 1))),
    "widening": ((2, 16, 16, 4), (3, 3, 4, 12), (1, 1), ((1, 1), (1, 1))),
    "rows of an image": ((2, 64, 48, 3), (3, 3, 3, 5), (1, 1), ((1, 1), (1, 1))),
    "rows, narrowing": ((1, 64, 48, 5), (3, 3, 5, 3), (1, 1), ((1, 1), (1, 1))),
    "images together": ((12, 8, 8, 3), (3, 3, 3, 4), (1, 1), ((1, 1), (1, 1))),
    "stride 2": ((2, 16, 16, 4), (3, 3, 4, 8), (2, 2), ((1, 1), (1, 1))),
    "stride 2, odd sides": ((2, 15, 13, 4), (3, 3, 4, 8), (2, 2), ((1, 1), (1, 1))),
    "strides 2 and 3": ((3, 17, 20, 3), (3, 5, 3, 2), (2, 3), ((0, 2), (1, 3))),
    "stride above the kernel": ((2, 13, 14, 3), (1, 2, 3, 4), (3, 3), ((0, 0), (0, 0))),
    "one by one": ((2, 8, 8, 6), (1, 1, 6, 1), (1, 1), ((0, 0), (0, 0))),
    "no padding": ((2, 9, 9, 6), (3, 3, 6, 2), (1, 1), "VALID"),
    "same": ((2, 9, 10, 6), (3, 3, 6, 2), (2, 2), "SAME"),
    "more padding than kernel": ((1, 6, 6, 5), (3, 3, 5, 2), (1, 1), ((3, 3), (3, 4))),
    "winograd, less padding than none": ((1, 9, 10, 64), (3, 3, 64, 64), (1, 1), ((-1, 0), (0, -2))),
    "less padding than none": ((2, 9, 10, 5), (3, 3, 5, 2), (1, 1), ((-1, -1), (0, -1))),
    "stride 2, one-sided": ((2, 9, 10, 5), (3, 3, 5, 7), (2, 2), ((4, 0), (0, 4))),
    "prime sides": ((1, 1031, 3, 2), (3, 3, 2, 3), (1, 1), ((1, 1), (1, 1))),
}


def arrays(layer: str, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    x, kernel, _, _ = LAYERS[layer]
    keys = jax.random.split(jax.random.key(0))
    # Wide layers give no larger outputs than those of 16 channels: the sine of large ones is badly conditioned.
    scale = (16 / max(16, x[-1])) ** 0.5
    return jax.random.normal(keys[0], x, dtype), scale * jax.random.normal(keys[1], kernel, dtype)


def apply(conv: Conv, layer: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    _, _, strides, padding = LAYERS[layer]
    return conv(x, kernel, strides, padding, dimension_numbers=NHWC)


def scalar(conv: Conv, layer: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A sum that weighs every output differently and bends, so that second derivatives do not vanish."""

    def f(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = apply(conv, layer, x, kernel)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
        return jnp.sum(weights * jnp.sin(y / 4))

    return f


def assert_close(ours: Any, xla: Any, relative: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(xla), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        expected = np.asarray(b, np.float64)
        assert np.linalg.norm(np.asarray(a, np.float64) - expected) <= relative * np.linalg.norm(expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_value_and_gradients_equal_xla(layer: str) -> None:
    x, kernel = arrays(layer)
    assert_close(apply(conv_general_dilated, layer, x, kernel), apply(lax.conv_general_dilated, layer, x, kernel))
    ours, xla = (
        jax.jit(jax.grad(scalar(conv, layer), (0, 1)))(x, kernel)
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    )
    assert_close(ours, xla)


@pytest.mark.parametrize(
    "layer",
    [
        "winograd, narrowing",
        "winograd gradient, odd sides",
        "narrowing",
        "stride 2, odd sides",
        "stride above the kernel",
    ],
)
def test_second_derivatives_equal_xla(layer: str) -> None:
    x, kernel = arrays(layer)

    def norm_of_gradient(conv: Conv) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def f(x: jax.Array, kernel: jax.Array) -> jax.Array:
            gradients = jax.grad(scalar(conv, layer), (0, 1))(x, kernel)
            return sum(jnp.sum(jnp.sin(g)) for g in gradients)

        return f

    ours, xla = (
        jax.jit(jax.grad(norm_of_gradient(conv), (0, 1)))(x, kernel)
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    )
    assert_close(ours, xla)


@pytest.mark.parametrize(
    ("layer", "forward", "gradient"),
    [("winograd, widening", True, True), ("winograd gradient, narrowing", False, True), ("narrowing", False, False)],
)
def test_takes_winograds_way_where_it_is_faster(layer: str, forward: bool, gradient: bool) -> None:
    def f(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return apply(conv_general_dilated, layer, x, kernel)

    args = arrays(layer)
    assert ("name=_winograd" in str(jax.make_jaxpr(f)(*args))) == forward
    both = str(jax.make_jaxpr(lambda x, kernel: jax.vjp(f, x, kernel)[1](jnp.ones_like(f(x, kernel))))(*args))
    assert ("name=_winograd_kernel_gradient" in both) == gradient


@pytest.mark.parametrize("layer", ["winograd, widening", "stride 2"])
def test_vmap_over_kernels(layer: str) -> None:
    x, kernel = arrays(layer)
    kernels = jnp.stack([kernel, -2 * kernel, kernel + 1])
    gradient = jax.grad(scalar(conv_general_dilated, layer), (0, 1))
    expected = [gradient(x, k) for k in kernels]
    batched = jax.vmap(gradient, (None, 0))(x, kernels)
    assert_close(batched, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))


def test_remat_gives_the_same() -> None:
    x, kernel = arrays("winograd, widening")
    f = scalar(conv_general_dilated, "winograd, widening")
    assert_close(jax.grad(jax.checkpoint(f), (0, 1))(x, kernel), jax.grad(f, (0, 1))(x, kernel), 0)


def test_bfloat16_is_computed_in_float32() -> None:
    x, kernel = arrays("winograd, widening", jnp.bfloat16)
    exact_x, exact_kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    layer = "winograd, widening"
    ours = apply(conv_general_dilated, layer, x, kernel)
    exact = apply(conv_general_dilated, layer, exact_x, exact_kernel)
    np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))
    gradients = jax.grad(scalar(conv_general_dilated, layer), (0, 1))(x, kernel)
    expected = jax.grad(scalar(lax.conv_general_dilated, layer), (0, 1))(exact_x, exact_kernel)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    assert_close(jax.tree.map(lambda g: g.astype(jnp.float32), gradients), expected, 0.02)


def test_extreme_magnitudes() -> None:
    x, kernel = arrays("winograd, narrowing")
    for scale in (1e-18, 1e18):
        args = x * scale, kernel / scale
        ours, xla = (
            apply(conv, "winograd, narrowing", *args) for conv in (conv_general_dilated, lax.conv_general_dilated)
        )
        assert_close(ours, xla)


def test_unsupported_options_fall_back_to_xla() -> None:
    x, kernel = arrays("widening")
    for options in ({"rhs_dilation": (2, 2)}, {"lhs_dilation": (1, 2)}, {"feature_group_count": 2}):
        k = kernel[:, :, :2] if "feature_group_count" in options else kernel
        options |= {"dimension_numbers": NHWC}
        ours = conv_general_dilated(x, k, (1, 1), [(1, 1), (1, 1)], **options)
        np.testing.assert_array_equal(ours, lax.conv_general_dilated(x, k, (1, 1), [(1, 1), (1, 1)], **options))
    np.testing.assert_array_equal(
        conv_general_dilated(x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME"),
        lax.conv_general_dilated(x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME"),
    )
    plain = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
    new_option = conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, out_sharding=None)
    np.testing.assert_array_equal(new_option, plain)
    with pytest.raises(TypeError, match="rhs_dilatation"):
        conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, rhs_dilatation=(2, 2))


def test_forward_mode_is_refused() -> None:
    x, kernel = arrays("one by one")
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: apply(conv_general_dilated, "one by one", x, kernel), (x,), (x,))


@pytest.mark.parametrize("layer", ["winograd, narrowing", "narrowing", "stride 2"])
def test_gradients_under_shard_map_are_those_without_it(layer: str) -> None:
    x, kernel = arrays(layer)
    gradient = jax.grad(scalar(conv_general_dilated, layer), (0, 1))
    mesh, spec = jax.sharding.Mesh(jax.devices()[:1], ("data",)), jax.sharding.PartitionSpec
    specs = {"in_specs": (spec("data"), spec()), "out_specs": (spec("data"), spec())}
    assert_close(jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(x, kernel), jax.jit(gradient)(x, kernel))


@pytest.mark.parametrize(("shape", "expected"), [((1, 2, 3, 32), (1, 0, 1, 32)), ((0, 8, 8, 32), (0, 6, 6, 32))])
def test_what_is_empty_stays_empty(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    y = conv_general_dilated(jnp.ones(shape), jnp.ones((3, 3, 32, 32)), (1, 1), "VALID", dimension_numbers=NHWC)
    assert y.shape == expected


def test_is_a_drop_in_for_flax() -> None:
    x = jax.random.normal(jax.random.key(1), (2, 10, 10, 3))
    ours = nn.Conv(4, (3, 3), strides=2, padding=1, conv_general_dilated=conv_general_dilated)
    plain = nn.Conv(4, (3, 3), strides=2, padding=1)
    variables = plain.init(jax.random.key(0), x)
    gradients = [
        jax.jit(jax.grad(lambda v, model=model: jnp.sum(jnp.square(model.apply(v, x)))))(variables)
        for model in (ours, plain)
    ]
    assert_close(*gradients)
