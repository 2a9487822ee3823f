"""Every method of the regression example, each from the training points to a `Fitted`: predictions and functions.

Training runs where the Trainer runs it; all else, on networks this small, on the CPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.utils.data import Dataset

from bayeformers import BayesianTrainer, LaplacePosterior, NormalPrior, laplace, predict, to_bayesian
from bayeformers.losses import gaussian_nll, split_variance_head
from bayeformers.predictive import Predictive
from examples.curves import bayesian_linear
from examples.curves.arguments import Arguments, CurveTrainingArguments
from examples.curves.hmc import hmc, split_r_hat
from examples.curves.network import CurveConfig, CurveNetwork, stacked_forward
from examples.linearized import linearized_draws

Noise = float | Literal["head"]
NUM_FUNCTIONS = 12


@dataclass(frozen=True)
class Fitted:
    """One method, in the network's units.

    Attributes:
        predict: from x (N,) to what the method says there.
        functions: from x (N,) to some drawn mean functions (S, N), for the picture; None of a point estimate.
        facts: what fitting decided.
    """

    predict: Callable[[Tensor], Predictive]
    functions: Callable[[Tensor], Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingPoints:
    """Standardised points, (N,) each."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def batch(self) -> dict[str, Tensor]:
        """All of them."""
        return {"x": self.x, "labels": self.y}


@dataclass(frozen=True)
class FullBatches(Dataset[dict[str, Tensor]]):
    """A training of so many full batches as one epoch: an epoch of one step each would cost more than its step."""

    points: TrainingPoints
    num_steps: int

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.points.batch


def only_item(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The collator of `FullBatches`, whose items are batches already."""
    return items[0]


# -- the deterministic network ----------------------------------------------------------------------------------------


def train_map(points: TrainingPoints, noise: Noise, arguments: Arguments) -> CurveNetwork:
    """The weights of largest posterior density: Adam on mean NLL + |w|^2 / (2 N prior_std^2).

    The quadratic is torch's coupled weight decay, a part of the gradient; AdamW's decoupled one is no prior.
    """
    curve, args = arguments
    heads = 2 if noise == "head" else 1
    network = CurveNetwork(CurveConfig(hidden_sizes=tuple(curve.hidden_sizes), num_labels=heads))
    decay = 1 / (len(points) * curve.prior_std**2)
    adam = torch.optim.Adam(network.parameters(), args.learning_rate, weight_decay=decay)

    def mean_nll(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return _gaussian_nll(outputs.logits, labels, noise)

    trainer = BayesianTrainer(
        model=network,
        args=_phase(args, noise, len(points)),
        train_dataset=FullBatches(points, curve.map_steps),
        data_collator=only_item,
        compute_loss_func=mean_nll,
        optimizers=(adam, None),
    )
    trainer.train()
    return network.cpu().eval()


def _gaussian_nll(logits: Tensor, labels: Tensor, noise: Noise) -> Tensor:
    if noise == "head":
        return gaussian_nll(logits, labels)
    log_variance = torch.full_like(logits, 2 * math.log(noise))
    return gaussian_nll(torch.cat([logits, log_variance], dim=1), labels)


def _phase(args: CurveTrainingArguments, noise: Noise, num_points: int) -> CurveTrainingArguments:
    """The arguments of one training: an epoch of `FullBatches`, in which N is the number of points."""
    phase = copy.deepcopy(args)
    changes = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "noise_std": noise}
    for name, value in {**changes, "num_training_items": num_points, "remove_unused_columns": False}.items():
        setattr(phase, name, value)
    return phase


def deterministic(network: CurveNetwork, noise: Noise) -> Fitted:
    """One function, and its noise: a number, or the network's own second output."""
    return Fitted(lambda x: predict(network, {"x": x}, noise_std=noise), facts=_noise_facts(noise))


def _noise_facts(noise: Noise) -> dict[str, Any]:
    return {} if noise == "head" else {"noise_std": noise}


# -- posteriors -------------------------------------------------------------------------------------------------------


def variational(network: CurveNetwork, points: TrainingPoints, noise: Noise, arguments: Arguments) -> Fitted:
    """A mean-field Gaussian by the ELBO, under the prior of the reference, from the deterministic weights on."""
    curve, args = arguments
    prior = NormalPrior(std=curve.prior_std, centre=0.0)
    model = to_bayesian(
        copy.deepcopy(network), curve.delta, freeze=False, prior=prior, estimator="local_reparameterization"
    )
    trainer = BayesianTrainer(
        model=model,
        args=_phase(args, noise, len(points)),
        train_dataset=FullBatches(points, curve.variational_steps),
        data_collator=only_item,
    )
    trainer.train()
    model.cpu()

    def functions(x: Tensor) -> Tensor:
        return _means(predict(model, {"x": x}, num_samples=NUM_FUNCTIONS))

    samples = args.num_eval_samples
    return Fitted(lambda x: predict(model, {"x": x}, num_samples=samples), functions, _noise_facts(noise))


def _means(predictive: Predictive) -> Tensor:
    values = predictive.values
    assert values is not None  # a regression
    return values


def laplace_posterior(
    network: CurveNetwork, points: TrainingPoints, arguments: Arguments, **options: Any
) -> LaplacePosterior:
    """A Gaussian around the deterministic weights; prior precision and noise by the evidence unless ``options`` say."""
    chosen = {"curvature": arguments[0].laplace_curvature, "prior_precision": "marglik", **options}
    return laplace.fit(network, [points.batch], likelihood="regression", progress=False, **chosen)


def linearized(posterior: LaplacePosterior) -> Fitted:
    """The network replaced by its tangent: exact mean and variance."""

    def functions(x: Tensor) -> Tensor:
        return linearized_draws(posterior, {"x": x}, num_samples=NUM_FUNCTIONS)[..., 0]

    def predicted(x: Tensor) -> Predictive:
        return posterior.predict({"x": x}, noise_std=posterior.noise_std)

    return Fitted(predicted, functions, _laplace_facts(posterior))


def local_draws(posterior: LaplacePosterior, num_samples: int) -> Fitted:
    """The network itself at weights drawn around the trained ones."""

    def sampled(x: Tensor, samples: int = num_samples) -> Predictive:
        return posterior.predict({"x": x}, method="sample", num_samples=samples, noise_std=posterior.noise_std)

    return Fitted(sampled, lambda x: _means(sampled(x, NUM_FUNCTIONS)), _laplace_facts(posterior))


def _laplace_facts(posterior: LaplacePosterior) -> dict[str, Any]:
    return {
        "prior_precision": posterior.prior_precision,
        "noise_std": posterior.noise_std,
        "log_marginal_likelihood": posterior.log_marginal_likelihood,
        "effective_parameters": sum(posterior.effective_parameters.values()),
    }


def last_layer(network: CurveNetwork, points: TrainingPoints, arguments: Arguments) -> Fitted:
    """The deterministic features with an exact Bayesian last layer, once as Laplace and once in closed form.

    At the closed form's tau, s and mean the two are one posterior: `facts["difference_from_closed_form"]` is rounding.
    """
    network = copy.deepcopy(network)
    with torch.no_grad():
        features = bayesian_linear.with_bias(network.features(points.x))
        exact = bayesian_linear.tuned_posterior(features, points.y.double())
        network.layers[-1].weight.copy_(exact.mean[None, :-1])
        network.layers[-1].bias.copy_(exact.mean[-1:])
    known = {"prior_precision": exact.prior_precision, "noise_std": exact.noise_std}
    posterior = laplace_posterior(network, points, arguments, subset="last_layer", curvature="full", **known)
    fitted = linearized(posterior)
    predictive = posterior.predict({"x": points.x})
    with torch.no_grad():
        mean, variance = exact.predict(features)
    fitted.facts["difference_from_closed_form"] = {
        "mean": float((predictive.mean - mean).abs().max()),
        "epistemic_std": float((predictive.epistemic_variance.sqrt() - variance.sqrt()).abs().max()),
        "log_marginal_likelihood": posterior.log_marginal_likelihood
        - bayesian_linear.log_evidence(features, points.y.double(), exact.prior_precision, exact.noise_std),
    }
    return fitted


# -- the reference ----------------------------------------------------------------------------------------------------


def reference(network: CurveNetwork, points: TrainingPoints, noise: Noise, arguments: Arguments) -> Fitted:
    """Draws of the posterior itself, of the prior and likelihood that the ELBO is given, by Hamiltonian Monte Carlo."""
    curve, args = arguments
    generator = torch.Generator().manual_seed(args.seed)
    trained = parameters_to_vector(network.parameters()).detach()
    noise_of_start = torch.randn(curve.hmc_chains, len(trained), generator=generator)
    chains = hmc(
        lambda weights: log_posterior(network, weights, points, noise, curve.prior_std),
        trained + 0.3 * curve.prior_std * noise_of_start,
        num_samples=curve.hmc_samples,
        num_warmup=curve.hmc_warmup,
        num_steps=curve.hmc_steps,
        generator=generator,
        progress=not args.disable_tqdm,
    )
    flat = chains.draws[:: max(1, len(chains.draws) * curve.hmc_chains // 1024)].flatten(0, 1)

    def predicted(x: Tensor) -> Predictive:
        return _predictive(torch.cat([stacked_forward(network, part, x) for part in flat.split(256)]), noise)

    def functions(x: Tensor) -> Tensor:
        chosen = torch.linspace(0, len(flat) - 1, NUM_FUNCTIONS).long()
        return stacked_forward(network, flat[chosen], x)[..., 0]

    grid = torch.linspace(float(points.x.min()), float(points.x.max()), 50)
    values = torch.stack([stacked_forward(network, draw, grid)[..., 0] for draw in chains.draws])
    facts = {"acceptance": chains.acceptance, "step_size": chains.step_size, "r_hat": float(split_r_hat(values).max())}
    return Fitted(predicted, functions, {**facts, **_noise_facts(noise)})


def log_posterior(
    network: CurveNetwork, weights: Tensor, points: TrainingPoints, noise: Noise, prior_std: float
) -> Tensor:
    """log p(y | x, w) + log N(w; 0, prior_std^2) of S networks (S, P), up to a constant: (S,)."""
    logits = stacked_forward(network, weights, points.x)
    if noise == "head":
        mean, log_variance = (part[..., 0] for part in split_variance_head(logits))
    else:
        mean = logits[..., 0]
        log_variance = torch.full_like(mean, 2 * math.log(noise))
    nll = 0.5 * ((points.y - mean).square() * (-log_variance).exp() + log_variance).sum(1)
    return -nll - weights.square().sum(1) / (2 * prior_std**2)


def _predictive(logits: Tensor, noise: Noise) -> Predictive:
    if noise != "head":
        return Predictive(problem_type="regression", values=logits[..., 0], noise_std=noise)
    mean, log_variance = (part[..., 0] for part in split_variance_head(logits))
    return Predictive(problem_type="regression", values=mean, noise_std="head", noise_variance=log_variance.exp())
