import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resunet_jax.config import AugmentConfig
from resunet_jax.errors import InputError
from resunet_jax.recipes import recipe
from resunet_jax.training import augment as module
from resunet_jax.training.augment import (
    AERATED_LUNG,
    AUGMENTATIONS,
    SOFT_TISSUE,
    check_transforms,
    context_dropout,
    intensity,
    lesion_intensity,
    random_affine,
    warp,
)

augment = jax.jit(module.augment, static_argnums=3)

ORIGINAL = recipe("original", "lung").augment
NONE = AugmentConfig(transforms=())
NEVER = AugmentConfig(
    horizontal_flip_prob=0,
    max_rotation_deg=0,
    max_scale=0,
    max_contrast=0,
    max_brightness=0,
    max_gamma=0,
    max_noise=0,
    fill=0.0,
)


def only(**changes) -> AugmentConfig:
    """All transforms, of which only these do anything."""
    return dataclasses.replace(NEVER, **changes)


@pytest.fixture
def pair(rng: np.random.Generator):
    image = jnp.array(rng.random((6, 16, 16, 1)), jnp.float32)
    return image, (image > 0.7).astype(jnp.float32)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (NONE, lambda x: x),
        (NEVER, lambda x: x),
        (only(vertical_flip_prob=1), lambda x: x[:, ::-1]),
        (only(horizontal_flip_prob=1), lambda x: x[:, :, ::-1]),
        (only(vertical_flip_prob=1, horizontal_flip_prob=1), lambda x: x[:, ::-1, ::-1]),
        (only(rot90_prob=1), lambda x: np.rot90(x, axes=(1, 2))),
        (only(rotation_prob=1, angles_deg=(0.0,)), lambda x: x),
    ],
)
def test_flips_and_90_degree_rotations_are_exact(pair, config: AugmentConfig, expected) -> None:
    image, mask = augment(jax.random.key(0), *pair, config)
    np.testing.assert_array_equal(image, expected(np.asarray(pair[0])))
    np.testing.assert_array_equal(mask, expected(np.asarray(pair[1])))


def test_rotation_is_counter_clockwise() -> None:
    image = jnp.zeros((1, 33, 33, 1)).at[0, 16, 28].set(1.0)  # to the right of the centre
    turned, _ = augment(jax.random.key(0), image, image, only(rotation_prob=1, angles_deg=(30.0,)))
    row, column = np.unravel_index(np.argmax(turned[0, ..., 0]), (33, 33))
    assert (row, column) == (16 - 6, 16 + 10)


def test_same_key_same_result_and_other_key_another(pair) -> None:
    first, again, other = (augment(jax.random.key(seed), *pair, ORIGINAL)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_mask_follows_image_and_stays_binary(pair) -> None:
    _, mask = pair
    image_out, mask_out = augment(
        jax.random.key(3), mask, mask, dataclasses.replace(ORIGINAL, rotation_prob=1, max_scale=0.3)
    )
    assert set(np.unique(mask_out)) <= {0.0, 1.0}
    np.testing.assert_array_equal(image_out > 0.5, mask_out > 0)
    assert 0 <= float(image_out.min()) <= float(image_out.max()) <= 1


def test_scale_and_rotation_stay_within_their_limits_and_reach_them() -> None:
    config = only(max_rotation_deg=20.0, max_scale=0.25)
    matrices = np.asarray(jax.vmap(lambda k: random_affine(k, config))(jax.random.split(jax.random.key(0), 4000)))
    size = 1 / np.sqrt(np.linalg.det(matrices))
    angle = np.rad2deg(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    for values, low, high in ((np.log(size), -np.log(1.25), np.log(1.25)), (angle, -20, 20)):
        assert low - 1e-4 < values.min() < low * 0.99
        assert high * 0.99 < values.max() < high + 1e-4
        np.testing.assert_allclose(values.std(), (high - low) / np.sqrt(12), rtol=0.05)  # uniform


@pytest.mark.parametrize("flipped_axis", [0, 1])
def test_scale_and_rotation_do_not_depend_on_the_flips(flipped_axis: int) -> None:
    config = only(max_rotation_deg=20.0, max_scale=0.25, vertical_flip_prob=0.5, horizontal_flip_prob=0.5)
    matrices = np.asarray(jax.vmap(lambda k: random_affine(k, config))(jax.random.split(jax.random.key(0), 4000)))
    signs = np.sign(matrices[:, [0, 1], [0, 1]])  # of the diagonal, as rotations are small
    angle = np.arctan2(matrices[:, 0, 1] * signs[:, 1], matrices[:, 0, 0] * signs[:, 0])
    size = np.log(np.abs(np.linalg.det(matrices)))
    for values in (angle, size):
        assert abs(np.corrcoef(values, signs[:, flipped_axis])[0, 1]) < 0.06


def test_scale_enlarges() -> None:
    image = jnp.zeros((1, 33, 33, 1)).at[0, 12:21, 12:21].set(1.0)
    keys = jax.random.split(jax.random.key(1), 40)
    areas = [float(augment(key, image, image, only(max_scale=0.5))[0].sum()) for key in keys]
    own_keys = [jax.random.split(jax.random.split(key, 1)[0], len(NEVER.transforms))[0] for key in keys]
    sizes = [float(1 / random_affine(key, only(max_scale=0.5))[0, 0]) for key in own_keys]
    np.testing.assert_allclose(areas, 81 * np.square(sizes), rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_contrast": 0.2}, lambda x: (0.8 * x, 1.2 * x)),
        ({"max_brightness": 0.1}, lambda x: (x - 0.1, x + 0.1)),
        ({"max_gamma": 0.5}, lambda x: (x ** np.exp(0.5), x ** np.exp(-0.5))),
    ],
)
def test_intensities_change_by_as_much_as_said(changes: dict, expected) -> None:
    image = jnp.linspace(0.2, 0.8, 16).reshape(4, 4, 1)
    config = only(**changes)
    keys = jax.random.split(jax.random.key(0), 2000)
    changed = np.asarray(jax.vmap(lambda key: intensity(key, image, image, config)[0])(keys))
    low, high = expected(np.asarray(image))
    np.testing.assert_allclose(changed.min(axis=0), low, atol=2e-3)
    np.testing.assert_allclose(changed.max(axis=0), high, atol=2e-3)


def test_densified_lesions_go_up_to_soft_tissue_in_the_mask_alone() -> None:
    image = jnp.array([0.2, 0.5, 0.95, 0.3]).reshape(2, 2, 1)
    mask = jnp.array([1.0, 1.0, 1.0, 0.0]).reshape(2, 2, 1)
    keys = jax.random.split(jax.random.key(0), 4000)
    config = only(lesion_densify_prob=0.4)
    filled = np.asarray(jax.vmap(lambda key: lesion_intensity(key, image, mask, config)[0])(keys)).reshape(-1, 4)
    np.testing.assert_array_equal(filled[:, 2:], np.tile([0.95, 0.3], (4000, 1)).astype(np.float32))
    changed = filled[:, 0] > 0.2
    assert abs(changed.mean() - 0.4) < 0.03
    assert SOFT_TISSUE - 0.01 < filled[:, :2].max() <= SOFT_TISSUE + 1e-6
    fractions = (filled[changed, :2] - [0.2, 0.5]) / (SOFT_TISSUE - np.array([0.2, 0.5]))
    np.testing.assert_allclose(fractions[:, 0], fractions[:, 1], atol=1e-5)  # the same everywhere
    np.testing.assert_allclose(fractions.mean(), 0.5, atol=0.03)


def test_faded_lesions_go_down_towards_healthy_lung_in_the_mask_alone() -> None:
    image = jnp.array([0.2, 0.5, 0.95, 0.6]).reshape(2, 2, 1)
    mask = jnp.array([1.0, 1.0, 1.0, 0.0]).reshape(2, 2, 1)
    keys = jax.random.split(jax.random.key(0), 4000)
    both = only(lesion_densify_prob=0.4, lesion_fade_prob=0.3)
    changed = np.asarray(jax.vmap(lambda key: lesion_intensity(key, image, mask, both)[0])(keys)).reshape(-1, 4)
    np.testing.assert_array_equal(changed[:, 3], np.full(4000, 0.6, np.float32))
    fainter, denser = changed[:, 1] < 0.5, changed[:, 1] > 0.5
    assert abs(fainter.mean() - 0.3) < 0.03
    assert abs(denser.mean() - 0.4) < 0.03
    np.testing.assert_array_equal(changed[fainter, 0], np.full(fainter.sum(), 0.2, np.float32))  # darker already
    fractions = (np.array([0.5, 0.95]) - changed[fainter, 1:3]) / (np.array([0.5, 0.95]) - AERATED_LUNG)
    np.testing.assert_allclose(fractions[:, 0], fractions[:, 1], atol=1e-5)
    assert 0 < fractions.min() < 0.01
    assert 0.69 < fractions.max() <= 0.7 + 1e-6


def test_lesions_change_in_each_channel_where_its_own_mask_says() -> None:
    image, mask = jnp.full((4, 4, 3), 0.4), jnp.zeros((4, 4, 4))
    mask = mask.at[0, :, 1].set(1).at[1, :, 2].set(1).at[2, :, 3].set(1).at[3, :, 0].set(1)  # the target is elsewhere
    changed, same = lesion_intensity(jax.random.key(0), image, mask, only(lesion_densify_prob=1))
    np.testing.assert_array_equal(changed > 0.4, mask[..., 1:] > 0)
    np.testing.assert_array_equal(same, mask)


def test_context_is_dropped_as_often_as_said_from_image_and_mask_alike() -> None:
    image = jnp.array([0.2, 0.5, 0.9]).reshape(1, 1, 3) * jnp.ones((2, 2, 1))
    mask = jnp.array([1.0, 0.0, 1.0, 0.5]).reshape(1, 1, 4) * jnp.ones((2, 2, 1))
    keys = jax.random.split(jax.random.key(0), 4000)
    images, masks = jax.vmap(lambda key: context_dropout(key, image, mask, only(context_dropout_prob=0.3)))(keys)
    dropped = np.asarray(images)[:, 0, 0, 1] == np.float32(0.2)
    assert abs(dropped.mean() - 0.3) < 0.03
    for number, expected_image, expected_mask in ((~dropped, image, mask), (dropped, image[..., :1], mask[..., 1:2])):
        np.testing.assert_array_equal(images[number], np.broadcast_to(expected_image, (number.sum(), 2, 2, 3)))
        infection = np.broadcast_to(expected_mask[..., -3:], (number.sum(), 2, 2, 3))
        np.testing.assert_array_equal(masks[number, ..., 1:], infection)
    np.testing.assert_array_equal(masks[..., 0], np.ones((4000, 2, 2)))  # the target stays


def test_without_context_there_is_none_to_drop(pair) -> None:
    image, mask = augment(jax.random.key(0), *pair, only(context_dropout_prob=1))
    np.testing.assert_array_equal(image, pair[0])
    np.testing.assert_array_equal(mask, pair[1])


def test_a_mask_that_does_not_tell_each_channels_infection_is_refused() -> None:
    image = jnp.ones((2, 8, 8, 3))
    with pytest.raises(ValueError, match="does not tell the infection in each channel"):
        augment(jax.random.key(0), image, image[..., :1], only(lesion_fade_prob=1))
    with pytest.raises(ValueError, match=r"it must be \(N, S, S, 1 \+ C\)"):
        augment(jax.random.key(0), image, image[..., 0], NEVER)


def test_the_type_of_the_mask_changes_nothing() -> None:
    image = jax.random.uniform(jax.random.key(1), (4, 16, 16, 1))
    mask = jnp.zeros((4, 16, 16, 2), jnp.uint8).at[:, 4:11, 3:12].set(1)
    config = only(max_rotation_deg=30.0, lesion_densify_prob=1)
    images, masks = zip(*(augment(jax.random.key(0), image, mask.astype(t), config) for t in ("u1", "f4")), strict=True)
    np.testing.assert_array_equal(*images)
    np.testing.assert_array_equal(*masks)
    assert [one.dtype for one in masks] == [np.uint8, np.float32]


def test_densified_lesions_follow_the_warped_mask() -> None:
    image, mask = jnp.full((1, 16, 16, 1), 0.4), jnp.zeros((1, 16, 16, 1)).at[0, :4].set(1.0)
    changed, warped = augment(jax.random.key(5), image, mask, only(vertical_flip_prob=1, lesion_densify_prob=1))
    np.testing.assert_array_equal(changed > 0.4, warped > 0)
    assert warped[0, -4:].all()


def test_noise_has_the_deviation_that_was_drawn() -> None:
    image = jnp.full((64, 64, 1), 0.5)
    keys = jax.random.split(jax.random.key(0), 200)
    noisy = np.asarray(jax.vmap(lambda key: intensity(key, image, image, only(max_noise=0.05))[0])(keys))
    deviations = noisy.std(axis=(1, 2, 3))
    np.testing.assert_allclose(noisy.mean(axis=(1, 2, 3)), 0.5, atol=0.005)
    assert deviations.max() < 0.053
    np.testing.assert_allclose(deviations.mean(), 0.025, rtol=0.1)


def test_intensities_stay_in_range_and_the_mask_is_not_touched(pair) -> None:
    config = only(max_contrast=0.9, max_brightness=0.5, max_gamma=2, max_noise=0.5)
    image, mask = augment(jax.random.key(0), *pair, config)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    assert not np.array_equal(image, pair[0])
    np.testing.assert_array_equal(mask, pair[1])
    gradient = jax.grad(lambda x: augment(jax.random.key(0), x, pair[1], config)[0].sum())(jnp.zeros_like(pair[0]))
    assert np.isfinite(gradient).all()


def test_each_probability_is_met() -> None:
    matrices = np.asarray(jax.vmap(lambda k: random_affine(k, ORIGINAL))(jax.random.split(jax.random.key(0), 4000)))
    plain = np.abs(np.abs(matrices).max(axis=(1, 2)) - 1) < 1e-6
    assert abs(plain.mean() - 0.7) < 0.03  # not rotated by an angle
    turned = np.abs(matrices[plain][:, 0, 1]) > 0.5
    assert abs(turned.mean() - 0.2) < 0.03
    straight = matrices[plain][~turned]
    assert abs((straight[:, 0, 0] < 0).mean() - 0.4) < 0.04
    assert abs((straight[:, 1, 1] < 0).mean() - 0.4) < 0.04
    angles = np.rad2deg(np.arctan2(np.abs(matrices[~plain][:, 0, 1]), np.abs(matrices[~plain][:, 0, 0])))
    assert set(np.round(angles).astype(int)) == {6, 18, 30, 60, 72, 84}


def test_slices_of_a_batch_differ() -> None:
    image = jnp.broadcast_to(jnp.linspace(0, 1, 64).reshape(1, 8, 8, 1), (16, 8, 8, 1))
    result, _ = augment(jax.random.key(0), image, image, ORIGINAL)
    assert len({np.asarray(one).tobytes() for one in result}) > 3


def test_outside_is_zero() -> None:
    turned = warp(jnp.ones((9, 9, 1)), jnp.array([[0.0, 2.0], [2.0, 0.0]]), 0.0)
    assert float(turned[0, 0, 0]) == 0
    assert float(turned[4, 4, 0]) == 1


def test_oblong_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        augment(jax.random.key(0), jnp.zeros((1, 8, 16, 1)), jnp.zeros((1, 8, 16, 1)), NONE)


def double(key, image, mask, config):
    return 2 * image, mask


def add_one(key, image, mask, config):
    return image + 1, mask


def noise(key, image, mask, config):
    return image + jax.random.uniform(key, image.shape), mask


def scale_mask(key, image, mask, config):
    return image, config.max_scale * mask


TABLE = AUGMENTATIONS | {"double": double, "add_one": add_one, "noise": noise, "scale_mask": scale_mask}


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        (("double", "add_one"), lambda x: 2 * x + 1),
        (("add_one", "double"), lambda x: 2 * (x + 1)),
        (("add_one", "add_one"), lambda x: x + 1 + 1),
        (("spatial", "double"), lambda x: 2 * x[:, ::-1]),
    ],
)
def test_transforms_of_a_table_run_in_the_order_of_the_config(pair, transforms: tuple[str, ...], expected) -> None:
    config = only(vertical_flip_prob=1, transforms=transforms)
    image, _ = jax.jit(partial(module.augment, config=config, augmentations=TABLE))(jax.random.key(0), *pair)
    np.testing.assert_allclose(image, expected(np.asarray(pair[0])), rtol=1e-6)


def test_each_slice_and_each_transform_has_a_key_of_its_own() -> None:
    zeros, key = jnp.zeros((3, 8, 8, 1)), jax.random.key(4)
    image, _ = module.augment(key, zeros, zeros, only(transforms=("noise", "noise")), TABLE)
    for one, own_key in zip(image, jax.random.split(key, 3), strict=True):
        first, second = (jax.random.uniform(k, (8, 8, 1)) for k in jax.random.split(own_key))
        np.testing.assert_allclose(one, first + second, rtol=1e-6)
        assert not np.array_equal(first, second)


@pytest.mark.parametrize(("factor", "stays"), [(0.4, False), (0.6, True)])
def test_a_pixel_stays_in_the_mask_where_more_than_half_of_it_is(pair, factor: float, stays: bool) -> None:
    _, mask = module.augment(jax.random.key(0), *pair, only(max_scale=factor, transforms=("scale_mask",)), TABLE)
    np.testing.assert_array_equal(mask, pair[1] * stays)


def test_unknown_transforms_are_refused_by_name() -> None:
    config = AugmentConfig(transforms=("spatial", "toy"))
    with pytest.raises(InputError, match=r"augmentation 'toy': .*there are spatial, lesion_intensity, intensity"):
        check_transforms(config)
    check_transforms(config, AUGMENTATIONS | {"toy": double})


def test_air_comes_from_outside_the_slice_and_no_mask_does() -> None:
    config = only(max_rotation_deg=45.0, fill=0.25)
    ones = jnp.ones((8, 16, 16, 1))
    image, mask = augment(jax.random.key(0), ones, ones, config)
    corners = np.asarray(image[:, 0, 0, 0])
    assert (corners > 0.25 - 1e-6).all()
    assert (np.abs(corners - 0.25) < 1e-6).any()
    assert not np.asarray(mask[:, 0, 0, 0]).all()
