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


LOSSES: dict[str, Loss] = {"bce": bce, "dice": dice, "bce_dice": bce_dice}
"""By the name that `TrainConfig.loss` gives them."""
