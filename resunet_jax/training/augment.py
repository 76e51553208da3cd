"""Random flips, quarter turns and rotations of slices and their masks, on the device."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from resunet_jax.config import AugmentConfig


def random_matrix(key: jax.Array, config: AugmentConfig) -> jax.Array:
    """A random (2, 2) matrix from output to input coordinates (row, column) about the centre of a slice.

    Flips and quarter turns alone give entries of exactly 0, 1 and -1, so that they move pixels without touching them.
    """
    # One draw for all chances: each draw apart would take XLA seconds to compile.
    vertical, horizontal, turn, rotate, angle = jax.random.uniform(key, (5,))
    matrix = jnp.diag(
        jnp.stack(
            [
                jnp.where(vertical < config.vertical_flip, -1.0, 1.0),
                jnp.where(horizontal < config.horizontal_flip, -1.0, 1.0),
            ]
        )
    )
    quarter = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    matrix = jnp.where(turn < config.quarter_turn, quarter @ matrix, matrix)
    angles = jnp.deg2rad(jnp.array(config.angles_deg))
    theta = angles[jnp.int32(angle * len(config.angles_deg))]
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    rotation = jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])])
    return jnp.where(rotate < config.rotation, rotation @ matrix, matrix)


def warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Resamples (H, W, C) about its centre, bilinearly, 0 outside.

    Args:
      image: float.
      matrix: (2, 2) from output to input coordinates (row, column), in pixels.
    """
    height, width, _ = image.shape
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    rows, columns = jnp.meshgrid(jnp.arange(height) - centre[0], jnp.arange(width) - centre[1], indexing="ij")
    source = jnp.einsum("ij,jhw->ihw", matrix, jnp.stack([rows, columns])) + centre[:, None, None]

    def channel(values: jax.Array) -> jax.Array:
        return map_coordinates(values, list(source), order=1, mode="constant", cval=0.0)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


def augment(key: jax.Array, image: jax.Array, mask: jax.Array, config: AugmentConfig) -> tuple[jax.Array, jax.Array]:
    """Changes each slice of a batch and its mask alike; the same key gives the same result.

    Args:
      key: a JAX random key.
      image: float32 (N, S, S, 1) in [0, 1].
      mask: float32 (N, S, S, 1), 0 or 1.
      config: the chances.

    Returns:
      image and mask of the same shapes and ranges; what comes from outside the slice is 0.
    """
    if image.shape[1] != image.shape[2]:
        raise ValueError(f"quarter turns need square slices, got {image.shape}")

    def one(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        warped = warp(jnp.concatenate([image, mask], axis=-1), random_matrix(key, config))
        return warped[..., :1], (warped[..., 1:] > 0.5).astype(mask.dtype)

    image, mask = jax.vmap(one)(jax.random.split(key, image.shape[0]), image, mask)
    return image, mask
