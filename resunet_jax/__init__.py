"""Lung and infection segmentation in chest CT: a cascade of residual U-Nets in pure-functional JAX."""

from resunet_jax.config import AugmentConfig, Config, ModelConfig, PreprocessConfig, TrainConfig
from resunet_jax.errors import InputError
from resunet_jax.inference.segment import Segmenter, load_segmenter, segment_scan
from resunet_jax.model.cascade import cascade, predict_probability
from resunet_jax.model.resunet import ResUnet, init_variables
from resunet_jax.training.augment import augment
from resunet_jax.training.checkpoints import LoadedModel, load_model, save_model
from resunet_jax.training.losses import bce, bce_dice, dice
from resunet_jax.training.steps import (
    TrainState,
    create_state,
    frozen_lung,
    make_eval_step,
    make_optimizer,
    make_train_step,
)

__all__ = [
    "AugmentConfig",
    "Config",
    "InputError",
    "LoadedModel",
    "ModelConfig",
    "PreprocessConfig",
    "ResUnet",
    "Segmenter",
    "TrainConfig",
    "TrainState",
    "augment",
    "bce",
    "bce_dice",
    "cascade",
    "create_state",
    "dice",
    "frozen_lung",
    "init_variables",
    "load_model",
    "load_segmenter",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
    "predict_probability",
    "save_model",
    "segment_scan",
]
