from .config import AugmentConfig, Config, ModelConfig, PredictConfig, PreprocessConfig, TrainConfig, override
from .errors import InputError, StoppedError
from .inference.folder import segment_scans
from .inference.segment import Segmenter, load_segmenter, segment_scan
from .model.cascade import cascade, predict_probability
from .model.conv import fastest_convolution
from .model.resunet import ResUnet, init_variables
from .recipes import recipe
from .training.augment import augment
from .training.checkpoints import LoadedModel, load_model, save_model
from .training.losses import bce, bce_dice, bce_pooled_dice, dice, pooled_dice
from .training.steps import (
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
    "PredictConfig",
    "PreprocessConfig",
    "ResUnet",
    "Segmenter",
    "StoppedError",
    "TrainConfig",
    "TrainState",
    "augment",
    "bce",
    "bce_dice",
    "bce_pooled_dice",
    "cascade",
    "create_state",
    "dice",
    "fastest_convolution",
    "frozen_lung",
    "init_variables",
    "load_model",
    "load_segmenter",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
    "override",
    "pooled_dice",
    "predict_probability",
    "recipe",
    "save_model",
    "segment_scan",
    "segment_scans",
]
