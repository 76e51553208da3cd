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
_BLOCKS = ("residual_conv_1", "residual_conv_2", "bridge", *(f"up_residual_conv{i}" for i in (1, 2, 3)))

LAYERS: dict[tuple[str, ...], str] = {
    ("input_conv1",): "input_layer.0",
    ("input_norm",): "input_layer.1",
    ("input_conv2",): "input_layer.3",
    ("input_skip",): "input_skip.0",
    **{(block, ours): f"{block}.{theirs}" for block in _BLOCKS for ours, theirs in _BLOCK.items()},
    **{(f"upsample_{i}",): f"upsample_{i}.upsample" for i in (1, 2, 3)},
    ("output_conv",): "output_layer.0",
}
"""Path of each of our layers -> prefix of its keys in the original's state_dict."""


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
      InputError: a weight is missing.
    """
    params: dict[str, Any] = {}
    batch_stats: dict[str, Any] = {}
    for path, prefix in LAYERS.items():
        try:
            weight, bias = np.asarray(arrays[f"{prefix}.weight"]), np.asarray(arrays[f"{prefix}.bias"])
        except KeyError as error:
            raise InputError(f"not a ResUnet of the original: it has no {error}") from error
        is_norm = weight.ndim == 1
        kernel = weight if is_norm else weight.transpose(2, 3, 1, 0)
        _set(params, (*path, "scale" if is_norm else "kernel"), kernel)
        _set(params, (*path, "bias"), bias)
        if is_norm and f"{prefix}.running_mean" in arrays:
            _set(batch_stats, (*path, "mean"), np.asarray(arrays[f"{prefix}.running_mean"]))
            _set(batch_stats, (*path, "var"), np.asarray(arrays[f"{prefix}.running_var"]))
    return {"params": params, "batch_stats": batch_stats}
