"""Training step and forward pass compared with PyTorch, on the CPU or on one GPU."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Row, Run, interleave, load_torch_baseline, on_gpu, row
from resunet_jax.config import Config, ModelConfig, PreprocessConfig
from resunet_jax.inference.predictor import jitted_maps
from resunet_jax.model.build import build_model
from resunet_jax.model.resunet import init_variables
from resunet_jax.model.winograd import default_convolution
from resunet_jax.recipes import recipe
from resunet_jax.training import step as training_step
from resunet_jax.training.step import create_state, make_optimizer, make_train_step
from resunet_jax.weights.store import LoadedModel

FULL = (64, 128, 256, 512)
NARROW = (16, 32, 64, 128)
BATCH = 8
_MATRIX_SIZE = 2048
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the vendor's data sheets


class Setting(NamedTuple):
    """What is measured: `size`² slices, `BATCH` of them."""

    filters: tuple[int, int, int, int]
    size: int
    dtype: str
    remat: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        return f"{'-'.join(map(str, self.filters))}, {self.size}², batch {BATCH}, {self.dtype}" + (
            ", remat" if self.remat else ""
        )


def settings() -> list[Setting]:
    """What a step and a forward pass are timed at."""
    if on_gpu():
        return [Setting(FULL, size, "bfloat16", remat) for size, remat in ((128, False), (256, False), (512, True))]
    return [Setting(FULL, 128, "float32"), Setting(NARROW, 128, "float32")]


def config_of(setting: Setting) -> Config:
    """The config that trains a setting: the original's loss and optimizer, as the baseline's."""
    original = recipe("original", "lung")
    return dataclasses.replace(
        original,
        preprocess=PreprocessConfig(image_size=setting.size),
        model=ModelConfig(filters=setting.filters, dtype="bfloat16" if setting.dtype == "bfloat16" else "float32"),
        train=dataclasses.replace(original.train, batch_size=BATCH, remat=setting.remat),
    )


def make_batch(batch_size: int, size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Slices of noise; the time of a step does not depend on what they show."""
    rng = np.random.default_rng(0)
    shape = (batch_size, size, size, 1)
    mask = np.repeat((rng.random(shape) > 0.7).astype(np.uint8), 2, axis=-1)  # the target, and the same as infection
    return {"image": rng.random(shape, np.float32), "mask": mask}


def step_flops(setting: Setting) -> float:
    """Floating-point operations of a training step: three times the forward convolutions'."""
    model = build_model(config_of(setting))
    x = jax.ShapeDtypeStruct((BATCH, setting.size, setting.size, 1), jnp.float32)
    forward = jax.jit(lambda v, x: model.apply(v, x, train=False))
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    cost: Any = forward.lower(shapes, x).cost_analysis()
    return 3 * float(cost["flops"])


def train_suite(rounds: int) -> list[Row]:
    """Seconds per training step: JAX with augmentation, PyTorch without; on CPUs also with XLA's own convolution."""
    rows = [] if on_gpu() else [matrix_product(rounds)]
    for setting in settings():
        baseline = _torch_trainer(setting)
        seconds = interleave(_jax_step(setting), baseline and baseline.step, rounds)
        rows.append(row("train", setting.name, "s", *seconds, max_ratio=_step_ratio(setting)))
        if not on_gpu():
            both = interleave(_jax_step(setting), _jax_step(setting, jax.lax.conv_general_dilated), rounds)
            rows.append(row("train", f"{setting.name}, compared with XLA's own convolution", "s", *both))
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in jax.devices()[0].device_kind), None)
        if peak:
            fractions = [step_flops(setting) / s / peak for s in seconds[0]]
            rows.append(row("train", f"{setting.name}: share of the peak", "of 1", fractions))
    return rows


def _step_ratio(setting: Setting) -> float:
    """The target of a step, to PyTorch's time."""
    if on_gpu():
        return 0.77  # 1.3 times as fast
    return 0.8 if setting.filters == FULL else 1.0


def forward_suite(rounds: int) -> list[Row]:
    """Seconds per forward pass in evaluation mode, as prediction makes it."""
    rows = []
    for setting in settings():
        baseline = _torch_trainer(setting)
        seconds = interleave(_jax_forward(setting), baseline and baseline.forward, rounds)
        rows.append(row("forward", setting.name, "s", *seconds, max_ratio=0.8))
    return rows


def matrix_product(rounds: int, when: str = "") -> Row:
    """What the machine can do: GFLOP/s of a large float32 matrix product, JAX and PyTorch."""
    size = _MATRIX_SIZE
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    baseline = load_torch_baseline()
    torch_run = partial(baseline.matrix_product, size) if baseline else None
    seconds = interleave(lambda: product(a, a).block_until_ready(), torch_run, 4 * rounds)
    rates = [[2 * size**3 / s / 1e9 for s in side] for side in seconds]
    return row("train", f"what the machine can do: {size}² matrix product{when}", "GFLOP/s", *rates)


def _jax_step(setting: Setting, convolution: Callable[..., jax.Array] | None = None) -> Run:
    config = config_of(setting)
    optimizer = make_optimizer(config, 100)
    with mock.patch.object(training_step, "default_convolution", return_value=convolution or default_convolution()):
        train_step = make_train_step(config, optimizer)
    step = jax.jit(train_step, donate_argnums=0)
    batch: Any = jax.device_put(make_batch(BATCH, setting.size))
    state = create_state(config, optimizer)
    key = jax.random.key(0)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch, key, None)
        jax.block_until_ready(metrics)

    return run


def _jax_forward(setting: Setting) -> Run:
    model = build_model(config_of(setting))
    variables = init_variables(model, jax.random.key(0))
    forward = jitted_maps(LoadedModel(model, variables, config_of(setting)))
    x: Any = jax.device_put(make_batch(BATCH, setting.size)["image"])
    return lambda: forward(variables, x).block_until_ready()


def _torch_trainer(setting: Setting) -> Any:
    """PyTorch's `Trainer`, or None where PyTorch is not installed."""
    baseline = load_torch_baseline()
    if baseline is None:
        return None
    batch = make_batch(BATCH, setting.size)
    return baseline.Trainer(setting.filters, batch, bfloat16=setting.dtype == "bfloat16", gpu=on_gpu())
