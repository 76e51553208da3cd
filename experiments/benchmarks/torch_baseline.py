"""The original's architecture in PyTorch, with its parameter names, and the work that the benchmarks give it.

The one module that imports PyTorch when it is imported: take it with `load_torch_baseline`.
"""

import math
from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from resunet_jax.config import Config
from resunet_jax.data.batches import Batch, ProcessShard, SliceSource, train_batches
from resunet_jax.data.volume import FloatArray
from resunet_jax.inference.predictor import Predictor
from resunet_jax.model.build import averaging_of
from resunet_jax.model.cascade import Averaging, symmetric_context
from resunet_jax.model.resunet import Variables
from resunet_jax.training.augment import augment
from resunet_jax.training.step import create_state, make_optimizer
from resunet_jax.weights.store import LoadedModel
from resunet_jax.weights.torch import state_dict_from_params


class ResidualConv(nn.Module):
    """See `ResidualBlock` of `model/resunet.py`."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, features, 3, stride=stride, padding=1),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, padding=1),
        )
        self.conv_skip = nn.Sequential(
            nn.Conv2d(channels, features, 3, stride=stride, padding=1), nn.BatchNorm2d(features)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        return self.conv_block(x) + self.conv_skip(x)


class Upsample(nn.Module):
    """A transposed convolution, 2×2 of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        return self.upsample(x)


class TorchResUnet(nn.Module):
    """From (N, C, H, W) to logits (N, 1, H, W)."""

    def __init__(self, in_channels: int, filters: tuple[int, ...]) -> None:
        super().__init__()
        f1, f2, f3, f4 = filters
        self.input_layer = nn.Sequential(
            nn.Conv2d(in_channels, f1, 3, padding=1), nn.BatchNorm2d(f1), nn.ReLU(), nn.Conv2d(f1, f1, 3, padding=1)
        )
        self.input_skip = nn.Sequential(nn.Conv2d(in_channels, f1, 3, padding=1))
        self.residual_conv_1 = ResidualConv(f1, f2, 2)
        self.residual_conv_2 = ResidualConv(f2, f3, 2)
        self.bridge = ResidualConv(f3, f4, 2)
        self.upsample_1 = Upsample(f4)
        self.up_residual_conv1 = ResidualConv(f4 + f3, f3, 1)
        self.upsample_2 = Upsample(f3)
        self.up_residual_conv2 = ResidualConv(f3 + f2, f2, 1)
        self.upsample_3 = Upsample(f2)
        self.up_residual_conv3 = ResidualConv(f2 + f1, f1, 1)
        self.output_layer = nn.Sequential(nn.Conv2d(f1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        level1 = self.input_layer(x) + self.input_skip(x)
        level2 = self.residual_conv_1(level1)
        level3 = self.residual_conv_2(level2)
        y = self.upsample_1(self.bridge(level3))
        y = self.up_residual_conv1(torch.cat([y, level3], dim=1))
        y = self.up_residual_conv2(torch.cat([self.upsample_2(y), level2], dim=1))
        y = self.up_residual_conv3(torch.cat([self.upsample_3(y), level1], dim=1))
        return self.output_layer(y)


class Trainer:
    """A model with its batch: a training step without augmentation, and a forward pass.

    On a GPU: channels last, `torch.compile`, and autocast where bfloat16 is asked for.
    """

    def __init__(
        self,
        filters: tuple[int, ...],
        batch: dict[str, npt.NDArray[Any]],
        *,
        bfloat16: bool,
        gpu: bool,
    ) -> None:
        """Takes a batch as of `data/batches.py`."""
        self._device = "cuda" if gpu else "cpu"
        self._bfloat16 = bfloat16
        arrays = [
            torch.tensor(batch[name].transpose(0, 3, 1, 2)).float().to(self._device) for name in ("image", "mask")
        ]
        model = TorchResUnet(1, filters).to(self._device)
        if gpu:
            model = model.to(memory_format=torch.channels_last)
            arrays = [array.contiguous(memory_format=torch.channels_last) for array in arrays]
        self._image, self._target = arrays[0], arrays[1][:, :1]
        self._optimizer = torch.optim.Adam(model.parameters(), 1e-4)
        self._model: Any = torch.compile(model) if gpu else model

    def step(self) -> float:
        """One step of Adam; returns the loss, and so waits for it."""
        self._model.train()
        self._optimizer.zero_grad()
        with torch.autocast(self._device, torch.bfloat16, enabled=self._bfloat16):
            logits = self._model(self._image)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), self._target)
        loss.backward()
        self._optimizer.step()
        return float(loss.item())

    def forward(self) -> float:
        """A pass in evaluation mode; returns one value, and so waits for it."""
        self._model.eval()
        with torch.no_grad(), torch.autocast(self._device, torch.bfloat16, enabled=self._bfloat16):
            return float(self._model(self._image)[0, 0, 0, 0].item())


class InfectionTrainer:
    """An infection training of the default recipe, step for step as `fit` takes it; the work on arrays is PyTorch's.

    Batches come from the same cache and are augmented by the same program, which takes a hundredth of a step.
    """

    def __init__(self, config: Config, lung: LoadedModel, source: SliceSource) -> None:
        """Takes the config of the infection model, its lung model, and the slices."""
        train = config.train
        self._config = config
        self._steps_per_epoch = math.ceil(len(source) / train.batch_size)
        shard = ProcessShard(lambda batch: batch)
        self._batches = train_batches(source, train.batch_size, train.seed, shard)
        self._augment = jax.jit(partial(augment, config=config.augment))
        self._key = jax.random.fold_in(jax.random.key(train.seed), 1)
        self._lung = _to_torch(lung)
        optimizer = make_optimizer(config, self._steps_per_epoch)
        variables = create_state(config, optimizer, lung_variables=lung.variables).variables
        self._model = _with_weights(TorchResUnet(config.preprocess.channels + 1, config.model.filters), variables)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), weight_decay=train.weight_decay)
        steps = train.epochs * self._steps_per_epoch
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            train.learning_rate,
            steps,
            pct_start=0.15,
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=100,
        )
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(train.ema_decay)
        self._average = torch.optim.swa_utils.AveragedModel(self._model, multi_avg_fn=average, use_buffers=True)

    def epoch(self) -> list[float]:
        """The next steps, an epoch of them, and their losses."""
        self._model.train()
        return [self._step(next(self._batches)) for _ in range(self._steps_per_epoch)]

    def _step(self, batch: Batch) -> float:
        key = jax.random.fold_in(self._key, self._schedule.last_epoch)  # PyTorch's word for steps taken
        image, mask = self._augment(key, batch["image"], batch["mask"].astype(np.float32))
        x, target = _to_nchw(symmetric_context(image)), _to_nchw(mask[..., :1])
        with torch.no_grad():
            lung = torch.sigmoid(self._lung(x[:, : self._lung.input_skip[0].in_channels]))
        closed = _close(lung, self._config.cascade.closing_fraction)
        self._optimizer.zero_grad()
        logits = self._model(torch.cat([x, closed], dim=1))
        probability = torch.sigmoid(logits)
        overlap, area = (probability * target).sum(), probability.sum() + target.sum()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, target) + 1 - (2 * overlap + 2) / (area + 2)
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self._average.update_parameters(self._model)
        return float(loss.item())


def _to_nchw(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.array(x).transpose(0, 3, 1, 2)))


def _close(probability: torch.Tensor, fraction: float) -> torch.Tensor:
    """See `close_lung_probability`; (N, 1, H, W)."""
    reach = round(fraction * probability.shape[-1] / 2)

    def highest(x: torch.Tensor) -> torch.Tensor:
        for window, padding in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
            x = nn.functional.max_pool2d(x, window, 1, padding)
        return x

    return -highest(-highest(probability))


def matrix_product(size: int) -> float:
    """One product of square matrices."""
    a = torch.ones((size, size))
    return float(torch.matmul(a, a)[0, 0].item())


class TorchPredictor(Predictor):
    """A predictor's weights in PyTorch, both models on every slice, no lesions added; the rest is the same code."""

    def slice_probabilities(self, images: FloatArray) -> dict[str, FloatArray]:
        """See `Predictor.slice_probabilities`."""
        models = self.__dict__.setdefault("_torch", {name: _to_torch(getattr(self, name)) for name in self.structures})
        outputs = {name: np.empty(images.shape[:-1], np.float32) for name in self.structures}
        closing = self.infection.model.closing_fraction if self.infection else 0.0
        averaging = {name: averaging_of(getattr(self, name).config) for name in self.structures}
        with torch.no_grad():
            for start in range(0, len(images), self.batch_size):
                image = _to_nchw(symmetric_context(images[start : start + self.batch_size]))
                slices = image[:, : models["lung"].input_skip[0].in_channels]
                lung = _probability(models["lung"], slices, averaging["lung"])
                stacked = torch.cat([image, _close(lung, closing)], dim=1)
                infection = _probability(models["infection"], stacked, averaging["infection"])
                outputs["lung"][start : start + len(image)] = lung[:, 0].numpy()
                outputs["infection"][start : start + len(image)] = infection[:, 0].numpy()
        return outputs


def _probability(model: nn.Module, x: torch.Tensor, averaging: Averaging) -> torch.Tensor:
    """See `predict_probability`, of one view or of the two of the default recipe; (N, C, H, W)."""
    if not any(averaging):
        return torch.sigmoid(model(x))
    if not all(averaging):
        raise NotImplementedError(f"PyTorch's side of the benchmark has no {averaging}")
    left, right = x[:, :1].chunk(2, dim=-1)
    turned = left.sum((1, 2, 3), keepdim=True) > right.sum((1, 2, 3), keepdim=True)
    x = torch.where(turned, x.flip(-1), x)
    alone = torch.cat([x[:, :1].expand(-1, 3, -1, -1), x[:, 3:]], dim=1)
    mean = (torch.sigmoid(model(x)) + torch.sigmoid(model(alone.flip(-1))).flip(-1)) / 2
    return torch.where(turned, mean.flip(-1), mean)


def _to_torch(loaded: LoadedModel) -> nn.Module:
    return _with_weights(TorchResUnet(loaded.model.in_channels, loaded.config.model.filters), loaded.variables).eval()


def _with_weights(model: nn.Module, variables: Variables) -> nn.Module:
    arrays = state_dict_from_params(variables)
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, strict=False)
    return model
