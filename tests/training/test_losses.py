import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resunet_jax.training.losses import LOSSES, bce, bce_dice, bce_pooled_dice, dice, pooled_dice

EVERY = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def test_bce_closed_form() -> None:
    logits = jnp.log(jnp.array([3.0, 1 / 3])).reshape(2, 1, 1, 1)  # probabilities 3/4 and 1/4
    np.testing.assert_allclose(bce(logits, jnp.ones((2, 1, 1, 1))), [-np.log(0.75), -np.log(0.25)], rtol=1e-6)


def test_dice_closed_form() -> None:
    # Two of four pixels certain, one of them right, one missed: 1 - (2·1 + 2) / (2 + 2 + 2).
    logits = jnp.array([50.0, 50.0, -50.0, -50.0]).reshape(1, 2, 2, 1)
    target = jnp.array([1.0, 0.0, 1.0, 0.0]).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(dice(logits, target), [1 - 4 / 6], rtol=1e-6)


def test_bce_dice_is_the_sum(rng: np.random.Generator) -> None:
    logits, target = jnp.array(rng.normal(size=(3, 4, 4, 1))), jnp.array((rng.random((3, 4, 4, 1)) > 0.5) * 1.0)
    np.testing.assert_allclose(bce_dice(logits, target), bce(logits, target) + dice(logits, target), rtol=1e-6)


APART = pytest.mark.parametrize("name", [name for name in LOSSES if "pooled" not in name])


@APART
def test_one_value_an_example_that_the_others_do_not_touch(name, rng: np.random.Generator) -> None:
    loss = LOSSES[name]
    logits, target = jnp.array(rng.normal(size=(3, 4, 6, 1))), jnp.array((rng.random((3, 4, 6, 1)) > 0.5) * 1.0)
    values = jax.jit(loss)(logits, target)
    assert values.shape == (3,)
    np.testing.assert_allclose(values[1:2], loss(logits[1:2], target[1:2]), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda a, b: loss(a[None], b[None])[0])(logits, target), values, rtol=1e-5)


@EVERY
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_finite_with_finite_gradient_at_extremes(loss, value: float, scale: float) -> None:
    logits = scale * jnp.array([-1.0, 1.0, -1.0, 1.0]).reshape(1, 2, 2, 1)
    target = jnp.full((1, 2, 2, 1), value)
    result, gradient = jax.value_and_grad(lambda x: loss(x, target).sum())(logits)
    assert np.isfinite(result)
    assert result >= 0
    assert np.isfinite(gradient).all()


@EVERY
def test_perfect_is_better_than_wrong(loss) -> None:
    target = jnp.array([1.0, 0.0, 1.0, 1.0]).reshape(1, 2, 2, 1)
    right, wrong = 20 * (2 * target - 1), -20 * (2 * target - 1)
    assert float(loss(right, target)[0]) < 1e-4
    assert float(loss(wrong, target)[0]) > 0.5


def test_pooled_dice_is_one_dice_over_the_batch(rng: np.random.Generator) -> None:
    logits, target = jnp.array(rng.normal(size=(3, 4, 6, 1))), jnp.array((rng.random((3, 4, 6, 1)) > 0.5) * 1.0)
    p, t = np.asarray(jax.nn.sigmoid(logits), float), np.asarray(target, float)
    expected = 1 - (2 * (p * t).sum() + 2) / (p.sum() + t.sum() + 2)
    np.testing.assert_allclose(jax.jit(pooled_dice)(logits, target), [expected] * 3, rtol=1e-5)
    np.testing.assert_allclose(
        bce_pooled_dice(logits, target), bce(logits, target) + pooled_dice(logits, target), rtol=1e-6
    )


def test_a_few_false_pixels_in_an_empty_slice_cost_a_pooled_dice_little() -> None:
    """The reason for it: slice by slice they cost as much as the whole structure, missed."""
    target = jnp.zeros((2, 16, 16, 1)).at[0, :8].set(1.0)
    logits = jnp.where(target > 0, 30.0, -30.0).at[1, 0, :8].set(30.0)
    assert float(dice(logits, target).mean()) > 0.4
    assert float(pooled_dice(logits, target).mean()) < 0.05


def test_dice_of_two_empty_masks_is_zero() -> None:
    np.testing.assert_allclose(dice(jnp.full((1, 2, 2, 1), -50.0), jnp.zeros((1, 2, 2, 1))), [0], atol=1e-6)
