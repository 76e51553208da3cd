import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resunet_jax.config import AugmentConfig
from resunet_jax.training import augment as module
from resunet_jax.training.augment import AERATED_LUNG, SOFT_TISSUE, change_density, jitter, random_matrix, warp

augment = jax.jit(module.augment, static_argnums=3)

NEVER = AugmentConfig(0, 0, 0, 0)


def only(**chances: float) -> AugmentConfig:
    return AugmentConfig(**{"vertical_flip": 0, "horizontal_flip": 0, "quarter_turn": 0, "rotation": 0, **chances})


@pytest.fixture
def pair(rng: np.random.Generator):
    image = jnp.array(rng.random((6, 16, 16, 1)), jnp.float32)
    return image, (image > 0.7).astype(jnp.float32)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (NEVER, lambda x: x),
        (only(vertical_flip=1), lambda x: x[:, ::-1]),
        (only(horizontal_flip=1), lambda x: x[:, :, ::-1]),
        (only(vertical_flip=1, horizontal_flip=1), lambda x: x[:, ::-1, ::-1]),
        (only(quarter_turn=1), lambda x: np.rot90(x, axes=(1, 2))),
        (only(rotation=1, angles_deg=(0.0,)), lambda x: x),
    ],
)
def test_flips_and_turns_are_exact(pair, config: AugmentConfig, expected) -> None:
    image, mask = augment(jax.random.key(0), *pair, config)
    np.testing.assert_array_equal(image, expected(np.asarray(pair[0])))
    np.testing.assert_array_equal(mask, expected(np.asarray(pair[1])))


def test_rotation_is_counter_clockwise() -> None:
    image = jnp.zeros((1, 33, 33, 1)).at[0, 16, 28].set(1.0)  # to the right of the centre
    turned, _ = augment(jax.random.key(0), image, image, only(rotation=1, angles_deg=(30.0,)))
    row, column = np.unravel_index(np.argmax(turned[0, ..., 0]), (33, 33))
    assert (row, column) == (16 - 6, 16 + 10)


def test_same_key_same_result_and_other_key_another(pair) -> None:
    config = AugmentConfig()
    first, again, other = (augment(jax.random.key(seed), *pair, config)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_mask_follows_image_and_stays_binary(pair) -> None:
    _, mask = pair
    image_out, mask_out = augment(jax.random.key(3), mask, mask, AugmentConfig(rotation=1, max_zoom=0.3))
    assert set(np.unique(mask_out)) <= {0.0, 1.0}
    np.testing.assert_array_equal(image_out > 0.5, mask_out > 0)
    assert 0 <= float(image_out.min()) <= float(image_out.max()) <= 1


def test_zoom_and_rotation_stay_within_their_limits_and_reach_them() -> None:
    config = only(max_rotation_deg=20.0, max_zoom=0.25)
    matrices = np.asarray(jax.vmap(lambda k: random_matrix(k, config))(jax.random.split(jax.random.key(0), 4000)))
    size = 1 / np.sqrt(np.linalg.det(matrices))
    angle = np.rad2deg(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    for values, low, high in ((np.log(size), -np.log(1.25), np.log(1.25)), (angle, -20, 20)):
        assert low - 1e-4 < values.min() < low * 0.99
        assert high * 0.99 < values.max() < high + 1e-4
        np.testing.assert_allclose(values.std(), (high - low) / np.sqrt(12), rtol=0.05)  # uniform


def test_zoom_enlarges() -> None:
    image = jnp.zeros((1, 33, 33, 1)).at[0, 12:21, 12:21].set(1.0)
    keys = jax.random.split(jax.random.key(1), 40)
    areas = [float(augment(key, image, image, only(max_zoom=0.5))[0].sum()) for key in keys]
    sizes = [float(1 / random_matrix(jax.random.split(key, 1)[0], only(max_zoom=0.5))[0, 0]) for key in keys]
    np.testing.assert_allclose(areas, 81 * np.square(sizes), rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_contrast": 0.2}, lambda x: (0.8 * x, 1.2 * x)),
        ({"max_brightness": 0.1}, lambda x: (x - 0.1, x + 0.1)),
        ({"max_gamma": 0.5}, lambda x: (x ** np.exp(0.5), x ** np.exp(-0.5))),
    ],
)
def test_grey_values_change_by_as_much_as_said(changes: dict, expected) -> None:
    image = jnp.linspace(0.2, 0.8, 16).reshape(4, 4, 1)
    config = only(**changes)
    keys = jax.random.split(jax.random.key(0), 2000)
    changed = np.asarray(jax.vmap(lambda key: jitter(key, image, config))(keys))
    low, high = expected(np.asarray(image))
    np.testing.assert_allclose(changed.min(axis=0), low, atol=2e-3)
    np.testing.assert_allclose(changed.max(axis=0), high, atol=2e-3)


def test_consolidation_fills_the_mask_alone_up_to_soft_tissue() -> None:
    image = jnp.array([0.2, 0.5, 0.95, 0.3]).reshape(2, 2, 1)
    mask = jnp.array([1.0, 1.0, 1.0, 0.0]).reshape(2, 2, 1)
    keys = jax.random.split(jax.random.key(0), 4000)
    filled = np.asarray(jax.vmap(lambda key: change_density(key, image, mask, only(consolidation=0.4)))(keys))
    filled = filled.reshape(-1, 4)
    np.testing.assert_array_equal(filled[:, 2:], np.tile([0.95, 0.3], (4000, 1)).astype(np.float32))
    changed = filled[:, 0] > 0.2
    assert abs(changed.mean() - 0.4) < 0.03
    assert SOFT_TISSUE - 0.01 < filled[:, :2].max() <= SOFT_TISSUE + 1e-6
    parts = (filled[changed, :2] - [0.2, 0.5]) / (SOFT_TISSUE - np.array([0.2, 0.5]))
    np.testing.assert_allclose(parts[:, 0], parts[:, 1], atol=1e-5)  # the same part of the way everywhere
    np.testing.assert_allclose(parts.mean(), 0.5, atol=0.03)


def test_fading_lowers_the_mask_alone_towards_healthy_lung() -> None:
    image = jnp.array([0.2, 0.5, 0.95, 0.6]).reshape(2, 2, 1)
    mask = jnp.array([1.0, 1.0, 1.0, 0.0]).reshape(2, 2, 1)
    keys = jax.random.split(jax.random.key(0), 4000)
    both = only(consolidation=0.4, fading=0.3)
    changed = np.asarray(jax.vmap(lambda key: change_density(key, image, mask, both))(keys)).reshape(-1, 4)
    np.testing.assert_array_equal(changed[:, 3], np.full(4000, 0.6, np.float32))
    fainter, denser = changed[:, 1] < 0.5, changed[:, 1] > 0.5
    assert abs(fainter.mean() - 0.3) < 0.03
    assert abs(denser.mean() - 0.4) < 0.03
    np.testing.assert_array_equal(changed[fainter, 0], np.full(fainter.sum(), 0.2, np.float32))  # darker already
    parts = (np.array([0.5, 0.95]) - changed[fainter, 1:3]) / (np.array([0.5, 0.95]) - AERATED_LUNG)
    np.testing.assert_allclose(parts[:, 0], parts[:, 1], atol=1e-5)
    assert 0 < parts.min() < 0.01
    assert 0.69 < parts.max() <= 0.7 + 1e-6


def test_consolidation_follows_the_moved_mask() -> None:
    image, mask = jnp.full((1, 16, 16, 1), 0.4), jnp.zeros((1, 16, 16, 1)).at[0, :4].set(1.0)
    changed, moved = augment(jax.random.key(5), image, mask, only(vertical_flip=1, consolidation=1))
    np.testing.assert_array_equal(changed > 0.4, moved > 0)
    assert moved[0, -4:].all()


def test_noise_has_the_deviation_that_was_drawn() -> None:
    image = jnp.full((64, 64, 1), 0.5)
    keys = jax.random.split(jax.random.key(0), 200)
    noisy = np.asarray(jax.vmap(lambda key: jitter(key, image, only(max_noise=0.05)))(keys))
    deviations = noisy.std(axis=(1, 2, 3))
    np.testing.assert_allclose(noisy.mean(axis=(1, 2, 3)), 0.5, atol=0.005)
    assert deviations.max() < 0.053
    np.testing.assert_allclose(deviations.mean(), 0.025, rtol=0.1)


def test_grey_values_stay_in_range_and_the_mask_is_not_touched(pair) -> None:
    config = only(max_contrast=0.9, max_brightness=0.5, max_gamma=2, max_noise=0.5)
    image, mask = augment(jax.random.key(0), *pair, config)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    assert not np.array_equal(image, pair[0])
    np.testing.assert_array_equal(mask, pair[1])
    gradient = jax.grad(lambda x: augment(jax.random.key(0), x, pair[1], config)[0].sum())(jnp.zeros_like(pair[0]))
    assert np.isfinite(gradient).all()


def test_each_chance_is_met() -> None:
    config = AugmentConfig()
    matrices = np.asarray(jax.vmap(lambda k: random_matrix(k, config))(jax.random.split(jax.random.key(0), 4000)))
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
    result, _ = augment(jax.random.key(0), image, image, AugmentConfig())
    assert len({np.asarray(one).tobytes() for one in result}) > 3


def test_outside_is_zero() -> None:
    turned = warp(jnp.ones((9, 9, 1)), jnp.array([[0.0, 2.0], [2.0, 0.0]]))
    assert float(turned[0, 0, 0]) == 0
    assert float(turned[4, 4, 0]) == 1


def test_oblong_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        augment(jax.random.key(0), jnp.zeros((1, 8, 16, 1)), jnp.zeros((1, 8, 16, 1)), NEVER)
