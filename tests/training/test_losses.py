import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resunet_jax.errors import InputError
from resunet_jax.training.losses import (
    LOSSES,
    Loss,
    bce,
    bce_dice,
    bce_pooled_dice,
    dice,
    make_loss,
    mean_over_examples,
    pooled_dice,
)

ALL = {**LOSSES, "bce:1,pooled_dice:0.5": make_loss("bce:1,pooled_dice:0.5")}
EVERY = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
PER_EXAMPLE = {"bce": bce, "dice": dice, "bce_dice": bce_dice}


def of_all(loss: Loss, logits: jax.Array, target: jax.Array) -> jax.Array:
    """The loss of these examples, all valid."""
    return loss.value(loss.sums(logits, target, jnp.ones(len(logits))))


@pytest.fixture
def examples(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Logits and masks of seven examples, of which some show nothing and some are full."""
    logits = rng.normal(size=(7, 4, 6, 1)).astype(np.float32) * 3
    frequency = np.array([0, 0, 1, 0.1, 0.2, 0.5, 0.9]).reshape(7, 1, 1, 1)
    return logits, (rng.random(logits.shape) < frequency).astype(np.float32)


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


@pytest.mark.parametrize("loss", PER_EXAMPLE.values(), ids=PER_EXAMPLE)
def test_one_value_per_example_whatever_the_others_are(loss, examples) -> None:
    logits, target = map(jnp.array, examples)
    values = jax.jit(loss)(logits, target)
    assert values.shape == (7,)
    np.testing.assert_allclose(values[1:2], loss(logits[1:2], target[1:2]), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda a, b: loss(a[None], b[None])[0])(logits, target), values, rtol=1e-5)


@EVERY
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_finite_with_finite_gradient_at_extremes(loss, value: float, scale: float) -> None:
    logits = scale * jnp.array([-1.0, 1.0, -1.0, 1.0]).reshape(1, 2, 2, 1)
    target = jnp.full((1, 2, 2, 1), value)
    result, gradient = jax.value_and_grad(lambda x: of_all(loss, x, target))(logits)
    assert np.isfinite(result)
    assert result >= 0
    assert np.isfinite(gradient).all()


@EVERY
def test_perfect_is_better_than_wrong(loss) -> None:
    target = jnp.array([1.0, 0.0, 1.0, 1.0]).reshape(1, 2, 2, 1)
    right, wrong = 20 * (2 * target - 1), -20 * (2 * target - 1)
    assert float(of_all(loss, right, target)) < 1e-4
    assert float(of_all(loss, wrong, target)) > 0.5


def test_pooled_dice_is_one_dice_over_the_batch(rng: np.random.Generator) -> None:
    logits, target = jnp.array(rng.normal(size=(3, 4, 6, 1))), jnp.array((rng.random((3, 4, 6, 1)) > 0.5) * 1.0)
    p, t = np.asarray(jax.nn.sigmoid(logits), float), np.asarray(target, float)
    expected = 1 - (2 * (p * t).sum() + 2) / (p.sum() + t.sum() + 2)
    np.testing.assert_allclose(jax.jit(pooled_dice)(logits, target), [expected] * 3, rtol=1e-5)
    np.testing.assert_allclose(
        bce_pooled_dice(logits, target), bce(logits, target) + pooled_dice(logits, target), rtol=1e-6
    )


def test_a_few_false_pixels_in_an_empty_slice_cost_a_pooled_dice_little() -> None:
    """The reason for it: slice by slice they cost as much as missing the whole structure."""
    target = jnp.zeros((2, 16, 16, 1)).at[0, :8].set(1.0)
    logits = jnp.where(target > 0, 30.0, -30.0).at[1, 0, :8].set(30.0)
    assert float(dice(logits, target).mean()) > 0.4
    assert float(pooled_dice(logits, target).mean()) < 0.05


def test_dice_of_two_empty_masks_is_zero() -> None:
    np.testing.assert_allclose(dice(jnp.full((1, 2, 2, 1), -50.0), jnp.zeros((1, 2, 2, 1))), [0], atol=1e-6)


@pytest.mark.parametrize("loss", [bce, dice, pooled_dice])
def test_a_mask_of_another_shape_is_refused(loss) -> None:
    """Broadcast, it would give another loss: masks of batches have further channels."""
    logits = jnp.zeros((2, 8, 8, 1))
    for mask in (jnp.zeros((2, 8, 8, 2)), jnp.zeros((2, 8, 8)), jnp.zeros((1, 8, 8, 1))):
        with pytest.raises(ValueError, match="give the target"):
            jax.eval_shape(loss, logits, mask)


@pytest.mark.parametrize("loss", [bce, dice, pooled_dice])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sums_of_half_precision_do_not_overflow(loss, dtype) -> None:
    logits = jnp.full((1, 512, 512, 1), 2.0, dtype)
    mask = jnp.zeros((1, 512, 512, 1), jnp.uint8).at[:, :256].set(1)
    value = loss(logits, mask)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loss(logits.astype(jnp.float32), mask.astype(jnp.float32)), rtol=1e-6)
    assert 0.1 < value[0] < 1.5


def added_up(loss: Loss, logits: np.ndarray, target: np.ndarray, size: int, rng: np.random.Generator) -> float:
    """Over batches of `size`, in a random order, each padded with anything, to its beginning, middle or end."""
    order, total = rng.permutation(len(logits)), {}
    for start in range(0, len(order), size):
        picks = order[start : start + size]
        padded = size + 2
        places = np.sort(rng.choice(padded, len(picks), replace=False))
        batch_logits = rng.normal(size=(padded, *logits.shape[1:])).astype(np.float32) * 1e3
        batch_target = (rng.random(batch_logits.shape) > 0.5).astype(np.float32)
        valid = np.zeros(padded, np.float32)
        batch_logits[places], batch_target[places], valid[places] = logits[picks], target[picks], 1
        sums = jax.jit(loss.sums)(batch_logits, batch_target, valid)
        assert all(value.shape == () for value in jax.tree.leaves(sums))
        total = jax.tree.map(
            lambda one, all_before: float(one) + all_before, sums, total or jax.tree.map(lambda _: 0.0, sums)
        )
    return float(loss.value(total))


@EVERY
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_sums_add_up_over_batches_order_and_padding(loss, size: int, examples, rng: np.random.Generator) -> None:
    expected = of_all(loss, *map(jnp.array, examples))
    np.testing.assert_allclose(added_up(loss, *examples, size, rng), expected, rtol=1e-5)


def test_a_mean_over_batches_would_be_another_loss(examples) -> None:
    """What the sums are for: Dice is no mean of the Dice of batches."""
    logits, target = map(jnp.array, examples)
    loss = LOSSES["pooled_dice"]
    batches = [of_all(loss, logits[i : i + 2], target[i : i + 2]) for i in range(0, 6, 2)]
    assert abs(np.mean(batches) - float(of_all(loss, logits[:6], target[:6]))) > 0.03


def test_rows_are_the_means_of_the_functions(examples) -> None:
    logits, target = map(jnp.array, examples)
    for name, function in (("bce", bce), ("dice", dice), ("pooled_dice", pooled_dice)):
        np.testing.assert_allclose(of_all(LOSSES[name], logits, target), function(logits, target).mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ("bce", bce),
        ("bce:1", bce),
        ("bce:1,dice:1", bce_dice),
        ("bce : 1, pooled_dice:1", bce_pooled_dice),
        ("dice:0.25,bce:2", lambda x, t: 2 * bce(x, t) + 0.25 * dice(x, t)),
        ("pooled_dice:1e-3", lambda x, t: 1e-3 * pooled_dice(x, t)),
    ],
)
def test_terms_are_weighted(terms: str, expected, examples) -> None:
    logits, target = map(jnp.array, examples)
    np.testing.assert_allclose(of_all(make_loss(terms), logits, target), expected(logits, target).mean(), rtol=1e-6)


def test_a_row_that_is_added_is_a_term(examples) -> None:
    """Also where its name begins like another's."""
    logits, target = map(jnp.array, examples)
    table = LOSSES | {"bc": mean_over_examples(lambda x, t: jnp.full(len(x), 3.0))}
    value = of_all(make_loss("bc:2,bce:1", table), logits, target)
    np.testing.assert_allclose(value, 6 + bce(logits, target).mean(), rtol=1e-6)
    assert "bc" not in LOSSES


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ("toy", "'toy' is not one of bce, dice, pooled_dice"),
        ("bce:1,toy:1", "'toy' is not one of"),
        ("bce,", "'' is not one of"),
        ("", "'' is not one of"),
        ("BCE:1", "'BCE' is not one of"),
        ("bce:1,bce:2", "'bce' is not one of .*each at most once"),
        ("dice:0", "the weight of dice is '0'; it must be a positive number"),
        ("bce:1,dice:-1", "the weight of dice is '-1'"),
        ("bce:nan", "the weight of bce is 'nan'"),
        ("bce:inf", "the weight of bce is 'inf'"),
        ("bce:", "the weight of bce is ''; it must"),
        ("bce:much", "the weight of bce is 'much'"),
        ("bce:1:2", "the weight of bce is '1:2'"),
    ],
)
def test_unfit_terms_are_refused_by_name(terms: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^loss '{terms}': {message}"):
        make_loss(terms)
