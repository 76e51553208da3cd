"""Random transforms of slices and their masks, on the device.

A transform is one function of one slice and one row of `AUGMENTATIONS`: from a JAX random key, the image, float32
(S, S, C) in [0, 1], its mask, float32 (S, S, 1 + C) in [0, 1], and the config to image and mask of the same shapes and
ranges. The first channel of the image is the slice itself; the first channel of the mask is the target, the others are
the infection in each channel of the image. What the config has at 0 is left as it is.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from resunet_jax.config import AugmentConfig
from resunet_jax.errors import InputError

Augmentation = Callable[[jax.Array, jax.Array, jax.Array, AugmentConfig], tuple[jax.Array, jax.Array]]

SOFT_TISSUE = 0.87
"""Intensity of consolidated lung, 55 HU."""

AERATED_LUNG = 0.29
"""Intensity of healthy lung, -815 HU."""

_MAX_FADE = 0.7  # of the way to healthy lung: what is left can still be seen


def random_affine(key: jax.Array, config: AugmentConfig) -> jax.Array:
    """A random (2, 2) matrix from output to input coordinates (row, column) about the centre of a slice.

    Flips and 90° rotations alone give entries of exactly 0, 1 and -1: they move pixels without resampling them.
    """
    # One draw for all probabilities: each draw on its own would take XLA seconds to compile.
    vertical, horizontal, rot90, rotate, angle = jax.random.uniform(key, (5,))
    matrix = jnp.diag(
        jnp.stack(
            [
                jnp.where(vertical < config.vertical_flip_prob, -1.0, 1.0),
                jnp.where(horizontal < config.horizontal_flip_prob, -1.0, 1.0),
            ]
        )
    )
    quarter = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    matrix = jnp.where(rot90 < config.rot90_prob, _product(quarter, matrix), matrix)
    angles = jnp.deg2rad(jnp.array(config.angles_deg))
    theta = angles[jnp.int32(angle * len(config.angles_deg))]
    matrix = jnp.where(rotate < config.rotation_prob, _product(_rotation(theta), matrix), matrix)
    if config.max_rotation_deg or config.max_scale:
        degrees, scale = jax.random.uniform(jax.random.fold_in(key, 1), (2,), minval=-1)
        size = jnp.exp(scale * jnp.log1p(config.max_scale))
        matrix = _product(_rotation(jnp.deg2rad(degrees * config.max_rotation_deg)), matrix) / size
    return matrix


def _product(matrix: jax.Array, coordinates: jax.Array) -> jax.Array:
    """Of (2, 2) and (2, ...): in float32 on accelerators, too, whose fast products round a coordinate to 8 bits."""
    return jnp.einsum("ij,j...->i...", matrix, coordinates, precision=jax.lax.Precision.HIGHEST)


def _rotation(theta: jax.Array) -> jax.Array:
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    return jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])])


def warp(image: jax.Array, matrix: jax.Array, fill: float) -> jax.Array:
    """Resamples (H, W, C) about its centre, bilinearly.

    Args:
      image: float.
      matrix: (2, 2) from output to input coordinates (row, column), in pixels.
      fill: what lies outside.
    """
    height, width, _ = image.shape
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    rows, columns = jnp.meshgrid(jnp.arange(height) - centre[0], jnp.arange(width) - centre[1], indexing="ij")
    source = _product(matrix, jnp.stack([rows, columns])) + centre[:, None, None]

    def channel(values: jax.Array) -> jax.Array:
        return map_coordinates(values, list(source), order=1, mode="constant", cval=fill)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


def spatial(key: jax.Array, image: jax.Array, mask: jax.Array, config: AugmentConfig) -> tuple[jax.Array, jax.Array]:
    """Flips, rotates and scales a slice and its mask alike, see `random_affine`.

    What comes from outside the slice is `fill`, and not in the mask.
    """
    matrix = random_affine(key, config)
    return warp(image, matrix, config.fill), warp(mask, matrix, 0.0)


def lesion_intensity(
    key: jax.Array, image: jax.Array, mask: jax.Array, config: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
    """Makes the infection denser or fainter, everywhere by the same random fraction of the way.

    Denser goes up to soft tissue, and what is denser already stays; fainter goes most of the way down to healthy lung;
    never both. The image is HU [-1250, 250] as [0, 1]; the mask stays.

    Raises:
      ValueError: the mask has fewer channels than the image.
    """
    if config.lesion_densify_prob or config.lesion_fade_prob:
        if mask.shape[-1] < image.shape[-1]:
            raise ValueError(f"the mask {mask.shape} does not tell the infection in each channel of {image.shape}")
        chance, fraction = jax.random.uniform(key, (2,))
        denser = jnp.where(chance < config.lesion_densify_prob, fraction, 0.0)
        fainter = jnp.where(chance > 1 - config.lesion_fade_prob, _MAX_FADE * fraction, 0.0)
        up, down = jnp.maximum(SOFT_TISSUE - image, 0), jnp.maximum(image - AERATED_LUNG, 0)
        image = image + mask[..., -image.shape[-1] :] * (denser * up - fainter * down)
    return image, mask


def intensity(key: jax.Array, image: jax.Array, mask: jax.Array, config: AugmentConfig) -> tuple[jax.Array, jax.Array]:
    """Changes the intensities of a slice as another scanner might: contrast and brightness, gamma, noise.

    The mask, of any shape, stays.
    """
    if config.max_contrast or config.max_brightness or config.max_gamma or config.max_noise:
        contrast, brightness, gamma, noise = jax.random.uniform(key, (4,), minval=-1)
        image = image * (1 + config.max_contrast * contrast) + config.max_brightness * brightness
        # Away from 0, where the slope of a power below 1 has no bound.
        image = jnp.clip(image, 1e-6, 1) ** jnp.exp(config.max_gamma * gamma)
        deviation = config.max_noise * jnp.abs(noise)
        image = image + deviation * jax.random.normal(jax.random.fold_in(key, 1), image.shape)
        image = jnp.clip(image, 0, 1)
    return image, mask


def context_dropout(
    key: jax.Array, image: jax.Array, mask: jax.Array, config: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
    """Puts the slice itself in the place of those below and above it, so that a model learns to do without them.

    Where slices lie far apart, their neighbours say little, and mislead a model that never saw such a scan.
    """
    if config.context_dropout_prob and image.shape[-1] > 1:
        dropped = jax.random.uniform(key) < config.context_dropout_prob
        image = jnp.where(dropped, image[..., :1], image)
        infection = jnp.where(dropped, mask[..., 1:2], mask[..., 1:])
        mask = jnp.concatenate([mask[..., :1], infection], axis=-1)
    return image, mask


AUGMENTATIONS: dict[str, Augmentation] = {
    "spatial": spatial,
    "lesion_intensity": lesion_intensity,
    "intensity": intensity,
    "context_dropout": context_dropout,
}
"""By the name in `AugmentConfig.transforms`; the mask between them is float in [0, 1]."""


def check_transforms(config: AugmentConfig, augmentations: Mapping[str, Augmentation] = AUGMENTATIONS) -> None:
    """Raises `InputError` where a transform of the config is not in the table."""
    for name in config.transforms:
        if name not in augmentations:
            raise InputError(
                f"augmentation {name!r}: unknown; there are {', '.join(augmentations)}; install the plugin with it"
            )


def augment(
    key: jax.Array,
    image: jax.Array,
    mask: jax.Array,
    config: AugmentConfig,
    augmentations: Mapping[str, Augmentation] = AUGMENTATIONS,
) -> tuple[jax.Array, jax.Array]:
    """Applies the transforms of a config to each slice of a batch; the same key gives the same result.

    Args:
      key: a JAX random key, split over the slices and then over the transforms.
      image: float32 (N, S, S, C) in [0, 1].
      mask: (N, S, S, 1 + C), 0 or 1: the target, and the infection in each channel of the image; the target alone is
        enough for transforms that ask for no infection.
      config: which transforms, how often and by how much.
      augmentations: the table to find them in.

    Returns:
      image and mask of the same shapes, types and ranges.

    Raises:
      ValueError: the slices are not square, or the mask has another shape.
    """
    if image.shape[1] != image.shape[2]:
        raise ValueError(f"90° rotations need square slices, got {image.shape}")
    if mask.ndim != 4 or mask.shape[:3] != image.shape[:3]:
        raise ValueError(f"the mask of slices {image.shape} has shape {mask.shape}; it must be (N, S, S, 1 + C)")

    def one(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        covered = mask.astype(jnp.float32)
        for own_key, name in zip(jax.random.split(key, len(config.transforms)), config.transforms, strict=True):
            image, covered = augmentations[name](own_key, image, covered, config)
        return image, (covered > 0.5).astype(mask.dtype)

    image, mask = jax.vmap(one)(jax.random.split(key, image.shape[0]), image, mask)
    return image, mask
