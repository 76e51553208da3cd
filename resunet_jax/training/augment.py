"""Random changes to slices and their masks, on the device: where things lie, and how bright they are."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from resunet_jax.config import AugmentConfig

SOFT_TISSUE = 0.87
"""Grey value of consolidated lung, 55 HU."""

AERATED_LUNG = 0.29
"""Grey value of healthy lung, -815 HU."""

_MOST_FADED = 0.7  # of the way to healthy lung: what is left can still be seen


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
    matrix = jnp.where(rotate < config.rotation, _rotation(theta) @ matrix, matrix)
    if config.max_rotation_deg or config.max_zoom:
        degrees, zoom = jax.random.uniform(jax.random.fold_in(key, 1), (2,), minval=-1)
        size = jnp.exp(zoom * jnp.log1p(config.max_zoom))
        matrix = _rotation(jnp.deg2rad(degrees * config.max_rotation_deg)) @ matrix / size
    return matrix


def _rotation(theta: jax.Array) -> jax.Array:
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    return jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])])


def jitter(key: jax.Array, image: jax.Array, config: AugmentConfig) -> jax.Array:
    """Changes the grey values of a slice as another scanner might: contrast and brightness, gamma, noise.

    Args:
      key: a JAX random key.
      image: float32 (S, S, C) in [0, 1].
      config: by how much at most; where all of it is 0, the image comes back as it is.

    Returns:
      the same shape and range.
    """
    if config.max_contrast or config.max_brightness or config.max_gamma or config.max_noise:
        contrast, brightness, gamma, noise = jax.random.uniform(key, (4,), minval=-1)
        image = image * (1 + config.max_contrast * contrast) + config.max_brightness * brightness
        # Away from 0, where the slope of a power below 1 has no bound.
        image = jnp.clip(image, 1e-6, 1) ** jnp.exp(config.max_gamma * gamma)
        deviation = config.max_noise * jnp.abs(noise)
        image = image + deviation * jax.random.normal(jax.random.fold_in(key, 1), image.shape)
        image = jnp.clip(image, 0, 1)
    return image


def change_density(key: jax.Array, image: jax.Array, mask: jax.Array, config: AugmentConfig) -> jax.Array:
    """Makes what a mask covers denser or fainter, everywhere by the same random part of the way.

    Denser goes up to soft tissue, and what is denser already stays; fainter goes most of the way down to healthy lung.

    Args:
      key: a JAX random key.
      image: float32 (S, S, 1), HU [-1250, 250] as [0, 1].
      mask: float32 (S, S, 1) in [0, 1].
      config: how often either happens; never both.

    Returns:
      the same shape and range.
    """
    if config.consolidation or config.fading:
        chance, part = jax.random.uniform(key, (2,))
        denser = jnp.where(chance < config.consolidation, part, 0.0)
        fainter = jnp.where(chance > 1 - config.fading, _MOST_FADED * part, 0.0)
        up, down = jnp.maximum(SOFT_TISSUE - image, 0), jnp.maximum(image - AERATED_LUNG, 0)
        image = image + mask * (denser * up - fainter * down)
    return image


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
    """Moves each slice of a batch and its mask alike, and changes grey values; the same key gives the same result.

    Args:
      key: a JAX random key.
      image: float32 (N, S, S, 1) in [0, 1].
      mask: float32 (N, S, S, 1), 0 or 1.
      config: the chances, and by how much.

    Returns:
      image and mask of the same shapes and ranges; what comes from outside the slice is 0, before grey values change.
    """
    if image.shape[1] != image.shape[2]:
        raise ValueError(f"quarter turns need square slices, got {image.shape}")

    def one(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        warped = warp(jnp.concatenate([image, mask], axis=-1), random_matrix(key, config))
        image, covered = warped[..., :1], warped[..., 1:]
        image = change_density(jax.random.fold_in(key, 3), image, covered, config)
        image = jitter(jax.random.fold_in(key, 2), image, config)
        return image, (covered > 0.5).astype(mask.dtype)

    image, mask = jax.vmap(one)(jax.random.split(key, image.shape[0]), image, mask)
    return image, mask
