"""A convolution that is fast on CPUs, forwards and backwards; a drop-in for `nn.Conv(conv_general_dilated=...)`.

XLA's CPU backend computes a convolution near the speed of a matrix product, but its gradient to the kernel at a fifth
of that, and its gradient to the input of a strided one at a third. Here, in float32:

- wide 3×3 convolutions of stride 1, and both their gradients, take Winograd's way along the rows, which halves the
  multiplications, in blocks that stay in the processor's cache; of narrow ones only the gradient to the kernel does;
- the gradient to any other kernel is a sum of matrix products over blocks of positions;
- the gradient to the input of a strided convolution is a convolution of stride 1 for each place in the stride.

Each of the three operations is bilinear, and its derivatives are the other two: so reverse mode works to any order.
Forward mode does not: use XLA's own convolution for it.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016: F(4, 3), of which the
two-dimensional F(4×4, 3×3) would save more multiplications, and lose more digits and more time in its transforms.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Four neighbouring outputs y of a row from six inputs x and three weights k: y = OUT · ((IN · x) * (WEIGHT · k)).
_IN = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
_WEIGHT = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float32,
)
_OUT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32)

_TILE = 4  # outputs of a row that are computed together
_WINOGRAD_CHANNELS = 32  # with fewer on either side, the transforms cost more than they save
_WINOGRAD_GRADIENT_CHANNELS = 16  # the same for the gradient to the kernel, which XLA computes more slowly
_WINOGRAD_VALUES = 1_250_000  # of the largest array of a block: 5 MB, about what the cores' caches hold
_POSITIONS = 1024  # of a block of the direct kernel gradient: 9 × 64 patch values of each are 2.4 MB

Padding = tuple[tuple[int, int], tuple[int, int]]
Convolution = Callable[..., jax.Array]


class _Layout(NamedTuple):
    """What the shapes of input, kernel and output do not determine."""

    strides: tuple[int, int]
    padding: Padding
    precision: Any


def default_convolution() -> Convolution:
    """The convolution to train and predict with: `conv_general_dilated` of this module on CPUs, otherwise XLA's.

    Chosen when a step or a predictor is made, by the default backend. `jax.lax.platform_dependent` would trace,
    differentiate and compile both for every layer, to the same end.
    """
    return conv_general_dilated if jax.default_backend() == "cpu" else lax.conv_general_dilated


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, faster on CPUs and equal to XLA's to 1e-5 of its norm.

    Args:
      lhs: the input, float32, or bfloat16, which is computed in float32 and rounded; what is of another type, is not
        (N, H, W, C) with an (H, W, in, out) kernel, is dilated or grouped, or has an empty result goes to XLA.
      rhs: the kernel.
      window_strides: for this and the rest see `jax.lax.conv_general_dilated`.
      padding: see there.
      **options: lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count, precision and
        preferred_element_type, with the same defaults; any other option is handed to XLA's convolution.

    Returns:
      the convolution. Differentiable in reverse mode, to any order; `jax.jvp` raises TypeError.
    """
    by_xla = partial(lax.conv_general_dilated, lhs, rhs, window_strides, padding, **options)
    if not _is_fast(lhs, rhs, **options) or 0 in jax.eval_shape(by_xla).shape:
        return by_xla()
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    (top, bottom), (left, right) = padding
    row_stride, column_stride = window_strides
    layout = _Layout((row_stride, column_stride), ((top, bottom), (left, right)), options.get("precision"))
    x, kernel = _varying_alike(lhs.astype(jnp.float32), rhs.astype(jnp.float32))
    return _conv(x, kernel, layout).astype(lhs.dtype)


def _varying_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Under `jax.shard_map`, arrays that vary over the same axes of the mesh, as scans and derivatives of our own need.

    JAX's own operations see to it themselves, which is what `where` is for; its derivative is the sum over these axes.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    first = [lax.stop_gradient(array).ravel()[0] for array in arrays]
    return tuple(jnp.where(False, reduce(operator.add, first), array) for array in arrays)


def _is_fast(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **others: Any,
) -> bool:
    """Whether it is a convolution that this module computes."""
    if others or dimension_numbers is None or lhs.ndim != 4:
        return False
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    images = numbers == lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    dtype = lhs.dtype
    known = dtype == rhs.dtype and dtype in (jnp.float32, jnp.bfloat16) and preferred_element_type in (None, dtype)
    dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    return images and known and not dilated and feature_group_count == batch_group_count == 1


def _suits_winograd(kernel_shape: tuple[int, ...], strides: tuple[int, int], channels: int) -> bool:
    return strides == (1, 1) and kernel_shape[:2] == (3, 3) and min(kernel_shape[2:]) >= channels


# The three operations and their derivatives.


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, layout: _Layout) -> jax.Array:
    """(N, H, W, C) by (h, w, C, D) to (N, H', W', D)."""
    if _suits_winograd(kernel.shape, layout.strides, _WINOGRAD_CHANNELS):
        return _winograd(x, kernel, layout.padding, layout.precision)
    return _by_xla(x, kernel, *layout)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _input_gradient(g: jax.Array, kernel: jax.Array, layout: _Layout, size: tuple[int, int]) -> jax.Array:
    """Transposed convolution of the output's gradient (N, H', W', D): (N, *size, C)."""
    if layout.strides != (1, 1):
        return _input_gradient_by_phase(g, kernel, layout, size)
    rows, columns = (
        (k - 1 - before, side + before - have)
        for k, (before, _), side, have in zip(kernel.shape[:2], layout.padding, size, g.shape[1:3], strict=True)
    )
    return _conv(g, kernel[::-1, ::-1].transpose(0, 1, 3, 2), _Layout((1, 1), (rows, columns), layout.precision))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _kernel_gradient(x: jax.Array, g: jax.Array, layout: _Layout, size: tuple[int, int]) -> jax.Array:
    """Correlation of the input (N, H, W, C) and the output's gradient (N, H', W', D): (*size, C, D)."""
    if _suits_winograd((*size, x.shape[-1], g.shape[-1]), layout.strides, _WINOGRAD_GRADIENT_CHANNELS):
        return _winograd_kernel_gradient(x, g, layout.padding, layout.precision)
    return _direct_kernel_gradient(x, g, layout, size)


def _saving(operation: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, Any]]:
    """The operation, which also gives its two arrays to its derivative."""
    return lambda a, b, *settings: (operation(a, b, *settings), (a, b))


def _conv_bwd(layout: _Layout, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return _input_gradient(g, kernel, layout, x.shape[1:3]), _kernel_gradient(x, g, layout, kernel.shape[:2])


def _input_gradient_bwd(
    layout: _Layout, size: tuple[int, int], saved: Any, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    g, kernel = saved
    return _conv(x, kernel, layout), _kernel_gradient(x, g, layout, kernel.shape[:2])


def _kernel_gradient_bwd(
    layout: _Layout, size: tuple[int, int], saved: Any, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, g = saved
    return _input_gradient(g, kernel, layout, x.shape[1:3]), _conv(x, kernel, layout)


_conv.defvjp(_saving(_conv), _conv_bwd)
_input_gradient.defvjp(_saving(_input_gradient), _input_gradient_bwd)
_kernel_gradient.defvjp(_saving(_kernel_gradient), _kernel_gradient_bwd)


# 3×3, stride 1. Jitted, here and below, so that layers of one shape are traced and lowered once.


class _Blocks(NamedTuple):
    """How a convolution's output is cut: into blocks of whole images, or of rows of one image."""

    images: int
    rows: int
    tiles: int

    @staticmethod
    def of(shape: tuple[int, ...], channels: int) -> "_Blocks":
        """Of an output (N, H, W, ...), when three shifted copies of `channels` values are made of each tile."""
        n, h, w, _ = shape
        tiles = -(-w // _TILE)
        limit = max(1, _WINOGRAD_VALUES // (3 * len(_IN) * channels * tiles))
        images = _divisor(n, limit // h)
        return _Blocks(images, h if limit >= h else _divisor(h, limit), tiles)


@partial(jax.jit, static_argnames=("padding", "precision"))
def _winograd(x: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    n, h, w, c = x.shape
    d = kernel.shape[-1]
    height, width = (side + sum(pad) - 2 for side, pad in zip((h, w), padding, strict=True))
    images, rows, tiles = _Blocks.of((n, height, width, d), min(c, d))
    weights = jnp.einsum("uj,ijcd->uicd", _WEIGHT, kernel)  # (6, 3 rows, c, d)
    product = partial(_batched_product, precision=precision)

    def of_rows(window: jax.Array) -> jax.Array:
        """(images, rows + 2, columns, c) to (images, rows, 4 · tiles, d)."""
        v = _transform_input(window, tiles)
        # The sum over three rows of the kernel: of shifted inputs, or of shifted outputs, whichever are fewer.
        if c <= d:
            m = product(_three_rows(v, rows), weights.reshape(len(_IN), 3 * c, d))
            m = m.reshape(len(_IN), images, rows, tiles, d)
        else:
            z = product(v, weights.transpose(0, 2, 1, 3).reshape(len(_IN), c, 3 * d))
            z = z.reshape(len(_IN), images, rows + 2, tiles, 3, d)
            m = z[:, :, :rows, :, 0] + z[:, :, 1 : rows + 1, :, 1] + z[:, :, 2:, :, 2]
        return jnp.stack(_combine(_OUT, m), axis=3).reshape(images, rows, _TILE * tiles, d)

    def of_images(start: jax.Array) -> jax.Array:
        padded = _padded_images(x, start, images, padding, _TILE * tiles - width)
        if rows == height:
            return of_rows(padded)
        y = lax.map(
            lambda row: of_rows(lax.dynamic_slice_in_dim(padded, row, rows + 2, axis=1)), jnp.arange(0, height, rows)
        )
        return y.reshape(1, height, _TILE * tiles, d)

    y = lax.map(of_images, jnp.arange(0, n, images)).reshape(n, height, _TILE * tiles, d)
    return y[:, :, :width]


@partial(jax.jit, static_argnames=("padding", "precision"))
def _winograd_kernel_gradient(x: jax.Array, g: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    n, height, width, d = g.shape
    c = x.shape[-1]
    images, rows, tiles = _Blocks.of(g.shape, min(c, d))
    missing = _TILE * tiles - width

    def of_rows(window: jax.Array, outputs: jax.Array) -> jax.Array:
        """What a block adds to the gradient of the transformed kernel, (6, d, 3, c) or (6, c, 3, d)."""
        v = _transform_input(window, tiles)
        tiled = outputs.reshape(images, rows, tiles, _TILE, d)
        m = jnp.stack(_combine(_OUT.T, tiled.transpose(3, 0, 1, 2, 4)))
        if c <= d:
            fixed, shifted = m, _three_rows(v, rows)
        else:
            shifts = [jnp.pad(m, ((0, 0), (0, 0), (i, 2 - i), (0, 0), (0, 0))) for i in range(3)]
            fixed, shifted = v, jnp.concatenate(shifts, axis=-1)
        fixed, shifted = (a.reshape(len(_IN), -1, a.shape[-1]) for a in (fixed, shifted))
        return lax.dot_general(fixed, shifted, (((1,), (1,)), ((0,), (0,))), precision=precision)

    def add_images(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        padded = _padded_images(x, start, images, padding, missing)
        outputs = lax.dynamic_slice_in_dim(g, start, images)
        outputs = jnp.pad(outputs, ((0, 0), (0, 0), (0, missing), (0, 0)))

        def add_rows(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
            window = lax.dynamic_slice_in_dim(padded, row, rows + 2, axis=1)
            return total + of_rows(window, lax.dynamic_slice_in_dim(outputs, row, rows, axis=1)), None

        return lax.scan(add_rows, total, jnp.arange(0, height, rows))

    start = _varying_alike(jnp.zeros((len(_IN), max(c, d), 3 * min(c, d)), g.dtype), x, g)[0]
    total, _ = lax.scan(lambda total, start: (add_images(total, start)[0], None), start, jnp.arange(0, n, images))
    total = total.reshape(len(_IN), max(c, d), 3, min(c, d))
    return jnp.einsum("uj,udic->ijcd" if c <= d else "uj,ucid->ijcd", _WEIGHT, total)


def _padded_images(x: jax.Array, start: jax.Array, images: int, padding: Padding, missing: int) -> jax.Array:
    """`images` images from `start`, padded, with `missing` more columns to make the tiles whole."""
    (top, bottom), (left, right) = padding
    return _padded(lax.dynamic_slice_in_dim(x, start, images), ((top, bottom), (left, right + missing)))


def _transform_input(window: jax.Array, tiles: int) -> jax.Array:
    """(N, rows, 4 · tiles + 2, C) to (6, N, rows, tiles, C)."""
    columns = [window[:, :, j : j + _TILE * (tiles - 1) + 1 : _TILE] for j in range(len(_IN))]
    return jnp.stack(_combine(_IN, columns))


def _three_rows(v: jax.Array, rows: int) -> jax.Array:
    """(6, N, rows + 2, tiles, C) to (6, N, rows, tiles, 3 · C): each row next to the two below it."""
    return jnp.concatenate([v[:, :, i : i + rows] for i in range(3)], axis=-1)


def _combine(matrix: np.ndarray, terms: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
    """The matrix by a vector of arrays; XLA makes one pass of it, where a product would make many."""
    return [reduce(operator.add, (float(a) * terms[j] for j, a in enumerate(row) if a)) for row in matrix]


def _batched_product(a: jax.Array, b: jax.Array, precision: Any) -> jax.Array:
    """(6, ..., K) by (6, K, D) to (6, positions, D)."""
    return jnp.matmul(a.reshape(len(a), -1, a.shape[-1]), b, precision=precision)


# Every other kernel and stride.


def _by_xla(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Sequence[tuple[int, int]], precision: Any
) -> jax.Array:
    if any(side < 0 for pad in padding for side in pad):  # with which XLA's CPU backend gives wrong values
        x, padding = _padded(x, padding), ((0, 0), (0, 0))
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers, precision=precision)


def _padded(x: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """(N, H, W, C) with zeros around it; unlike jnp.pad, lax.pad takes negative numbers."""
    (top, bottom), (left, right) = padding
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)))


@partial(jax.jit, static_argnames=("layout", "size"))
def _input_gradient_by_phase(g: jax.Array, kernel: jax.Array, layout: _Layout, size: tuple[int, int]) -> jax.Array:
    """The gradient to the input of a strided convolution: for each place in the stride a convolution of stride 1."""
    n, c = g.shape[0], kernel.shape[2]
    (sh, sw), _, precision = layout
    h, w = (-(-side // stride) for side, stride in zip(size, layout.strides, strict=True))

    def of_place(row: int, column: int) -> jax.Array:
        """The input's rows row, row + sh, ... and columns column, column + sw, ...: (n, h, w, c)."""
        starts, around = [], []
        for place, stride, (before, _), taps, have, want in zip(
            (row, column), layout.strides, layout.padding, kernel.shape[:2], g.shape[1:3], (h, w), strict=True
        ):
            # Input i = place + stride · u was met by the kernel's tap k at output u + shift − (k − start) / stride.
            shift, start = divmod(place + before, stride)
            last = len(range(start, taps, stride)) - 1
            starts.append(start)
            around.append((last - shift, want - have + shift))
        taps = kernel[starts[0] :: sh, starts[1] :: sw][::-1, ::-1].transpose(0, 1, 3, 2)
        if not taps.size:
            return jnp.zeros((n, h, w, c), g.dtype)
        return _by_xla(g, taps, (1, 1), around, precision)

    y = jnp.stack([jnp.stack([of_place(i, j) for j in range(sw)], axis=3) for i in range(sh)], axis=2)
    return y.reshape(n, h * sh, w * sw, c)[:, : size[0], : size[1]]


@partial(jax.jit, static_argnames=("layout", "size"))
def _direct_kernel_gradient(x: jax.Array, g: jax.Array, layout: _Layout, size: tuple[int, int]) -> jax.Array:
    """Σ over n, r, s of x[n, r · stride + i, s · stride + j, :, None] · g[n, r, s, None, :], as (i, j, C, D)."""
    (kh, kw), (sh, sw) = size, layout.strides
    n, h, w, d = g.shape
    x = _padded(x, layout.padding)
    width, c = x.shape[2:]
    images = _divisor(n, _POSITIONS // (h * w))
    rows = h if images > 1 else _divisor(h, _POSITIONS // w)
    blocks = h // rows

    def add_block(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        image, row = block // blocks * images, block % blocks * rows
        outputs = lax.dynamic_slice(g, (image, row, 0, 0), (images, rows, w, d)).reshape(-1, d)
        window = lax.dynamic_slice(x, (image, row * sh, 0, 0), (images, (rows - 1) * sh + kh, width, c))
        shifted = [
            window[:, i : i + (rows - 1) * sh + 1 : sh, j : j + (w - 1) * sw + 1 : sw]
            for i in range(kh)
            for j in range(kw)
        ]
        patches = jnp.concatenate(shifted, axis=-1).reshape(-1, kh * kw * c)
        return total + jnp.matmul(outputs.T, patches, precision=layout.precision), None

    start = _varying_alike(jnp.zeros((d, kh * kw * c), g.dtype), x, g)[0]
    total, _ = lax.scan(add_block, start, jnp.arange(n // images * blocks))
    return total.reshape(d, kh, kw, c).transpose(1, 2, 3, 0)


def _divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`; at least 1."""
    return max(d for d in range(1, max(1, min(n, limit)) + 1) if n % d == 0)
