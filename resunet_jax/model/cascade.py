"""Lung, then infection on [CT, lung probability]: one pure function over a batch of slices."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from resunet_jax.model.resunet import ResUnet, Variables

ArrayT = TypeVar("ArrayT", bound=Any)


class Averaging(NamedTuple):
    """Test-time augmentation: the views of a slice over which its probability is the mean.

    Attributes:
      mirroring: the slice and its left–right mirror image, so a scan that lies mirrored gets the same probabilities,
        mirrored.
      context: the slice with the slices around it, and with itself in their place; with `mirroring`, the mirror image
        is the one without, and the darker half of the slice is first turned to the left: two views, not four.
    """

    mirroring: bool = False
    context: bool = False


_ONE_VIEW = Averaging()


def split_patches(x: jax.Array, factor: int) -> jax.Array:
    """Cuts (N, H, W, C) into (N·factor², H/factor, W/factor, C), row by row; exact inverse of `join_patches`.

    Example:
      >>> import jax.numpy as jnp
      >>> split_patches(jnp.arange(4).reshape(1, 2, 2, 1), factor=2).ravel().tolist()
      [0, 1, 2, 3]
    """
    n, h, w, c = x.shape
    if factor < 1 or h % factor or w % factor:
        raise ValueError(f"slices of {h}×{w} cannot be cut into {factor} × {factor} patches")
    x = x.reshape(n, factor, h // factor, factor, w // factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n * factor**2, h // factor, w // factor, c)


def join_patches(x: jax.Array, factor: int) -> jax.Array:
    """Puts (N·factor², h, w, C) together again as (N, h·factor, w·factor, C)."""
    n, h, w, c = x.shape
    x = x.reshape(n // factor**2, factor, factor, h, w, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n // factor**2, h * factor, w * factor, c)


def apply_logits(
    model: ResUnet, variables: Variables, x: jax.Array, *, train: bool, patch_grid: int = 1
) -> tuple[jax.Array, Any]:
    """Logits, by patches if asked, and the updated batch statistics.

    Args:
      model: the module.
      variables: {"params": ..., "batch_stats": ...}.
      x: (N, H, W, C) in [0, 1].
      train: see `ResUnet.__call__`.
      patch_grid: f cuts each slice into f × f patches that are processed independently.

    Returns:
      float32 logits (N, H, W, 1), and "batch_stats": updated if `train`, as given otherwise.
    """
    patches = split_patches(x, patch_grid)
    if train:
        logits, updates = model.apply(variables, patches, train=True, mutable=["batch_stats"])
        batch_stats = updates.get("batch_stats", {})
    else:
        logits, batch_stats = model.apply(variables, patches, train=False), variables.get("batch_stats", {})
    return join_patches(logits, patch_grid), batch_stats


def predict_probability(
    model: ResUnet, variables: Variables, x: jax.Array, *, patch_grid: int = 1, averaging: Averaging = _ONE_VIEW
) -> jax.Array:
    """The mean of `predict_views`, float32 (N, H, W, 1) in [0, 1]; for arguments see there."""
    return arithmetic_mean(predict_views(model, variables, x, patch_grid=patch_grid, averaging=averaging))


def arithmetic_mean(views: Sequence[jax.Array]) -> jax.Array:
    """Arithmetic mean of arrays of one shape."""
    return sum(views[1:], start=views[0]) / len(views)


def geometric_mean(views: Sequence[jax.Array]) -> jax.Array:
    """Geometric mean of arrays of one shape, at least 0: high only where all of them are."""
    return math.prod(views[1:], start=views[0]) ** (1 / len(views))


def predict_views(
    model: ResUnet, variables: Variables, x: jax.Array, *, patch_grid: int = 1, averaging: Averaging = _ONE_VIEW
) -> tuple[jax.Array, ...]:
    """Probabilities by each view of slices `x`, (N, H, W, C) in [0, 1], and by the running statistics.

    `averaging` says which views; `averaging.context` is for models with context alone. For the other arguments see
    `apply_logits`.

    Returns:
      for each view float32 (N, H, W, 1) in [0, 1], lying as the slices do.
    """

    def probability(x: jax.Array) -> jax.Array:
        logits, _ = apply_logits(model, variables, x, train=False, patch_grid=patch_grid)
        return jax.nn.sigmoid(logits)

    if not any(averaging):
        return (probability(x),)
    if not averaging.context:
        return probability(x), _mirror(probability(_mirror(x)))
    if not averaging.mirroring:
        return probability(x), probability(without_context(x))
    turned = _left_is_brighter(x)
    x = jnp.where(turned, _mirror(x), x)
    views = probability(x), _mirror(probability(_mirror(without_context(x))))
    return tuple(jnp.where(turned, _mirror(view), view) for view in views)


def _mirror(x: jax.Array) -> jax.Array:
    return x[:, :, ::-1]


def _left_is_brighter(x: jax.Array) -> jax.Array:
    """Whether the first half of the columns of a slice is the brighter one: bool (N, 1, 1, 1), for `x` (N, H, W, C)."""
    half = x.shape[2] // 2
    return jnp.sum((x - _mirror(x))[:, :, :half, :1], axis=(1, 2, 3), keepdims=True) > 0


def close_lung_probability(probability: jax.Array, fraction: float) -> jax.Array:
    """Morphological closing of the lung probability by a square: fills holes and bays that the lung model leaves.

    A lung model misses dense lesions that it has not seen the like of, and an infection model that trusts it misses
    them too.

    Args:
      probability: (N, H, W, 1).
      fraction: width of what is filled, as a fraction of W; 0 leaves everything as it is.

    Returns:
      the same shape, nowhere lower, and with no value that is not in `probability`.

    Example:
      >>> import jax.numpy as jnp
      >>> row = jnp.array([1.0, 1, 0, 1, 1, 0, 0, 0])
      >>> square = jnp.broadcast_to(row[None, None, :, None], (1, 8, 8, 1))
      >>> close_lung_probability(square, fraction=0.25)[0, 4, :, 0].tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    width = 2 * round(fraction * probability.shape[2] / 2) + 1

    def highest(x: jax.Array) -> jax.Array:  # in a square around each pixel; by rows, then by columns, which is faster
        for window in ((width, 1), (1, width)):  # by keywords with strides: the terms that jax2onnx knows
            x = nn.max_pool(x, window_shape=window, strides=(1, 1), padding="SAME")
        return x

    return -highest(-highest(probability)) if width > 1 else probability


def symmetric_context(image: ArrayT) -> ArrayT:
    """CT (N, H, W, 3) with the darker and the brighter of the slices below and above, pixel by pixel, in their place.

    A model cannot tell them apart, so a header that is wrong about up and down changes nothing. Without context the
    image is as it was.
    """
    if image.shape[-1] != 3:
        return image
    slices, below, above = jnp.split(image, 3, axis=-1)
    ordered: Any = jnp.concatenate([slices, jnp.minimum(below, above), jnp.maximum(below, above)], axis=-1)
    return ordered


def without_context(x: ArrayT) -> ArrayT:
    """CT with context, and perhaps more channels behind its three, with each slice in the place of those around it.

    Args:
      x: (N, H, W, C), C at least 3.
    """
    alone: Any = jnp.concatenate([x[..., :1]] * 3 + [x[..., 3:]], axis=-1)
    return alone


def lung_input(lung_model: ResUnet, image: ArrayT) -> ArrayT:
    """What the lung model sees of CT (N, H, W, C): its first `in_channels` channels, see `symmetric_context`."""
    return symmetric_context(image[..., : lung_model.in_channels])


def infection_input(infection_model: ResUnet, image: jax.Array, lung_probability: jax.Array | None) -> jax.Array:
    """What the infection model sees: CT, see `symmetric_context`, and perhaps the closed lung probability.

    Args:
      infection_model: says which, by its `in_channels`, and how far to close, by its `closing_fraction`.
      image: CT (N, H, W, C), see `prepare_volume`.
      lung_probability: (N, H, W, 1); may be None for CT alone.
    """
    image = symmetric_context(image)
    if infection_model.in_channels == image.shape[-1]:
        return image
    if infection_model.in_channels != image.shape[-1] + 1:
        raise ValueError(
            f"this model sees {infection_model.in_channels} channels, slices with {image.shape[-1]} are given: prepare "
            "them as its config says"
        )
    if lung_probability is None:
        raise ValueError("this infection model was trained on [CT, lung probability]: give it a lung model")
    return jnp.concatenate([image, close_lung_probability(lung_probability, infection_model.closing_fraction)], axis=-1)


def cascade(
    lung_model: ResUnet,
    infection_model: ResUnet,
    lung_variables: Variables,
    infection_variables: Variables,
    image: jax.Array,
    *,
    lung_patch_grid: int = 1,
    infection_patch_grid: int = 1,
    lung_averaging: Averaging = _ONE_VIEW,
    infection_averaging: Averaging = _ONE_VIEW,
) -> tuple[jax.Array, jax.Array]:
    """Both probabilities for a batch of slices; jit, vmap and differentiate it as you like.

    Args:
      lung_model: see `lung_input`.
      infection_model: see `infection_input`.
      lung_variables: of the lung model; nothing stops gradients to them.
      infection_variables: of the infection model.
      image: CT (N, H, W, C) in [0, 1], prepared as the models' configs say; H and W divisible by 8.
      lung_patch_grid: see `apply_logits`.
      infection_patch_grid: see `apply_logits`.
      lung_averaging: see `predict_probability`.
      infection_averaging: see `predict_probability`.

    Returns:
      lung probability and infection probability, each float32 (N, H, W, 1) in [0, 1].

    Example:
      >>> import jax
      >>> from resunet_jax import ResUnet, cascade, init_variables
      >>> lung, infection = (ResUnet(in_channels=n, filters=(4, 8, 16, 32)) for n in (1, 2))
      >>> variables = [init_variables(model, jax.random.key(0)) for model in (lung, infection)]
      >>> image = jax.random.uniform(jax.random.key(1), (2, 32, 32, 1))
      >>> probabilities = cascade(lung, infection, *variables, image)
      >>> [one.shape for one in probabilities]
      [(2, 32, 32, 1), (2, 32, 32, 1)]
    """
    slices = lung_input(lung_model, image)
    lung = predict_probability(lung_model, lung_variables, slices, patch_grid=lung_patch_grid, averaging=lung_averaging)
    stacked = infection_input(infection_model, image, lung)
    infection = predict_probability(
        infection_model, infection_variables, stacked, patch_grid=infection_patch_grid, averaging=infection_averaging
    )
    return lung, infection
