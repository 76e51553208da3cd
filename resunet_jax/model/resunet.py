"""The residual U-Net, in Flax Linen.

Source: Zhang, Liu and Wang, "Road Extraction by Deep Residual U-Net", IEEE GRSL 15(5), 2018, in the variant that
the original project used: 3×3 skip convolutions with batch normalisation, learned 2×2 upsampling, four levels.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resunet_jax.model.normalization import BatchNorm
from resunet_jax.model.winograd import Convolution

Variables = dict[str, Any]
"""Flax variables: {"params": ..., "batch_stats": ...}."""

# PyTorch's default for convolutions, U(±1/√fan_in), which the original was trained from.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv(nn.Module):
    """A convolution with PyTorch's padding and initialisation, which leaves it to the caller to add its bias.

    Attributes:
      features: output channels.
      size: of the kernel.
      stride: of both axes.
      dtype: type of the computation.
      convolution: see `ResUnet`.
    """

    features: int
    size: int = 3
    stride: int = 1
    dtype: Any = jnp.float32
    convolution: Convolution = lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps (N, H, W, C) to (N, H/stride, W/stride, features) without the bias, and the bias, (features,)."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", _kernel_init, shape, jnp.float32)
        bias = self.param("bias", _bias_init(self.size**2 * x.shape[-1]), shape[-1:], jnp.float32)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        pad = self.size // 2  # not "SAME", which pads a stride of 2 on one side only
        strides, padding, layout = (self.stride,) * 2, ((pad, pad),) * 2, ("NHWC", "HWIO", "NHWC")
        return self.convolution(x, kernel, strides, padding, dimension_numbers=layout), bias


class LayerFactory(NamedTuple):
    """Makes the layers of one module, all with the same settings; for the fields see `ResUnet`."""

    dtype: Any
    train: bool
    convolution: Convolution

    def conv(self, x: jax.Array, features: int, name: str, *, size: int = 3, stride: int = 1) -> jax.Array:
        """A convolution."""
        y, bias = Conv(features, size, stride, self.dtype, self.convolution, name=name)(x)
        return y + bias[None, None, None]

    def conv_norm(
        self, x: jax.Array, features: int, conv: str, norm: str, *, stride: int = 1, relu: bool = True
    ) -> jax.Array:
        """A convolution, batch normalisation and ReLU."""
        y, bias = Conv(features, 3, stride, self.dtype, self.convolution, name=conv)(x)
        return BatchNorm(self.train, relu, self.dtype, name=norm)(y, bias)


class Upsample(nn.Module):
    """A learned 2×2 transposed convolution with stride 2, as the matrix product that it is.

    Attributes:
      dtype: type of the computation.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, 2H, 2W, C)."""
        n, h, w, c = x.shape
        kernel = self.param("kernel", _kernel_init, (2, 2, c, c), jnp.float32)
        bias = self.param("bias", _bias_init(4 * c), (c,), jnp.float32)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        # kernel is (row, column, out, in), the layout of `nn.ConvTranspose(transpose_kernel=True)`. A product for each
        # row leaves less to move about than one for all: two thirds of the time on CPUs.
        rows = [x.reshape(-1, c) @ kernel[row].reshape(2 * c, c).T for row in range(2)]
        y = jnp.stack([row.reshape(n, h, 2 * w, c) for row in rows], axis=2)
        return y.reshape(n, 2 * h, 2 * w, c) + bias[None, None, None]


class ResidualBlock(nn.Module):
    """(norm, ReLU, 3×3 convolution) twice, plus a normalised 3×3 convolution of the input.

    Attributes:
      features: output channels.
      stride: of the first convolution and of the skip.
      dtype: type of the computation.
      convolution: see `ResUnet`.
    """

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    convolution: Convolution = lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps (N, H, W, C) to (N, H/stride, W/stride, features)."""
        layers = LayerFactory(self.dtype, train, self.convolution)
        skip = layers.conv_norm(x, self.features, "skip_conv", "skip_norm", stride=self.stride, relu=False)
        x = BatchNorm(train, relu=True, dtype=self.dtype, name="norm1")(x)
        x = layers.conv_norm(x, self.features, "conv1", "norm2", stride=self.stride)
        return layers.conv(x, self.features, "conv2") + skip


class ResUnet(nn.Module):
    """Residual U-Net from slices to logits.

    With the default filters it has 13,040,705 parameters for one input channel and 13,041,857 for two.

    Attributes:
      in_channels: those of the CT (1, or 3 with context), and one more for a lung probability.
      filters: channels of the four levels, from full to an eighth of the resolution.
      dtype: type of the computation; parameters, batch statistics and logits are float32.
      remat: computes each residual block again when its gradient is taken, instead of keeping what lies within.
      closing_fraction: with a lung probability, how far the lung probability is to be closed before it comes here, see
        `infection_input`.
      convolution: `jax.lax.conv_general_dilated` or a drop-in for it; `default_convolution()` of `model/winograd.py` is
        faster on CPUs, in reverse mode only.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from resunet_jax import ResUnet, init_variables
      >>> model = ResUnet(filters=(4, 8, 16, 32))
      >>> variables = init_variables(model, jax.random.key(0))
      >>> logits = jax.jit(lambda x: model.apply(variables, x, train=False))(jnp.zeros((2, 32, 32, 1)))
      >>> logits.shape, logits.dtype.name
      ((2, 32, 32, 1), 'float32')
    """

    in_channels: int = 1
    filters: tuple[int, int, int, int] = (64, 128, 256, 512)
    dtype: Any = jnp.float32
    remat: bool = False
    closing_fraction: float = 0.0
    convolution: Convolution = lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits.

        Args:
          x: (N, H, W, in_channels), H and W divisible by 8; values in [0, 1].
          train: True normalises by the batch and updates "batch_stats" (apply with mutable=["batch_stats"]);
            False uses the running statistics.

        Returns:
          float32 logits (N, H, W, 1); the sigmoid of them is a probability.

        Raises:
          ValueError: the shape of `x` does not fit.
        """
        self._check(x.shape)
        f1, f2, f3, f4 = self.filters
        layers = LayerFactory(self.dtype, train, self.convolution)

        def apply_block(module: ResidualBlock, x: jax.Array) -> jax.Array:
            return module(x, train=train)

        def block(x: jax.Array, features: int, name: str, *, stride: int = 1) -> jax.Array:
            module = ResidualBlock(features, stride, self.dtype, self.convolution, name=name)
            apply = nn.remat(apply_block) if self.remat else apply_block
            return apply(module, x)

        def upsample_and_join(x: jax.Array, skip: jax.Array, name: str) -> jax.Array:
            return jnp.concatenate([Upsample(self.dtype, name=name)(x), skip], axis=-1)

        y = layers.conv_norm(x, f1, "input_conv1", "input_norm")
        y = layers.conv(y, f1, "input_conv2")
        level1 = y + layers.conv(x, f1, "input_skip")
        level2 = block(level1, f2, "residual_conv_1", stride=2)
        level3 = block(level2, f3, "residual_conv_2", stride=2)
        y = block(level3, f4, "bridge", stride=2)
        y = block(upsample_and_join(y, level3, "upsample_1"), f3, "up_residual_conv1")
        y = block(upsample_and_join(y, level2, "upsample_2"), f2, "up_residual_conv2")
        y = block(upsample_and_join(y, level1, "upsample_3"), f1, "up_residual_conv3")
        y = layers.conv(y, 1, "output_conv", size=1)
        return y.astype(jnp.float32)

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[-1] != self.in_channels:
            raise ValueError(f"ResUnet expects (N, H, W, {self.in_channels}), got {shape}")
        if shape[1] % 8 or shape[2] % 8:
            raise ValueError(
                f"ResUnet halves the resolution three times: height and width must be divisible by 8, got "
                f"{shape[1]}×{shape[2]}; pad or resize the slices"
            )


def init_variables(model: Any, key: jax.Array, image_size: int = 64) -> Variables:
    """Fresh variables; those of a `ResUnet` as PyTorch would draw them for the original.

    Args:
      model: a `ResUnet`, or another module as `ARCHITECTURES` has them.
      key: a JAX random key, of `jax.random.key` or `jax.random.PRNGKey`.
      image_size: side of the dummy slice in pixels, for modules that do not take any; of a `ResUnet` the result does
        not depend on it.

    Returns:
      {"params": ..., "batch_stats": ...}, float32, on the key's device, of several the first; the same bytes each time,
      and under jit or vmap the same but for rounding. A model without batch normalisation has {} as "batch_stats".
    """
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # whose type then tells how it is to be drawn from
    if isinstance(key, jax.core.Tracer):  # under another jit, which compiles it
        return _draw(model, image_size, key)
    config: Any = jax.config
    devices = sorted(key.devices(), key=lambda device: device.id) if key.committed else [config.jax_default_device]
    shape, partitionable = jax.ShapeDtypeStruct(key.shape, key.dtype), config.jax_threefry_partitionable
    return _compiled_draw(model, image_size, shape, devices[0], partitionable)(key)


def _draw(model: Any, image_size: int, key: jax.Array) -> Variables:
    dummy = jnp.zeros((1, image_size, image_size, model.in_channels), jnp.float32)
    return {"batch_stats": {}, **model.init(key, dummy, train=False)}


@lru_cache(maxsize=8)
def _compiled_draw(
    model: Any, image_size: int, key: jax.ShapeDtypeStruct, device: Any, partitionable: bool
) -> Callable[..., Variables]:
    """Without optimisation: dozens of random draws take XLA far longer to optimise than to run."""
    del partitionable  # decides what is drawn
    options: Any = {"xla_backend_optimization_level": 0}
    with jax.default_device(device):
        lowered = jax.jit(partial(_draw, model, image_size)).lower(key)
        compiled: Callable[..., Variables] = lowered.compile(compiler_options=options)
    return compiled
