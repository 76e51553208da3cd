"""Training step and forward pass against PyTorch, on the CPU or on one GPU."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resunet_jax.benchmark.measure import Row, Run, alternate, load_rival, on_gpu, row
from resunet_jax.config import Config, ModelConfig, PreprocessConfig, TrainConfig
from resunet_jax.model.conv import fastest_convolution
from resunet_jax.model.resunet import init_variables
from resunet_jax.training.steps import compiler_options, create_state, make_optimizer, make_train_step
from resunet_jax.training.tasks import build_model

FULL = (64, 128, 256, 512)
NARROW = (16, 32, 64, 128)
BATCH = 8
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
    """The first is what targets are for."""
    if on_gpu():
        return [Setting(FULL, size, "bfloat16", remat) for size, remat in ((128, False), (256, False), (512, True))]
    return [Setting(FULL, 128, "float32"), Setting(NARROW, 128, "float32")]


def config_of(setting: Setting) -> Config:
    """The config that trains a setting."""
    return Config(
        preprocess=PreprocessConfig(image_size=setting.size),
        model=ModelConfig(filters=setting.filters, dtype="bfloat16" if setting.dtype == "bfloat16" else "float32"),
        train=TrainConfig(batch_size=BATCH, remat=setting.remat),
    )


def make_batch(batch_size: int, size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Slices of noise; the time of a step does not depend on what they show."""
    rng = np.random.default_rng(0)
    shape = (batch_size, size, size, 1)
    return {"image": rng.random(shape, np.float32), "mask": (rng.random(shape) > 0.7).astype(np.uint8)}


def step_flops(setting: Setting) -> float:
    """Floating-point operations of a training step: three times the forward convolutions'."""
    model = build_model(config_of(setting))
    x = jax.ShapeDtypeStruct((BATCH, setting.size, setting.size, 1), jnp.float32)
    forward = jax.jit(lambda v, x: model.apply(v, x, train=False))
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    cost: Any = forward.lower(shapes, x).cost_analysis()
    return 3 * float(cost["flops"])


def train_suite(rounds: int) -> list[Row]:
    """Seconds a training step: ours, augmentation included, against PyTorch's without."""
    rows = []
    for index, setting in enumerate(settings()):
        rival = _rival(setting)
        seconds = alternate(_our_step(setting), rival and rival.step, rounds)
        target = 1.0 if index == 0 or on_gpu() else None
        rows.append(row("train", setting.name, "s", *seconds, ratio_most=target))
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in jax.devices()[0].device_kind), None)
        if peak:
            shares = [step_flops(setting) / s / peak for s in seconds[0]]
            rows.append(row("train", f"{setting.name}: share of the peak", "of 1", shares))
    if not on_gpu():
        rows.append(_matrix_product(rounds))
    return rows


def forward_suite(rounds: int) -> list[Row]:
    """Seconds a forward pass in evaluation mode."""
    rows = []
    for index, setting in enumerate(settings()):
        rival = _rival(setting)
        seconds = alternate(_our_forward(setting), rival and rival.forward, rounds)
        target = 1.0 if index == 0 or on_gpu() else None
        rows.append(row("forward", setting.name, "s", *seconds, ratio_most=target))
    return rows


def _matrix_product(rounds: int) -> Row:
    """What the machine can do: GFLOP/s of a large float32 matrix product, JAX and PyTorch."""
    size = 2048
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    rival = load_rival()
    theirs = partial(rival.matrix_product, size) if rival else None
    seconds = alternate(lambda: product(a, a).block_until_ready(), theirs, 4 * rounds)
    rates = [[2 * size**3 / s / 1e9 for s in side] for side in seconds]
    return row("train", f"what the machine can do: {size}² matrix product", "GFLOP/s", *rates)


def _our_step(setting: Setting) -> Run:
    config = config_of(setting)
    optimizer = make_optimizer(config, 100)
    step = jax.jit(make_train_step(config, optimizer), donate_argnums=0, compiler_options=compiler_options())
    batch: Any = jax.device_put(make_batch(BATCH, setting.size))
    state = create_state(config, optimizer)
    key = jax.random.key(0)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch, key, None)
        jax.block_until_ready(metrics)

    return run


def _our_forward(setting: Setting) -> Run:
    model = build_model(config_of(setting), fastest_convolution())
    variables = init_variables(model, jax.random.key(0))
    forward = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
    x = jax.device_put(make_batch(BATCH, setting.size)["image"])
    return lambda: forward(variables, x).block_until_ready()


def _rival(setting: Setting) -> Any:
    """The rival's `Trainer`, or None where PyTorch is not installed."""
    rival = load_rival()
    if rival is None:
        return None
    batch = make_batch(BATCH, setting.size)
    return rival.Trainer(setting.filters, batch, bfloat16=setting.dtype == "bfloat16", gpu=on_gpu())
