"""The training and evaluation step: pure functions from state and batch to state and numbers."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resunet_jax.config import Config
from resunet_jax.data.batches import Batch
from resunet_jax.metrics.overlap import confusion_counts
from resunet_jax.model.build import ARCHITECTURES, TASKS, Architecture, averaging_of, build_model, model_image_size
from resunet_jax.model.cascade import Averaging, apply_logits, infection_input, lung_input, predict_probability
from resunet_jax.model.resunet import Variables, init_variables
from resunet_jax.model.winograd import default_convolution
from resunet_jax.training.augment import AUGMENTATIONS, Augmentation, augment
from resunet_jax.training.losses import LOSSES, Loss, make_loss
from resunet_jax.weights.store import variable_shapes


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes.

    Attributes:
      step: int32 scalar, steps taken.
      variables: {"params": ..., "batch_stats": ...}.
      opt_state: of the optax optimizer.
      average: exponential moving average of the variables, None where `ema_decay` is 0.
    """

    step: jax.Array
    variables: Variables
    opt_state: Any
    average: Variables | None = None

    @property
    def model_variables(self) -> Variables:
        """Those to evaluate and to keep as the model."""
        return self.variables if self.average is None else self.average


class FrozenLung(NamedTuple):
    """The lung model that feeds an infection training.

    Attributes:
      model: the module.
      patch_grid: see `ModelConfig`.
      averaging: see `predict_probability`.
    """

    model: Any
    patch_grid: int
    averaging: Averaging = Averaging()


TrainStep = Callable[[TrainState, Batch, jax.Array, Variables | None], tuple[TrainState, dict[str, jax.Array]]]
EvalStep = Callable[[Variables, Batch, Variables | None], dict[str, Any]]


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam or AdamW; see `TrainConfig`.

    Args:
      config: of the run; with `accumulate_steps` k, every k-th step updates, by the mean of the last k gradients.
      steps_per_epoch: steps, not updates.
    """
    schedule, decay = make_schedule(config, steps_per_epoch), config.train.weight_decay
    optimizer = optax.adamw(schedule, weight_decay=decay) if decay else optax.adam(schedule)
    if config.train.accumulate_steps > 1:
        optimizer = optax.MultiSteps(optimizer, config.train.accumulate_steps).gradient_transformation()
    if config.train.skip_nonfinite:
        optimizer = optax.apply_if_finite(optimizer, np.iinfo(np.int32).max)
    return optimizer


_MOST_UPDATES = np.iinfo(np.int32).max  # of the counter on the device


def make_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by the number of updates."""
    train = config.train

    def updates(epochs: int) -> int:
        return min(max(1, round(epochs * steps_per_epoch / train.accumulate_steps)), _MOST_UPDATES)

    if train.schedule == "one_cycle":
        return optax.schedules.cosine_onecycle_schedule(
            updates(train.epochs), train.learning_rate, pct_start=0.15, div_factor=10, final_div_factor=100
        )
    decay = updates(train.decay_epochs)
    return optax.schedules.exponential_decay(train.learning_rate, decay, train.decay_factor, staircase=True)


def create_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
    lung_variables: Variables | None = None,
    initial_variables: Variables | None = None,
) -> TrainState:
    """The state before the first step, decided by the config's seed and the models that are given.

    Args:
      config: of the run.
      optimizer: from `make_optimizer`, or any other.
      architectures: the table of models.
      lung_variables: of the lung model, to begin with where the config says so; see `transfer`.
      initial_variables: of a trained model to begin with instead, whatever the config says.

    Raises:
      ValueError: these are of another architecture or width.
    """
    key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
    variables = init_variables(build_model(config, architectures=architectures), key, model_image_size(config))
    if initial_variables is not None:
        initial_variables = flax.core.unfreeze(initial_variables)
        if not can_transfer(initial_variables, variables):
            raise ValueError("initial_variables are of another architecture or width than the config's model")
        variables = transfer(initial_variables, variables)
    elif lung_variables is not None and config.cascade.start_from_lung:
        variables = transfer(lung_variables, variables)
    # A copy, because the state is donated, and one buffer cannot be donated twice.
    average = jax.tree.map(jnp.copy, variables) if config.train.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), variables, optimizer.init(variables["params"]), average)


def can_transfer(source: Variables, target: Variables) -> bool:
    """Whether `transfer` takes the source: the same layers, filters and kernels, and no more input channels."""

    def is_fit(old: jax.Array, new: jax.Array) -> bool:
        inputs = -2  # the axis of a kernel's input channels
        return old.shape == new.shape or (
            old.ndim == new.ndim == 4
            and old.shape[inputs] < new.shape[inputs]
            and old.shape[:inputs] + old.shape[-1:] == new.shape[:inputs] + new.shape[-1:]
        )

    trees: Any = jax.tree.structure(source), jax.tree.structure(target)
    return trees[0] == trees[1] and all(jax.tree.leaves(jax.tree.map(is_fit, source, target)))


def transfer(source: Variables, target: Variables) -> Variables:
    """The variables of a trained model, for one of the same filters that may have further input channels.

    Returns:
      those of the source in the target's types; a kernel with further input channels has the source's for the first and
      the target's for the others. The target as it is, where `can_transfer` says no.
    """
    if not can_transfer(source, target):
        return target
    return jax.tree.map(
        lambda old, new: jnp.array(old, new.dtype) if old.shape == new.shape else new.at[:, :, : old.shape[2]].set(old),
        source,
        target,
    )


def update_average(
    average: Variables, variables: Variables, step: jax.Array, decay: float, accumulate_steps: int = 1
) -> Variables:
    """The exponential moving average after a step.

    At the beginning the decay is lower, (1 + n) / (10 + n) after n updates: the initial variables are forgotten.

    Args:
      average: of the steps before.
      variables: after the step.
      step: its number, counted from 0.
      decay: of an update, in [0, 1].
      accumulate_steps: how many steps are an update.

    Example:
      >>> import jax.numpy as jnp
      >>> update_average({"w": jnp.float32(0)}, {"w": jnp.float32(1)}, jnp.int32(90), decay=0.75)["w"].item()
      0.25
    """
    updates = step // accumulate_steps
    kept = jnp.minimum(decay, (1 + updates) / (10 + updates)) ** (1 / accumulate_steps)
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, average, variables)


def _pixel_counts(logits: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Confusion counts at probability 0.5 of each example, (N,) float32, in pixels."""
    counts = confusion_counts(logits > 0, mask > 0.5, axis=(1, 2, 3))
    return {name: count.astype(jnp.float32) for name, count in counts.items()}


def make_train_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    frozen: FrozenLung | None = None,
    *,
    losses: Mapping[str, Loss] = LOSSES,
    augmentations: Mapping[str, Augmentation] = AUGMENTATIONS,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
) -> TrainStep:
    """The pure step of a config; jit it, donate the state, vmap or shard it.

    Args:
      config: which task, loss and augmentation.
      optimizer: from `make_optimizer`, or any other.
      frozen: the lung model, for task "infection".
      losses: the table of loss terms.
      augmentations: the table of transforms.
      architectures: the table of models.

    Returns:
      `step(state, batch, key, lung_variables) -> (state, metrics)`. Randomness is `fold_in(key, state.step)`;
      `lung_variables` is None except for task "infection"; metrics are the scalars "loss" and "finite" (whether loss
      and gradient are) and the summed counts.
    """
    model = build_model(config, default_convolution(), architectures)
    loss_fn, patches = make_loss(config.train.loss, losses), config.model.patch_grid

    def step(
        state: TrainState, batch: Batch, key: jax.Array, lung_variables: Variables | None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        image, target = augment(
            jax.random.fold_in(key, state.step),
            batch["image"],
            batch["mask"].astype(jnp.float32),
            config.augment,
            augmentations,
        )
        target = target[..., :1]
        x = _model_input(model, image, frozen, lung_variables)

        def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            variables = {**state.variables, "params": params}
            logits, batch_stats = apply_logits(model, variables, x, train=True, patch_grid=patches)
            value = loss_fn.value(loss_fn.sums(logits, target, jnp.ones(len(logits))))
            return value, (logits, batch_stats)

        params = state.variables["params"]
        (value, (logits, batch_stats)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((value, gradient))]))
        if config.train.skip_nonfinite:  # the optimizer leaves out what has such a gradient, and knows no loss
            gradient = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.nan), gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, params)
        counts = jax.tree.map(jnp.sum, _pixel_counts(logits, target))
        if config.train.skip_nonfinite:
            batch_stats, counts = jax.tree.map(
                partial(jnp.where, finite),
                (batch_stats, counts),
                (state.variables["batch_stats"], jax.tree.map(jnp.zeros_like, counts)),
            )
        variables = {"params": optax.apply_updates(params, updates), "batch_stats": batch_stats}
        average, settings = state.average, config.train
        if average is not None:
            average = update_average(average, variables, state.step, settings.ema_decay, settings.accumulate_steps)
        return TrainState(state.step + 1, variables, opt_state, average), {"loss": value, "finite": finite, **counts}

    return step


def compile_train_step(
    config: Config,
    lung: Config | None = None,
    *,
    losses: Mapping[str, Loss] = LOSSES,
    augmentations: Mapping[str, Augmentation] = AUGMENTATIONS,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
) -> tuple[Any, TrainState]:
    """The compiled step of a config, with the state donated, without running it; for the tables see `make_train_step`.

    `lung` is the config of the frozen lung model, for task "infection".

    Returns:
      the compiled step, whose `memory_analysis()` tells what it holds, and the shapes of the state.
    """
    optimizer, size = make_optimizer(config, 100), config.preprocess.image_size
    state: Any = jax.eval_shape(lambda: create_state(config, optimizer, architectures))
    shape = (config.train.batch_size, size, size, config.preprocess.channels)
    masks = (*shape[:-1], 1 + shape[-1])
    batch: Any = {"image": jax.ShapeDtypeStruct(shape, np.float32), "mask": jax.ShapeDtypeStruct(masks, np.uint8)}
    frozen, lung_variables = None, None
    if lung:
        frozen = frozen_lung(lung, architectures)
        lung_variables = variable_shapes(frozen.model, model_image_size(lung))
    step_fn = make_train_step(
        config, optimizer, frozen, losses=losses, augmentations=augmentations, architectures=architectures
    )
    step = jax.jit(step_fn, donate_argnums=0)
    return step.lower(state, batch, jax.random.key(0), lung_variables).compile(), state


def make_eval_step(
    config: Config,
    frozen: FrozenLung | None = None,
    *,
    losses: Mapping[str, Loss] = LOSSES,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
) -> EvalStep:
    """The pure evaluation step: sums over the valid slices of a batch, which add up over batches.

    Args:
      config: which task and loss.
      frozen: the lung model, for task "infection".
      losses: the table of loss terms.
      architectures: the table of models.

    Returns:
      `step(variables, batch, lung_variables) -> {"loss", "tp", "fp", "fn", "tn"}`: scalars, and under "loss" the sums
      from which `make_loss(...).value` forms the loss.
    """
    model = build_model(config, default_convolution(), architectures)
    loss_fn, patches = make_loss(config.train.loss, losses), config.model.patch_grid

    def step(variables: Variables, batch: Batch, lung_variables: Variables | None) -> dict[str, Any]:
        target = batch["mask"][..., :1].astype(jnp.float32)
        x = _model_input(model, batch["image"], frozen, lung_variables)
        logits, _ = apply_logits(model, variables, x, train=False, patch_grid=patches)
        valid = batch["valid"].astype(jnp.float32)
        counts = {name: jnp.sum(count * valid) for name, count in _pixel_counts(logits, target).items()}
        return {"loss": loss_fn.sums(logits, target, valid), **counts}

    return step


def _model_input(
    model: Any, image: jax.Array, frozen: FrozenLung | None, lung_variables: Variables | None
) -> jax.Array:
    if frozen is None or lung_variables is None:
        return infection_input(model, image, None)
    slices = lung_input(frozen.model, image)
    lung = predict_probability(
        frozen.model, lung_variables, slices, patch_grid=frozen.patch_grid, averaging=frozen.averaging
    )
    return infection_input(model, image, lung)


def frozen_lung(config: Config, architectures: Mapping[str, Architecture] = ARCHITECTURES) -> FrozenLung:
    """What a step needs of a lung model's config."""
    if TASKS[config.task].target != "lung":
        raise ValueError(f"expected a lung model, this is one for {config.task}")
    model = build_model(config, default_convolution(), architectures)
    return FrozenLung(model, config.model.patch_grid, averaging_of(config))
