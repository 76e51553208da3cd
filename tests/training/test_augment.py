import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resunet_jax.config import AugmentConfig
from resunet_jax.training import augment as module
from resunet_jax.training.augment import random_matrix, warp

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
    image_out, mask_out = augment(jax.random.key(3), mask, mask, AugmentConfig(rotation=1))
    assert set(np.unique(mask_out)) <= {0.0, 1.0}
    np.testing.assert_array_equal(image_out > 0.5, mask_out > 0)
    assert 0 <= float(image_out.min()) <= float(image_out.max()) <= 1


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
