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
from .data.preprocess import prepare_volume
from .data.readers import find_sources, open_scan
from .errors import InputError, StoppedError
from .evaluation.evaluate import evaluate
from .inference.batch import segment_scans
from .inference.predictor import Predictor, load_predictor, load_pretrained
from .inference.scan import segment_scan
from .model.cascade import cascade, predict_probability
from .model.resunet import ResUnet, init_variables
from .model.winograd import default_convolution
from .recipes import recipe
from .report.memory import Segmentation, segment_volume
from .training.augment import augment
from .training.losses import bce, bce_dice, bce_pooled_dice, dice, pooled_dice
from .training.step import TrainState, create_state, frozen_lung, make_eval_step, make_optimizer, make_train_step
from .training.train import train
from .weights.export import export_cascade, export_cascade_from_hu, write_export
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
    "Segmentation",
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
    "evaluate",
    "export_cascade",
    "export_cascade_from_hu",
    "find_sources",
    "frozen_lung",
    "init_variables",
    "load_model",
    "load_predictor",
    "load_pretrained",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
    "open_scan",
    "override",
    "pooled_dice",
    "predict_probability",
    "prepare_volume",
    "recipe",
    "save_model",
    "segment_scan",
    "segment_scans",
    "segment_volume",
    "train",
    "write_export",
]
