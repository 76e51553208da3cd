"""What a training step holds, as the compiler plans it, and native resolution on this machine."""

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks.measure import Row, on_gpu, row, timed
from benchmarks.prediction import prediction_memory
from benchmarks.training import FULL, Setting, config_of, make_batch
from resunet_jax.config import Config
from resunet_jax.training.step import compile_train_step, create_state, make_optimizer


def memory_suite(rounds: int) -> list[Row]:
    """Gigabytes; `rounds` is the number of real steps at native resolution."""
    if on_gpu():
        return [_gpu_peak(Setting(FULL, 512, "bfloat16", remat=True))]
    plain = config_of(Setting(FULL, 128, "float32"))
    rows = [
        row("memory", f"step, full width, 128², effective batch 8{name}: temporary", "GB", [_temporary_gb(config)])
        for name, config in {
            "": plain,
            ", remat": _with(plain, remat=True),
            ", bfloat16": config_of(Setting(FULL, 128, "bfloat16")),
            ", 2 × 4 accumulated": _with(plain, batch_size=2, accumulate_steps=4),
        }.items()
    ]
    native = _with(config_of(Setting(FULL, 512, "float32")), batch_size=1, accumulate_steps=8)
    name = "step, full width, 512², effective batch 8 as 1 × 8 accumulated"
    rows.append(row("memory", f"{name}: temporary", "GB", [_temporary_gb(native)], max_value=4.5))
    rows.append(row("memory", f"{name}: seconds of each of {max(3, rounds)} steps", "s", _real_steps(native, rounds)))
    return rows + prediction_memory()


def _with(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def _temporary_gb(config: Config) -> float:
    return float(compile_train_step(config)[0].memory_analysis().temp_size_in_bytes / 1e9)


def _real_steps(config: Config, rounds: int) -> list[float]:
    step, state = compile_train_step(config)[0], create_state(config, make_optimizer(config, 100))
    batch = jax.device_put(make_batch(config.train.batch_size, config.preprocess.image_size))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch, jax.random.key(0), None)
        if not np.isfinite(float(metrics["loss"])):
            raise FloatingPointError("the loss of the benchmark is not finite")

    return [timed(run) for _ in range(max(3, rounds))]


def _gpu_peak(setting: Setting) -> Row:
    """What the device held at most, parameters and optimizer included, since the process began."""
    _real_steps(config_of(setting), rounds=3)
    statistics: Any = jax.devices()[0].memory_stats()
    return row(
        "memory", f"{setting.name}: peak on the device", "GB", [statistics["peak_bytes_in_use"] / 1e9], max_value=6
    )
