from .config import (
    AugmentConfig,
    CascadeConfig,
    Config,
    ModelConfig,
    PostprocessConfig,
    PreprocessConfig,
    TrainConfig,
    override,
)
from .errors import InputError, StoppedError
from .inference.batch import segment_scans
from .inference.predictor import Predictor, load_predictor
from .inference.scan import segment_scan
from .model.cascade import cascade, predict_probability
from .model.resunet import ResUnet, init_variables
from .model.winograd import default_convolution
from .recipes import recipe
from .training.augment import augment
from .training.losses import bce, bce_dice, bce_pooled_dice, dice, pooled_dice
from .training.step import (
    TrainState,
    create_state,
    frozen_lung,
    make_eval_step,
    make_optimizer,
    make_train_step,
)
from .weights.store import LoadedModel, load_model, save_model

__version__: str

__all__ = [
    "AugmentConfig",
    "CascadeConfig",
    "Config",
    "InputError",
    "LoadedModel",
    "ModelConfig",
    "PostprocessConfig",
    "Predictor",
    "PreprocessConfig",
    "ResUnet",
    "StoppedError",
    "TrainConfig",
    "TrainState",
    "augment",
    "bce",
    "bce_dice",
    "bce_pooled_dice",
    "cascade",
    "create_state",
    "default_convolution",
    "dice",
    "frozen_lung",
    "init_variables",
    "load_model",
    "load_predictor",
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
