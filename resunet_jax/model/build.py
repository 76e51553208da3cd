"""From a config to its module: architectures by name, and what lung and infection models differ in."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from resunet_jax.config import INFECTION_POSTPROCESS, Config, Structure, TaskName
from resunet_jax.errors import InputError
from resunet_jax.model.cascade import Averaging
from resunet_jax.model.resunet import ResUnet
from resunet_jax.model.winograd import Convolution


@dataclasses.dataclass(frozen=True)
class Task:
    """What goes in, and which mask is the target.

    Attributes:
      target: the mask to learn.
      uses_lung: whether the frozen lung model's probability is stacked onto the CT.
    """

    target: Structure
    uses_lung: bool


TASKS: dict[TaskName, Task] = {
    "lung": Task(target="lung", uses_lung=False),
    "infection": Task(target="infection", uses_lung=True),
    "infection_ct": Task(target="infection", uses_lung=False),
}


def model_image_size(config: Config) -> int:
    """Side in pixels of what the model is applied to: of a slice, or of a patch of one."""
    return config.preprocess.image_size // config.model.patch_grid


def averaging_of(config: Config) -> Averaging:
    """The views that a config asks for; a model without context has no view without it."""
    return Averaging(config.model.mirroring, config.model.context_averaging and config.preprocess.channels > 1)


def adds_lesions(config: Config) -> bool:
    """Whether an infection model's masks get lesions by the geometric mean of its views, see `infected_scan_ml`."""
    return config.task != "lung" and config.postprocess.infected_scan_ml > 0 and any(averaging_of(config))


def infection_postprocess(config: Config) -> dict[str, Any]:
    """The fields of `INFECTION_POSTPROCESS` that decide the masks of an infection model, with their values."""
    fields = {name: getattr(config.postprocess, name) for name in INFECTION_POSTPROCESS}
    return {name: v for name, v in fields.items() if adds_lesions(config) or not name.startswith("infected_scan_")}


Architecture = Callable[[Config, Convolution], Any]


def _resunet(config: Config, convolution: Convolution) -> ResUnet:
    first, second, third, fourth = config.model.filters
    return ResUnet(
        in_channels=config.preprocess.channels + TASKS[config.task].uses_lung,
        filters=(first, second, third, fourth),
        dtype=jnp.dtype(config.model.dtype),
        remat=config.train.remat,
        closing_fraction=config.cascade.closing_fraction,
        convolution=convolution,
    )


ARCHITECTURES: dict[str, Architecture] = {"resunet": _resunet}
"""By the name in `ModelConfig.architecture`: (config, convolution) to a Linen module with the attributes `in_channels`,
`closing_fraction` and `convolution`, called with (N, H, W, in_channels) in [0, 1] and the keyword `train`; it returns
float32 logits (N, H, W, 1). Beside "params" it may have "batch_stats", but draws no random numbers when applied."""


def build_model(
    config: Config,
    convolution: Convolution = jax.lax.conv_general_dilated,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
) -> Any:
    """The module that a config describes; for `convolution` see `ResUnet`.

    Raises:
      InputError: the config's architecture is not in the table.
    """
    name = config.model.architecture
    if name not in architectures:
        raise InputError(
            f"architecture {name!r}: unknown; there are {', '.join(architectures)}; install the plugin with it"
        )
    return architectures[name](config, convolution)
