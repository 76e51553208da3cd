"""The original's parameter names beside ours, and the layouts that differ.

Source: the `state_dict` of the original PyTorch ResUnet. A convolution's kernel is (out, in, h, w) there and
(h, w, in, out) here; that of a transposed one (in, out, h, w) there and, with `transpose_kernel`, (h, w, out, in) here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from resunet_jax.errors import InputError
from resunet_jax.model.resunet import Variables

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


def _set(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def tree_from_torch(arrays: Mapping[str, np.ndarray]) -> Variables:
    """Carries the original's arrays over by name.

    Args:
      arrays: {key of the state_dict: array}; weights, biases and, unless they are gradients, running statistics.

    Returns:
      {"params": ..., "batch_stats": ...} in our layout; "batch_stats" is empty where `arrays` has none.

    Raises:
      InputError: a weight is missing, or is of another kind than the layer's.
    """
    params: dict[str, Any] = {}
    batch_stats: dict[str, Any] = {}
    for path, prefix in LAYERS.items():
        is_norm = "norm" in path[-1]
        statistics = _NORM_STATE if is_norm and f"{prefix}.running_mean" in arrays else {}
        try:
            weight, bias = np.asarray(arrays[f"{prefix}.weight"]), np.asarray(arrays[f"{prefix}.bias"])
            running = {ours: np.asarray(arrays[f"{prefix}.{theirs}"]) for theirs, ours in statistics.items()}
        except KeyError as error:
            raise InputError(f"not a ResUnet of the original: it has no {error}") from error
        if weight.ndim != (1 if is_norm else 4):
            raise InputError(f"not a ResUnet of the original: {prefix}.weight has shape {weight.shape}")
        _set(params, (*path, "scale" if is_norm else "kernel"), weight if is_norm else weight.transpose(2, 3, 1, 0))
        _set(params, (*path, "bias"), bias)
        for name, value in running.items():
            _set(batch_stats, (*path, name), value)
    return {"params": params, "batch_stats": batch_stats}


def torch_from_tree(variables: Variables) -> dict[str, np.ndarray]:
    """The inverse of `tree_from_torch`: arrays by the original's names, in its layout and order of layers.

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
