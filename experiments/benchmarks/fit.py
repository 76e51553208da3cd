"""A whole infection training, data path and augmentation included, against the same training in PyTorch."""

import tempfile
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import Row, load_torch_baseline, row, timed
from benchmarks.training import BATCH, NARROW
from resunet_jax.config import Config, override
from resunet_jax.data.batches import SliceSource
from resunet_jax.data.cases import find_cases
from resunet_jax.data.phantom import PhantomConfig, make_phantom
from resunet_jax.data.slice_cache import prepare_cases
from resunet_jax.model.build import build_model
from resunet_jax.model.resunet import init_variables
from resunet_jax.recipes import DEFAULT_RECIPE, recipe
from resunet_jax.training.loop import fit
from resunet_jax.weights.store import LoadedModel

_EPOCHS = 15
_VOLUMES, _SLICES = 6, 54  # with infection masks 282 slices; the six real scans have 321


def fit_suite() -> list[Row]:
    """Seconds of the steps of an epoch, one side after the other in turn, and of all epochs with compilation."""
    with tempfile.TemporaryDirectory(prefix="resunet-jax-benchmark-") as name:
        root = Path(name)
        make_phantom(root / "set", PhantomConfig(volumes=_VOLUMES, slices=_SLICES))
        config, lung = make_models(NARROW, _EPOCHS)
        cases = [case for case in find_cases(root / "set") if case.infection_mask]
        source = SliceSource(prepare_cases(cases, config.preprocess, root / "cache"), "infection")
        baseline = load_torch_baseline()
        trainer = baseline.InfectionTrainer(config, lung, source) if baseline else None
        torch_seconds: list[float] = []

        def train_in_torch(record: dict[str, Any]) -> None:
            del record
            if trainer:
                torch_seconds.append(timed(trainer.epoch))

        history = fit(config, source, None, root / "run", lung, on_epoch=train_in_torch)
    seconds = [record["seconds"] for record in history]
    name = f"infection training, {'-'.join(map(str, NARROW))}, batch {BATCH}, {len(source)} slices"
    totals = [[sum(side)] for side in (seconds, torch_seconds) if side]
    return [
        row("fit", f"{name}: an epoch", "s", seconds, torch_seconds, max_ratio=1.0),
        row("fit", f"{name}: {_EPOCHS} epochs, compilation included", "s", *totals, max_ratio=1.0),
    ]


def make_models(filters: tuple[int, ...], epochs: int, image_size: int = 128) -> tuple[Config, LoadedModel]:
    """The config of an infection training by the default recipe, and a lung model of random weights that feeds it."""
    changes = {
        "model.filters": list(filters),
        "preprocess.image_size": image_size,
        "train.epochs": epochs,
        "train.batch_size": BATCH,
    }
    config = override(recipe(DEFAULT_RECIPE, "lung"), changes)
    model = build_model(config)
    lung = LoadedModel(model, init_variables(model, jax.random.key(0)), config)
    return override(recipe(DEFAULT_RECIPE, "infection"), changes), lung
