"""What lung and infection training differ in, as a value."""

import dataclasses

import jax
import jax.numpy as jnp

from resunet_jax.config import Config, Target, TaskName
from resunet_jax.model.conv import Convolution
from resunet_jax.model.resunet import ResUnet


@dataclasses.dataclass(frozen=True)
class Task:
    """What goes in, and which mask is the target.

    Attributes:
      target: the mask to learn.
      uses_lung: whether the frozen lung model's probability is stacked onto the CT.
    """

    target: Target
    uses_lung: bool

    @property
    def in_channels(self) -> int:
        """Channels that the model sees."""
        return 2 if self.uses_lung else 1


TASKS: dict[TaskName, Task] = {
    "lung": Task(target="lung", uses_lung=False),
    "infection": Task(target="infection", uses_lung=True),
    "infection_ct": Task(target="infection", uses_lung=False),
}


def build_model(config: Config, convolution: Convolution = jax.lax.conv_general_dilated) -> ResUnet:
    """The module that a config describes; for `convolution` see `ResUnet`."""
    return ResUnet(
        in_channels=TASKS[config.task].in_channels,
        filters=config.model.filters,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.train.remat,
        lung_closing=config.model.lung_closing,
        convolution=convolution,
    )
