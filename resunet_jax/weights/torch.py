"""Checkpoints of the original PyTorch project to ours, and back; PyTorch is imported when a file is converted.

Parameters go by name, see `LAYERS`, and some layouts differ. Source: the `state_dict` of the original PyTorch ResUnet.
A convolution's kernel is (out, in, h, w) there and (h, w, in, out) here; that of a transposed one (in, out, h, w) there
and, with `transpose_kernel`, (h, w, out, in) here.
"""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from resunet_jax.config import Config, ModelConfig, PreprocessConfig, TaskName
from resunet_jax.errors import InputError, first_line
from resunet_jax.files import atomic_file, expand_user, json_text, make_output_dir, require_absent
from resunet_jax.model.build import averaging_of, build_model
from resunet_jax.model.resunet import Variables
from resunet_jax.progress import logger
from resunet_jax.recipes import recipe
from resunet_jax.weights.store import TORCH_COUNTERS_FILE, load_model, save_model, variable_shapes

STATE_DICT = "model_state_dict"
"""Key of the original's checkpoints that holds the weights."""

_COUNTERS = "num_batches_tracked"

_BLOCK = {
    "norm1": "conv_block.0",
    "conv1": "conv_block.2",
    "norm2": "conv_block.3",
    "conv2": "conv_block.5",
    "skip_conv": "conv_skip.0",
    "skip_norm": "conv_skip.1",
}


def _block(name: str) -> dict[tuple[str, ...], str]:
    return {(name, ours): f"{name}.{theirs}" for ours, theirs in _BLOCK.items()}


LAYERS: dict[tuple[str, ...], str] = {
    ("input_conv1",): "input_layer.0",
    ("input_norm",): "input_layer.1",
    ("input_conv2",): "input_layer.3",
    ("input_skip",): "input_skip.0",
    **_block("residual_conv_1"),
    **_block("residual_conv_2"),
    **_block("bridge"),
    ("upsample_1",): "upsample_1.upsample",
    **_block("up_residual_conv1"),
    ("upsample_2",): "upsample_2.upsample",
    **_block("up_residual_conv2"),
    ("upsample_3",): "upsample_3.upsample",
    **_block("up_residual_conv3"),
    ("output_conv",): "output_layer.0",
}
"""Path of each of our layers -> prefix of its keys in the original's state_dict, in its order."""

_NORM_STATE = {"running_mean": "mean", "running_var": "var"}


def params_from_state_dict(arrays: Mapping[str, np.ndarray]) -> Variables:
    """Carries the original's arrays over by name.

    Args:
      arrays: {key of the state_dict: array}; weights, biases and, unless they are gradients, running statistics.

    Returns:
      {"params": ..., "batch_stats": ...} in our layout; "batch_stats" is empty where `arrays` has none.

    Raises:
      InputError: a weight is missing, or is of another kind than the layer's.
    """
    params: dict[tuple[str, ...], Any] = {}
    batch_stats: dict[tuple[str, ...], Any] = {}
    for path, prefix in LAYERS.items():
        is_norm = "norm" in path[-1]
        statistics = _NORM_STATE if is_norm and f"{prefix}.running_mean" in arrays else {}
        try:
            weight, bias = np.asarray(arrays[f"{prefix}.weight"]), np.asarray(arrays[f"{prefix}.bias"])
            running = {(*path, ours): np.asarray(arrays[f"{prefix}.{theirs}"]) for theirs, ours in statistics.items()}
        except KeyError as error:
            raise InputError(f"not a ResUnet of the original: it has no {error}") from error
        if weight.ndim != (1 if is_norm else 4):
            raise InputError(f"not a ResUnet of the original: {prefix}.weight has shape {weight.shape}")
        params[*path, "scale" if is_norm else "kernel"] = weight if is_norm else weight.transpose(2, 3, 1, 0)
        params[*path, "bias"] = bias
        batch_stats |= running
    return {"params": unflatten_dict(params), "batch_stats": unflatten_dict(batch_stats)}


def state_dict_from_params(variables: Variables) -> dict[str, np.ndarray]:
    """The inverse of `params_from_state_dict`: arrays by the original's names, in its layout and order of layers.

    Args:
      variables: {"params": ..., "batch_stats": ...} of a whole model.
    """
    arrays: dict[str, np.ndarray] = {}
    for path, prefix in LAYERS.items():
        params, stats = variables["params"], variables["batch_stats"]
        for name in path:
            params, stats = params[name], stats.get(name, {})
        is_norm = "scale" in params
        kernel = np.asarray(params["scale"] if is_norm else params["kernel"])
        arrays[f"{prefix}.weight"] = kernel if is_norm else np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        arrays[f"{prefix}.bias"] = np.asarray(params["bias"])
        if is_norm:
            for theirs, ours in _NORM_STATE.items():
                arrays[f"{prefix}.{theirs}"] = np.asarray(stats[ours])
    return arrays


def original_preprocess(image_size: int) -> PreprocessConfig:
    """How the original prepared its slices: per-slice min–max, and two thresholds for the body."""
    return dataclasses.replace(recipe("original", "lung").preprocess, image_size=image_size)


def from_torch(
    path: str | Path, output_dir: str | Path, target: Literal["lung", "infection"], image_size: int = 128
) -> Config:
    """Converts a checkpoint of the original project to a folder that `load_model` takes.

    Architecture (filters, input channels) is read from the weights. Nothing in the file is executed.

    Args:
      path: PyTorch file, a dict with "model_state_dict".
      output_dir: must not exist.
      target: what the model segments.
      image_size: side of the slices that it was trained on, in pixels.

    Returns:
      the config that the model got.

    Raises:
      InputError: PyTorch is not installed, the file is no such checkpoint, or the folder exists or cannot be written.
    """
    torch, path, output_dir = _import_torch(), expand_user(path), expand_user(output_dir)
    require_absent(output_dir)
    arrays, counters = _read(torch, path)
    variables = params_from_state_dict(arrays)
    config = _config(path, variables, target, image_size)
    expected = jax.tree.map(lambda x: x.shape, variable_shapes(build_model(config)))
    if jax.tree.map(np.shape, variables) != expected or len(arrays) != len(state_dict_from_params(variables)):
        raise InputError(f"{path}: its weights are not those of the original's ResUnet; convert that project's file")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
        raise InputError(f"{path}: some of its weights are NaN or infinite; use a checkpoint from before")
    save_model(output_dir, variables, config, {TORCH_COUNTERS_FILE: json_text(counters)})
    return config


def to_torch(path: str | Path, output_file: str | Path) -> None:
    """Writes a model as a checkpoint that the original project loads; the file appears atomically.

    A warning says where its slices are not prepared as the original prepares them.

    Args:
      path: for `load_model`.
      output_file: must not exist.

    Raises:
      InputError: PyTorch is not installed, there is no model, or the file exists or cannot be written.
    """
    torch, path, output_file = _import_torch(), expand_user(path), expand_user(output_file)
    require_absent(output_file, "file")
    loaded = load_model(path)
    config = loaded.config
    if config.model.patch_grid > 1 or any(averaging_of(config)):
        logger.warning(
            "%s: sees a slice in patches or views (patch_grid, mirroring, context_averaging); the original's code does "
            "not, and its masks will be others",
            path,
        )
    if config.preprocess != original_preprocess(config.preprocess.image_size) or config.cascade.closing_fraction:
        logger.warning(
            "%s: the original's code prepares slices otherwise; give this model %d channel(s) as its config says "
            "(normalization %s, context_mm %g, closing_fraction %g)",
            path,
            loaded.model.in_channels,
            config.preprocess.normalization,
            config.preprocess.context_mm,
            config.cascade.closing_fraction,
        )
    arrays = state_dict_from_params(loaded.variables)
    counters = _read_counters(path)
    state: dict[str, Any] = {}
    for name, array in arrays.items():
        state[name] = torch.from_numpy(np.array(array))
        if name.endswith(".running_var"):
            counter = name.replace("running_var", _COUNTERS)
            state[counter] = torch.tensor(counters.get(counter, 0), dtype=torch.int64)
    content = io.BytesIO()  # to a file, torch reports what fails in its own ways
    torch.save({STATE_DICT: state}, content)
    make_output_dir(output_file.parent)
    with atomic_file(output_file) as partial:
        partial.write_bytes(content.getvalue())


def _import_torch() -> ModuleType:
    try:
        import torch  # noqa: PLC0415 (an optional extra)
    except ImportError as error:
        raise InputError("this needs PyTorch; install it with: pip install 'resunet-jax[torch]'") from error
    return torch


def _read(torch: ModuleType, path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The float arrays and the counters of a file, which is not trusted."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check `path`") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); check `path`") from error
    except Exception as error:  # torch has no common base for what a wrong or hostile file makes it raise
        raise InputError(
            f"{path}: refused, not a plain PyTorch checkpoint; give one of the original project, with arrays alone"
        ) from error
    state = content.get(STATE_DICT) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path}: no dict with {STATE_DICT!r} in it; give a checkpoint of the original project")
    arrays: dict[str, np.ndarray] = {}
    counters: dict[str, int] = {}
    for name, value in state.items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if plain and name.endswith(_COUNTERS) and value.ndim == 0 and value.dtype == torch.int64:
            counters[name] = int(value)
        elif plain and value.dtype == torch.float32 and value.is_contiguous():
            arrays[name] = value.detach().numpy()
        else:
            raise InputError(f"{path}: {name} is not a plain float32 tensor; give a checkpoint of the original project")
    known = {
        f"{prefix}.{kind}" for prefix in LAYERS.values() for kind in ("weight", "bias", "running_mean", "running_var")
    }
    unknown = sorted(set(arrays) - known)
    if unknown:
        raise InputError(f"{path}: {unknown[0]} is not in the original's ResUnet; convert that project's file")
    return arrays, counters


def _config(path: Path, variables: Mapping[str, Any], target: str, image_size: int) -> Config:
    params = variables["params"]
    channels = params["input_conv1"]["kernel"].shape[-2]
    tasks: dict[tuple[str, int], TaskName] = {
        ("lung", 1): "lung",
        ("infection", 1): "infection_ct",
        ("infection", 2): "infection",
    }
    if (target, channels) not in tasks:
        remedy = "the original has none with context" if channels > 2 else "check `target`"
        raise InputError(f"{path}: a model on {channels} channel(s), which is no {target} model; {remedy}")
    convolutions = (
        params["input_conv1"],
        *(params[name]["conv1"] for name in ("residual_conv_1", "residual_conv_2", "bridge")),
    )
    first, second, third, fourth = (int(convolution["kernel"].shape[-1]) for convolution in convolutions)
    return dataclasses.replace(
        recipe("original", tasks[target, channels]),
        preprocess=original_preprocess(image_size),
        model=ModelConfig(filters=(first, second, third, fourth)),
    )


def _read_counters(path: Path) -> dict[str, int]:
    """What PyTorch's batch normalisation counts and nothing uses, kept so that the way there and back loses nothing."""
    file = path / TORCH_COUNTERS_FILE
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): int(value) for name, value in values.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)}); delete it, nothing depends on it") from error
