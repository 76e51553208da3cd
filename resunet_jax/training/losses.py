"""Losses as sums that add up over batches, and the value formed from them once.

A loss is one function and one row of `LOSSES`. Because its sums are additive, the validation loss is that of all
validation slices together: it depends neither on the batch size, nor on the order of slices, nor on padding.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from resunet_jax.errors import InputError

Sums = Mapping[str, Any]


class Loss(NamedTuple):
    """One term of a training loss.

    Attributes:
      sums: (logits float (N, H, W, 1), mask of the same shape in [0, 1], valid (N,) in {0, 1}) to a tree of scalars,
        over the valid examples; those of several batches add up.
      value: these scalars, added up over any number of batches, to the loss.
    """

    sums: Callable[[jax.Array, jax.Array, jax.Array], dict[str, Any]]
    value: Callable[[Sums], Any]


def _checked(logits: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as float32, in which sums over a slice do not overflow; a mask of another shape would be broadcast."""
    if logits.shape != mask.shape:
        raise ValueError(
            f"logits have shape {logits.shape}, the mask {mask.shape}: give the target, as in mask[..., :1]"
        )
    return logits.astype(jnp.float32), mask.astype(jnp.float32)


def bce(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Binary cross-entropy, mean over the pixels of each example, in nats.

    Args:
      logits: float (N, H, W, 1).
      mask: same shape, in [0, 1].

    Returns:
      float32 (N,), each ≥ 0; finite for logits up to 1e30, empty masks included.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(bce(jnp.zeros((2, 8, 8, 1)), jnp.ones((2, 8, 8, 1))).round(4))  # log 2
      [0.6931 0.6931]
    """
    logits, mask = _checked(logits, mask)
    return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(logits, mask), axis=(1, 2, 3))


def dice(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Soft Dice loss, 1 - (2|P∩T| + 2) / (|P| + |T| + 2), of each example.

    Source: Milletari et al., "V-Net", 3DV 2016, as `optax.losses.binary_dice_loss` computes it with a smoothing of 1.

    Args:
      logits: float (N, H, W, 1).
      mask: same shape, in [0, 1].

    Returns:
      float32 (N,), each in [0, 1); 0 where both prediction and mask are empty.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> mask = jnp.zeros((1, 8, 8, 1)).at[:, :4].set(1)
      >>> sure = 100 * (2 * mask - 1)
      >>> print(dice(sure, mask), dice(-sure, mask) > 0.95)  # 0, and 1 - 2 / 66
      [0.] [ True]
    """
    return optax.losses.binary_dice_loss(*_checked(logits, mask))


def pooled_dice(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Soft Dice loss over the pixels of all examples together, the same value for each of them.

    For slices of which many do not show the structure: each of these alone would cost as much for a few false pixels as
    a slice full of the structure that is missed, which teaches a model to find nothing.

    Args:
      logits: float (N, H, W, 1).
      mask: same shape, in [0, 1].

    Returns:
      float32 (N,), each in [0, 1).

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = jnp.zeros((2, 8, 8, 1)).at[0].set(1)
      >>> print(pooled_dice(100 * (2 * masks - 1), masks))
      [0. 0.]
    """
    value = _pooled_dice_value(_pooled_dice_sums(logits, mask, jnp.ones(logits.shape[0])))
    return jnp.broadcast_to(value, logits.shape[:1])


def bce_dice(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum of `bce` and `dice`."""
    return bce(logits, mask) + dice(logits, mask)


def bce_pooled_dice(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum of `bce` and `pooled_dice`."""
    return bce(logits, mask) + pooled_dice(logits, mask)


def mean_over_examples(per_example: Callable[[jax.Array, jax.Array], jax.Array]) -> Loss:
    """The loss that is the mean of one value per example, as `bce` and `dice` return it."""

    def sums(logits: jax.Array, mask: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
        return {"total": jnp.sum(per_example(logits, mask) * valid), "examples": jnp.sum(valid)}

    return Loss(sums, lambda sums: sums["total"] / sums["examples"])


def _pooled_dice_sums(logits: jax.Array, mask: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
    logits, mask = _checked(logits, mask)
    probability, weight = jax.nn.sigmoid(logits), valid[:, None, None, None]
    return {
        "intersection": jnp.sum(probability * mask * weight),
        "predicted": jnp.sum(probability * weight),
        "reference": jnp.sum(mask * weight),
    }


def _pooled_dice_value(sums: Sums) -> Any:
    return 1 - (2 * sums["intersection"] + 2) / (sums["predicted"] + sums["reference"] + 2)


LOSSES: dict[str, Loss] = {
    "bce": mean_over_examples(bce),
    "dice": mean_over_examples(dice),
    "pooled_dice": Loss(_pooled_dice_sums, _pooled_dice_value),
}
"""By the name in `TrainConfig.loss`."""


def make_loss(terms: str, losses: Mapping[str, Loss] = LOSSES) -> Loss:
    """The weighted sum that a config's `loss` describes.

    Args:
      terms: names of `losses` with weights, as in "bce:1,pooled_dice:0.5"; a name alone has the weight 1.
      losses: the table.

    Raises:
      InputError: a name that the table lacks, twice the same, or a weight that is not a positive number.
    """
    weights: dict[str, float] = {}
    for term in terms.split(","):
        name, colon, weight = (part.strip() for part in term.partition(":"))
        if name not in losses or name in weights:
            raise InputError(f"loss {terms!r}: {name!r} is not one of {', '.join(losses)}, each at most once")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            weights[name] = 0
        if not 0 < weights[name] < float("inf"):
            raise InputError(f"loss {terms!r}: the weight of {name} is {weight!r}; it must be a positive number")

    def sums(logits: jax.Array, mask: jax.Array, valid: jax.Array) -> dict[str, Any]:
        return {name: losses[name].sums(logits, mask, valid) for name in weights}

    def value(sums: Sums) -> Any:
        return sum(weight * losses[name].value(sums[name]) for name, weight in weights.items())

    return Loss(sums, value)
