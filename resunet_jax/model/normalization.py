"""Batch normalisation with an optional ReLU, with a derivative of its own that passes over memory less often.

Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015; the gradient is their section 3.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

_EPSILON = 1e-5
_MOMENTUM = 0.9

Normalized = tuple[jax.Array, jax.Array, jax.Array]
"""The result of `batch_normalize`, and the mean and the variance that it was normalised by."""


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last: `nn.BatchNorm` with PyTorch's defaults, and a ReLU.

    The running variance is that of the biased estimate, as in Flax; PyTorch's is unbiased.

    Attributes:
      train: True normalises by the batch and updates the running statistics; False normalises by these.
      relu: whether negative values become 0.
      dtype: type of the result; parameters and statistics are float32.
    """

    train: bool
    relu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, offset: jax.Array | None = None) -> jax.Array:
        """Normalises `x + offset`.

        Args:
          x: (N, H, W, C).
          offset: (C,), the bias of the convolution that gave `x`. The mean of a batch takes it out again, so when
            training it goes to the running mean alone, and its gradient is 0.
        """
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if self.train:
            y, batch_mean, batch_variance = batch_normalize(x, scale, bias, relu=self.relu)
            if offset is not None:
                batch_mean += lax.stop_gradient(offset)
            if not self.is_initializing():
                mean.value = _MOMENTUM * mean.value + (1 - _MOMENTUM) * batch_mean
                variance.value = _MOMENTUM * variance.value + (1 - _MOMENTUM) * batch_variance
            return y.astype(self.dtype)
        if offset is not None:
            x = x + _row(offset.astype(x.dtype))
        y = (x - _row(mean.value)) * _row(lax.rsqrt(variance.value + _EPSILON) * scale) + _row(bias)
        return (nn.relu(y) if self.relu else y).astype(self.dtype)


def batch_normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, *, relu: bool = False) -> Normalized:
    """Normalises an array by its own mean and variance; differentiable in forward and reverse mode, to any order.

    Args:
      x: (N, H, W, C).
      scale: (C,) float32.
      bias: (C,) float32.
      relu: whether negative values become 0.

    Returns:
      (x − mean) / √(variance + 1e-5) · scale + bias; the mean; the biased variance; all float32. The variance is
      E[x²] − mean², whose relative error is about 1e-7 · (1 + mean² / variance).
    """
    return _normalize(relu, x.astype(jnp.float32), scale, bias)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(relu: bool, x: jax.Array, scale: jax.Array, bias: jax.Array) -> Normalized:
    mean = _mean(x)
    variance = jnp.maximum(_mean(x * x) - mean**2, 0)
    y = (x - _row(mean)) * _row(lax.rsqrt(variance + _EPSILON) * scale) + _row(bias)
    return jnp.maximum(y, 0) if relu else y, mean, variance


@_normalize.defjvp
def _normalize_jvp(relu: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Normalized, Normalized]:
    """In terms of x and dx as they are: their sums, and those of their products, need no array beside them."""
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    y, mean, variance = _normalize(relu, x, scale, bias)
    inverse = lax.rsqrt(variance + _EPSILON)
    slope, mean_dx = inverse * scale, _mean(dx)
    covariance = _mean(x * dx) - mean * mean_dx
    by_x = (dscale - slope * inverse * covariance) * inverse
    dy = _row(slope) * dx + _row(by_x) * x + _row(dbias - slope * mean_dx - mean * by_x)
    if relu:
        dy = jnp.where(y > 0, dy, 0)
    return (y, mean, variance), (dy, mean_dx, 2 * covariance)


def _mean(x: jax.Array) -> jax.Array:
    return x.sum((0, 1, 2)) / (x.size // x.shape[-1])


def _row(values: jax.Array) -> jax.Array:
    return values[None, None, None]
