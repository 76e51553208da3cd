from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resunet_jax import ResUnet, cascade, init_variables, predict_probability
from resunet_jax.model.cascade import (
    Averaging,
    arithmetic_mean,
    close_lung_probability,
    geometric_mean,
    infection_input,
    join_patches,
    predict_views,
    split_patches,
    without_context,
)

FILTERS = (2, 4, 4, 8)
jitted = jax.jit(cascade, static_argnums=(0, 1))


@pytest.fixture(scope="module")
def models():
    lung, infection = ResUnet(1, FILTERS), ResUnet(2, FILTERS)
    return lung, infection, init_variables(lung, jax.random.key(0)), init_variables(infection, jax.random.key(1))


@pytest.fixture(scope="module")
def image():
    return jax.random.uniform(jax.random.key(2), (4, 16, 24, 1))


def test_is_lung_then_infection_on_ct_and_lung(models, image) -> None:
    lung_model, infection_model, lung_variables, infection_variables = models
    lung, infection = jitted(*models, image)
    apply = jax.jit(
        lambda model, variables, x: jax.nn.sigmoid(model.apply(variables, x, train=False)), static_argnums=0
    )
    np.testing.assert_allclose(lung, apply(lung_model, lung_variables, image), atol=1e-6)
    expected = apply(infection_model, infection_variables, jnp.concatenate([image, lung], axis=-1))
    np.testing.assert_allclose(infection, expected, atol=1e-6)
    assert lung.shape == infection.shape == image.shape
    assert 0 <= float(infection.min()) <= float(infection.max()) <= 1


def test_vmap_and_batching_change_nothing(models, image) -> None:
    batched = jitted(*models, image)
    mapped = jax.jit(jax.vmap(lambda one: cascade(*models, one[None])))(image)
    for a, b in zip(batched, mapped, strict=True):
        np.testing.assert_allclose(a, b[:, 0], atol=1e-6)


def test_gradient_reaches_both_models(models, image) -> None:
    lung_model, infection_model, *variables = models

    def mean_infection(lung_variables, infection_variables):
        return cascade(lung_model, infection_model, lung_variables, infection_variables, image)[1].mean()

    for gradient in jax.jit(jax.grad(mean_infection, argnums=(0, 1)))(*variables):
        assert float(jnp.abs(gradient["params"]["output_conv"]["kernel"]).max()) > 0


def test_directional_derivative_is_the_gradient(models, image) -> None:
    model, _, variables, _ = models

    def mean(x):
        return predict_probability(model, variables, x).mean()

    tangent = jax.random.normal(jax.random.key(3), image.shape)
    _, forward = jax.jit(lambda x, t: jax.jvp(mean, (x,), (t,)))(image, tangent)
    np.testing.assert_allclose(forward, jnp.sum(jax.jit(jax.grad(mean))(image) * tangent), rtol=1e-4)


def test_patches_are_an_exact_partition() -> None:
    x = jnp.arange(2 * 4 * 6 * 1.0).reshape(2, 4, 6, 1)
    patches = split_patches(x, 2)
    np.testing.assert_array_equal(patches[0], x[0, :2, :3])
    np.testing.assert_array_equal(patches[1], x[0, :2, 3:])
    np.testing.assert_array_equal(patches[6], x[1, 2:, :3])
    np.testing.assert_array_equal(join_patches(patches, 2), x)


def test_patches_are_processed_independently(models, image) -> None:
    model, _, variables, _ = models
    image = image[:, :, :16]
    predict = jax.jit(predict_probability, static_argnums=0, static_argnames="patch_grid")
    whole = predict(model, variables, image, patch_grid=2)
    corner = predict(model, variables, image[:, :8, :8], patch_grid=1)
    np.testing.assert_allclose(whole[:, :8, :8], corner, atol=1e-6)


def test_mirrored_slices_get_mirrored_probabilities(models, image) -> None:
    """A header that is wrong about left and right gives the same masks."""
    predict = jax.jit(predict_probability, static_argnums=0, static_argnames="averaging")
    model, _, variables, _ = models
    one, other = (predict(model, variables, x, averaging=Averaging(mirroring=True)) for x in (image, image[:, :, ::-1]))
    np.testing.assert_allclose(other[:, :, ::-1], one, rtol=0, atol=1e-7)
    plain, mirrored = (predict(model, variables, x) for x in (image, image[:, :, ::-1]))
    assert np.abs(mirrored[:, :, ::-1] - plain).max() > 1e-3
    np.testing.assert_allclose(one, (plain + mirrored[:, :, ::-1]) / 2, rtol=0, atol=1e-6)


def test_the_slices_around_count_for_one_of_two_views(rng: np.random.Generator) -> None:
    """Mirrored too: which view is the mirror image depends on which half is darker, not on how the slice lies."""
    model = ResUnet(4, filters=(4, 8, 16, 32))
    variables = init_variables(model, jax.random.key(0))
    x = rng.random((4, 16, 24, 4), dtype=np.float32)
    x[:2, :, :12, 0] *= 0.5  # the darker half: to the left, and to the right
    x[2:, :, 12:, 0] *= 0.5
    predict = jax.jit(predict_probability, static_argnums=0, static_argnames="averaging")

    def mirrored(x: np.ndarray) -> np.ndarray:
        return predict(model, variables, x[:, :, ::-1])[:, :, ::-1]

    alone = np.concatenate([x[..., :1]] * 3 + [x[..., 3:]], axis=-1)
    np.testing.assert_array_equal(without_context(x), alone)
    plain, dropped = (np.asarray(predict(model, variables, one)) for one in (x, alone))
    assert np.abs(plain - dropped).max() > 1e-3
    found = predict(model, variables, x, averaging=Averaging(context=True))
    np.testing.assert_allclose(found, (plain + dropped) / 2, rtol=0, atol=1e-6)
    both = Averaging(mirroring=True, context=True)
    one, other = (np.asarray(predict(model, variables, v, averaging=both)) for v in (x, x[:, :, ::-1]))
    np.testing.assert_allclose(other[:, :, ::-1], one, rtol=0, atol=1e-7)
    np.testing.assert_allclose(one[:2], (plain + mirrored(alone))[:2] / 2, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one[2:], (mirrored(x) + dropped)[2:] / 2, rtol=0, atol=1e-6)


def test_views_lie_as_the_slices_do(rng: np.random.Generator) -> None:
    """Of a slice with its darker half to the left, and of one with it to the right."""
    model = ResUnet(4, filters=(4, 8, 16, 32))
    variables = init_variables(model, jax.random.key(0))
    x = rng.random((2, 16, 24, 4), dtype=np.float32)
    x[0, :, :12, 0] *= 0.5
    x[1, :, 12:, 0] *= 0.5
    alone = np.asarray(without_context(x))
    plain = jax.jit(predict_probability, static_argnums=0)

    def mirrored(x: np.ndarray) -> np.ndarray:
        return plain(model, variables, x[:, :, ::-1])[:, :, ::-1]

    views = jax.jit(predict_views, static_argnums=0, static_argnames="averaging")
    first, second = views(model, variables, x, averaging=Averaging(mirroring=True, context=True))
    straight, turned = (plain(model, variables, x), mirrored(alone)), (mirrored(x), plain(model, variables, alone))
    for k, expected in enumerate((straight, turned)):
        for view, one in zip((first, second), expected, strict=True):
            np.testing.assert_allclose(view[k], one[k], rtol=0, atol=1e-6)


def test_means_of_views() -> None:
    views = [np.float32([0.04, 1, 0]), np.float32([0.25, 1, 1])]
    np.testing.assert_allclose(arithmetic_mean(views), [0.145, 1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(geometric_mean(views), [0.1, 1, 0], rtol=1e-6)
    for one in (arithmetic_mean, geometric_mean):
        np.testing.assert_array_equal(one(views[:1]), views[0])


def test_each_model_of_the_cascade_may_see_its_slices_mirrored(models, image) -> None:
    lung_model, infection_model, lung_variables, infection_variables = models
    mirroring = Averaging(mirroring=True)
    both = jax.jit(cascade, static_argnums=(0, 1), static_argnames=("lung_averaging", "infection_averaging"))
    lung, infection = both(*models, image, lung_averaging=mirroring, infection_averaging=mirroring)
    predict = jax.jit(partial(predict_probability, averaging=mirroring), static_argnums=0)
    np.testing.assert_allclose(lung, predict(lung_model, lung_variables, image), rtol=0, atol=1e-6)
    stacked = infection_input(infection_model, image, lung)
    expected = predict(infection_model, infection_variables, stacked)
    np.testing.assert_allclose(infection, expected, rtol=0, atol=1e-6)


def test_closing_fills_holes_and_bays_below_its_width() -> None:
    lung = np.zeros((1, 32, 64, 1), np.float32)
    lung[:, 6:26, 8:56] = 1
    whole = lung.copy()
    lung[:, 10:13, 20:25] = 0.25  # a hole 3 high and 5 wide
    lung[:, 6:9, 40:43] = 0  # a bay
    lung[:, 12:22, 28:38] = 0  # a hole of 10 × 10
    whole[:, 12:22, 28:38] = 0
    np.testing.assert_array_equal(close_lung_probability(jnp.asarray(lung), 6 / 64), whole)  # by 7 × 7
    np.testing.assert_array_equal(close_lung_probability(jnp.asarray(lung), 0), lung)


def test_closing_only_raises_and_is_idempotent() -> None:
    lung = jax.random.uniform(jax.random.key(4), (2, 32, 32, 1))
    closed = close_lung_probability(lung, 0.125)
    assert bool((closed >= lung).all())
    assert set(np.unique(closed)) < set(np.unique(lung))
    np.testing.assert_array_equal(close_lung_probability(closed, 0.125), closed)


def test_infection_model_sees_the_closed_lung(models, image) -> None:
    closing = models[1].clone(closing_fraction=0.25)
    lung, infection = jitted(models[0], closing, *models[2:], image)
    closed = jnp.concatenate([image, close_lung_probability(lung, 0.25)], axis=-1)
    predict = jax.jit(predict_probability, static_argnums=0)
    np.testing.assert_allclose(infection, predict(models[1], models[3], closed), atol=1e-6)
    assert float(jnp.abs(infection - jitted(*models, image)[1]).max()) > 1e-4


def test_infection_model_without_lung_is_refused(models, image) -> None:
    with pytest.raises(ValueError, match="give it a lung model"):
        infection_input(models[1], image, None)
    with pytest.raises(ValueError, match="this model sees 1 channels, slices with 3 are given"):
        infection_input(models[0], jnp.concatenate([image] * 3, axis=-1), None)
    np.testing.assert_array_equal(infection_input(models[0], image, None), image)


@pytest.mark.parametrize("factor", [0, 3, -1])
def test_patches_that_do_not_fill_a_slice_are_refused(factor: int) -> None:
    with pytest.raises(ValueError, match=f"slices of 64×64 cannot be cut into {factor} × {factor} patches"):
        split_patches(jnp.zeros((1, 64, 64, 1)), factor)
