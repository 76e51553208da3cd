"""Model folders as plain orbax sees them: restored by both of its APIs, and of no machine."""

import dataclasses
from functools import partial
from pathlib import Path

import flax.core
import jax
import numpy as np
import pytest

from resunet_jax import LoadedModel, create_state, load_model, make_optimizer, save_model
from resunet_jax.config import Config, to_dict
from resunet_jax.errors import InputError
from resunet_jax.model.build import build_model
from resunet_jax.model.resunet import init_variables
from resunet_jax.training.checkpoints import Checkpoints
from resunet_jax.weights.store import CONFIG_FILE, VARIABLES, fingerprint, write_folder
from tests.conftest import TINY

CONFIG = Config(task="infection", **TINY)
RECORD = {"epoch": 1, "step": 0, "val_loss": 1.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    model = build_model(CONFIG)
    return LoadedModel(model, init_variables(model, jax.random.key(0)), CONFIG)


@pytest.fixture(scope="module")
def folder(saved: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "infection"
    save_model(path, saved.variables, saved.config)  # of device arrays, as a training has them
    return path


def check(restored: object, saved: LoadedModel, images: np.ndarray) -> None:
    jax.tree.map(np.testing.assert_array_equal, restored, saved.variables)
    apply = jax.jit(partial(saved.model.apply, train=False))
    np.testing.assert_array_equal(apply(restored, images), apply(saved.variables, images))


@pytest.fixture
def images(rng: np.random.Generator) -> np.ndarray:
    return rng.random((1, 32, 32, 2), np.float32)


def test_plain_orbax_restores_a_model(folder: Path, saved: LoadedModel, images: np.ndarray) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        variables = checkpointer.restore(folder.absolute() / "variables")
    check(variables, saved, images)


def test_plain_orbax_v1_restores_a_model(folder: Path, saved: LoadedModel, images: np.ndarray) -> None:
    from orbax.checkpoint import v1 as ocp

    variables = ocp.load(folder.absolute() / "variables")
    check(variables, saved, images)


def save_checkpoint(workdir: Path) -> None:
    state = create_state(CONFIG, make_optimizer(CONFIG, 1))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, CONFIG, [RECORD], None)
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.restore_latest(state) is not None
    load_model(workdir)


def test_a_model_whose_parameters_are_no_numbers_is_refused(saved: LoadedModel, tmp_path: Path) -> None:
    """It would find nothing in any scan, and say that of healthy lungs."""
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), saved.variables)
    write_folder(tmp_path / "model", {VARIABLES: broken}, {CONFIG_FILE: to_dict(saved.config)})
    with pytest.raises(InputError, match="model: some of its parameters are NaN or infinite; train again"):
        load_model(tmp_path / "model")


def test_what_could_not_be_loaded_is_not_saved(saved: LoadedModel, tmp_path: Path) -> None:
    """The weights may be gone by then."""
    params, other = saved.variables["params"], dataclasses.replace(saved.config.model, filters=(8, 8, 16, 32))
    for variables, config, message in (
        (jax.tree.map(lambda x: np.full_like(x, np.nan), saved.variables), saved.config, "NaN or infinite"),
        ({"params": params}, saved.config, "not those of the config's model"),
        (params, saved.config, "not those of the config's model"),
        (saved.variables, dataclasses.replace(saved.config, model=other), "not those of the config's model"),
    ):
        with pytest.raises(ValueError, match=message):
            save_model(tmp_path / "model", variables, config)
    assert not list(tmp_path.iterdir())
    save_model(tmp_path / "model", flax.core.freeze(saved.variables), saved.config)
    assert fingerprint(load_model(tmp_path / "model").variables) == fingerprint(saved.variables)


def test_no_folder_names_where_it_was_made(saved: LoadedModel, tmp_path: Path) -> None:
    save_model(tmp_path / "model", saved.variables, saved.config)
    save_checkpoint(tmp_path / "run")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "history.json", "manifest.ocdbt"} <= {path.name for path in files}
    for path in files:
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert tmp_path.name.encode() not in path.read_bytes(), path
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    load_model(tmp_path / "elsewhere")


def test_no_deprecated_call_of_orbax_is_left(saved: LoadedModel, tmp_path: Path) -> None:
    """Orbax reports them as events of JAX's monitoring, not as warnings."""
    events: list[str] = []

    def listen(event: str, **_: object) -> None:
        events.append(event)

    def deprecated() -> list[str]:
        return [event for event in events if "/deprecation/" in event]

    jax.monitoring.register_event_listener(listen)
    try:
        save_model(tmp_path / "model", saved.variables, saved.config)
        load_model(tmp_path / "model")
        save_checkpoint(tmp_path / "run")
        assert deprecated() == []
        import orbax.checkpoint as ocp

        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(tmp_path / "old", {"x": np.zeros(1)})
        assert deprecated()  # the trap works
    finally:
        jax.monitoring.unregister_event_listener(listen)
