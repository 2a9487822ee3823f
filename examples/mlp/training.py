"""The trainings: without noise; Bayes by Backprop from random weights; Bayes by Backprop from the trained ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from bayeformers import BayesianTrainer, kl_divergence, to_bayesian
from bayeformers.models import MLPConfig, MLPForImageClassification
from bayeformers.nn import variational_tensors
from examples.glue.arguments import parse_prior
from examples.glue.training import phase_arguments
from examples.images.classifier_training import make_trainer
from examples.images.data import ImageData
from examples.mlp.arguments import MlpArguments, MlpTrainingArguments


def new_network(mlp_args: MlpArguments, data: ImageData) -> MLPForImageClassification:
    """An untrained network for these images."""
    channels, size, _ = data.shape
    names = dict(enumerate(data.class_names))
    labels = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    config = MLPConfig(hidden_sizes=mlp_args.hidden_sizes, num_channels=channels, image_size=size, **labels)
    return MLPForImageClassification(config)


def fit_from_scratch(
    model: PreTrainedModel, mlp_args: MlpArguments, args: MlpTrainingArguments, data: ImageData
) -> BayesianTrainer:
    """Bayes by Backprop (Blundell et al. 2015): every weight N(its random start, initial_scale^2), and the ELBO."""
    model = to_bayesian(model, freeze=False, prior=parse_prior(mlp_args.prior), estimator=mlp_args.estimator)
    for tensor in variational_tensors(model):
        scale = torch.full_like(tensor.loc, mlp_args.initial_scale)
        tensor.module.set_scale(tensor.parameter_name, scale)
    rate = args.learning_rate if args.bayesian_learning_rate is None else args.bayesian_learning_rate
    changes = {"num_train_epochs": args.bayesian_epochs, "learning_rate": rate}
    return _trained(model, phase_arguments(args, "scratch", **changes), data)


def fit_moped(
    trained: BayesianTrainer, delta: float, mlp_args: MlpArguments, args: MlpTrainingArguments, data: ImageData
) -> BayesianTrainer:
    """The trained network converted, sigma = delta |weight| (Krishnan et al. 2020), and the ELBO from there."""
    prior = parse_prior(mlp_args.moped_prior)
    model = to_bayesian(copy.deepcopy(trained.model), delta, freeze=False, prior=prior, estimator=mlp_args.estimator)
    rate = 0.3 * args.learning_rate if args.moped_learning_rate is None else args.moped_learning_rate
    changes: dict[str, Any] = {"num_train_epochs": args.moped_epochs, "learning_rate": rate}
    return _trained(model, phase_arguments(args, "moped", kl_weight=args.moped_kl_weight, **changes), data)


@torch.no_grad()
def kl_per_image(trainer: BayesianTrainer, data: ImageData) -> float:
    """KL / N of the network that was kept, in nats: the ELBO's second part, before --kl_weight."""
    return float(kl_divergence(trainer.model)) / len(data.train)


def _trained(model: torch.nn.Module, args: MlpTrainingArguments, data: ImageData) -> BayesianTrainer:
    trainer = make_trainer(model, args, data)
    trainer.train()
    return trainer
