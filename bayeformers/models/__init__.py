"""Deterministic image classifiers of the literature as transformers models, which `to_bayesian` converts.

Importing this folder registers them with `AutoConfig` and `AutoModelForImageClassification`.
"""

from transformers import AutoConfig, AutoModelForImageClassification

from .cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from .lenet import LeNetConfig, LeNetForImageClassification
from .mlp import MLPConfig, MLPForImageClassification
from .resnet import resnet_config
from .scnn import SCNNConfig, SCNNForImageClassification
from .vgg import VGGConfig, VGGForImageClassification

__all__ = [
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "LeNetConfig",
    "LeNetForImageClassification",
    "MLPConfig",
    "MLPForImageClassification",
    "SCNNConfig",
    "SCNNForImageClassification",
    "VGGConfig",
    "VGGForImageClassification",
    "resnet_config",
]

for _model in (
    CifarResNetForImageClassification,
    LeNetForImageClassification,
    MLPForImageClassification,
    SCNNForImageClassification,
    VGGForImageClassification,
):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForImageClassification.register(_model.config_class, _model)
