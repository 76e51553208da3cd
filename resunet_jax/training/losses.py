"""Losses from logits, one value an example; the caller reduces."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def bce(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Binary cross-entropy, mean over the pixels of each example, in nats.

    Args:
      logits: float (N, H, W, 1).
      target: same shape, in [0, 1].

    Returns:
      (N,), each ≥ 0; finite for any finite logits, empty targets included.
    """
    return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(logits, target), axis=(1, 2, 3))


def dice(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Soft Dice loss, 1 - (2|P∩T| + 2) / (|P| + |T| + 2), of each example.

    Source: Milletari et al., "V-Net", 3DV 2016, as `optax.losses.binary_dice_loss` computes it with a smoothing of 1.

    Args:
      logits: float (N, H, W, 1).
      target: same shape, in [0, 1].

    Returns:
      (N,), each in [0, 1); 0 where both prediction and target are empty.
    """
    loss: jax.Array = optax.losses.binary_dice_loss(logits, target)
    return loss


def bce_dice(logits: jax.Array, target: jax.Array) -> jax.Array:
    """The sum of `bce` and `dice`."""
    return bce(logits, target) + dice(logits, target)


def pooled_dice(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Soft Dice loss over the pixels of all examples together, the same value for each of them.

    For slices of which many do not show the structure: each of these alone would cost as much for a few false pixels as
    a slice full of the structure that is missed, which teaches a model to find nothing.

    Args:
      logits: float (N, H, W, 1).
      target: same shape, in [0, 1].

    Returns:
      (N,), each in [0, 1).
    """
    one = (1, -1, *logits.shape[2:])
    return jnp.broadcast_to(dice(logits.reshape(one), target.reshape(one)), logits.shape[:1])


def bce_pooled_dice(logits: jax.Array, target: jax.Array) -> jax.Array:
    """The sum of `bce` and `pooled_dice`."""
    return bce(logits, target) + pooled_dice(logits, target)


LOSSES: dict[str, Loss] = {"bce": bce, "dice": dice, "bce_dice": bce_dice, "bce_pooled_dice": bce_pooled_dice}
"""By the name that `TrainConfig.loss` gives them."""
