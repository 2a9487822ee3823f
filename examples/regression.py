"""Which uncertainty bands are right? A tiny network on 1-D data by every method, next to draws of its true posterior.

    python -m examples.regression                                     # data with a known truth, a minute of CPU
    python -m examples.regression --data_file points.csv              # a CSV file with the columns x,y
    python -m examples.regression --hidden_sizes 16 16 --prior_std 0.8 --hmc_samples 1000

Constant noise: the deterministic network, Hamiltonian Monte Carlo (the reference), the ELBO, Laplace linearised and
sampled, and an exact last layer. Noise that the network predicts itself: deterministic, reference and ELBO again.
Every flag: ``--help``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from transformers import set_seed

from bayeformers import BayesianTrainer, LaplacePosterior, NormalPrior, experiments, laplace, predict, to_bayesian
from bayeformers.experiments import flag
from bayeformers.likelihoods import gaussian_nll
from bayeformers.predictive import Predictive
from bayeformers.reports import format_table
from bayeformers.reports.bands import Bands, bands_figure, write_bands
from bayeformers.reports.writing import write_results
from examples.data import curves
from examples.data.curves import CurveData
from examples.data.true_posterior import LinearRegression, MLPRegression, TanhMLP

HMC, HMC_HEAD = "HMC, the reference", "HMC, noise head"
GRID_POINTS, NUM_FUNCTIONS = 241, 12

Noise = float | Literal["head"]  # a standard deviation, or that of the network's second output
float_tensor = partial(torch.as_tensor, dtype=torch.float32)

# ---------------------------------------------------------------------------------------------------------- arguments

_WHOLE = "a training is one epoch of --map_steps or --variational_steps, evaluated when it is over"


@dataclass
class CurveArguments:
    """Which data, which network, which prior, and how long the reference samples."""

    data_file: str | None = flag(None, "CSV file with the columns x,y. Left out: data with a known truth.")
    num_points: int = flag(160, "Training points of the generated data.")
    hidden_sizes: list[int] = flag([50], "Widths of the tanh layers.")
    prior_std: float = flag(
        1.5, "Standard deviation of every weight's prior N(0, std^2); Laplace finds its own by evidence."
    )
    delta: float = flag(0.1, "Initial posterior scale relative to |weight|, of the ELBO.")
    map_steps: int = flag(1000, "Steps of the deterministic networks' training.")
    variational_steps: int = flag(2000, "Steps of the ELBO's training.")
    laplace_curvature: Literal["kfac", "ekfac", "diagonal", "full"] = flag(
        "full", "Form of each layer's curvature; full is exact and cheap for a tiny network."
    )
    hmc_samples: int = flag(200, "Draws per chain of the reference; 0 leaves it out.")
    hmc_warmup: int = flag(120, "Proposals per chain that are thrown away.")
    hmc_steps: int = flag(45, "Leapfrog steps per proposal.")
    hmc_chains: int = flag(4, "Chains, run at once.")

    def __post_init__(self) -> None:
        least = {"num_points": 20, "map_steps": 1, "variational_steps": 1, "hmc_steps": 1, "hmc_chains": 1}
        experiments.check_least(self, **least)
        if self.hmc_warmup < 0:
            raise ValueError(f"`hmc_warmup` must not be negative, got {self.hmc_warmup}.")
        if self.hmc_samples != 0 and self.hmc_samples < 4:
            raise ValueError(f"`hmc_samples` must be 0 or at least 4, got {self.hmc_samples}.")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"`hidden_sizes` must be one or more widths >= 1, got {self.hidden_sizes}.")
        if not self.prior_std > 0:
            raise ValueError(f"`prior_std` must be > 0, got {self.prior_std}.")


@dataclass
class CurveTrainingArguments(experiments.ExperimentArguments):
    """Every TrainingArguments flag; draws enough for smooth bands. Batches are full, and counted by ``--map_steps``."""

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        **experiments.ExperimentArguments.fixed,
        "eval_strategy": ("no", _WHOLE),
        "load_best_model_at_end": (False, _WHOLE),
    }


# the output folder is where results.json, predictions.csv and the PNG go
DEFAULTS = {
    "learning_rate": 1e-2, "rho_learning_rate": 2e-2, "num_eval_samples": 256, "logging_strategy": "no",
    "save_strategy": "no", "output_dir": "outputs/regression",
}  # fmt: skip


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[CurveArguments, CurveTrainingArguments]:
    """The command line's arguments: SystemExit for an unknown flag, ValueError for a value out of range."""
    kinds = {"curves": DEFAULTS}
    return experiments.ExperimentParser((CurveArguments, CurveTrainingArguments), kinds, "curves").parse(argv)


# ------------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Fitted:
    """One method: from x (N,) to what it says there, and to some drawn mean functions (S, N); what fitting decided."""

    predict: Callable[[Tensor], Predictive]
    functions: Callable[[Tensor], Tensor | None] = lambda _: None
    facts: dict[str, Any] = field(default_factory=dict)


class Methods:
    """Every method's fit to one batch, in the network's units. Only training runs where the Trainer runs it."""

    def __init__(self, batch: dict[str, Tensor], curve: CurveArguments, args: CurveTrainingArguments) -> None:
        self.batch, self.curve, self.args = batch, curve, args
        self.x, self.y = batch["x"], batch["labels"]

    def train(self, model: nn.Module, noise: Noise, num_steps: int, **options: Any) -> None:
        """So many steps on the full batch; N, in the ELBO and elsewhere, is the number of points."""
        args = copy.deepcopy(self.args)
        args.num_train_epochs, args.per_device_train_batch_size, args.remove_unused_columns = 1, 1, False
        args.noise_std, args.num_training_items = noise, len(self.x)
        batches = [self.batch] * num_steps  # one epoch: an epoch for each step would cost more than its step
        options["data_collator"] = lambda items: items[0]
        BayesianTrainer(model=model, args=args, train_dataset=batches, **options).train()
        model.cpu().eval()

    def map_network(self, noise: Noise) -> TanhMLP:
        """The weights of largest posterior density: Adam on mean NLL + |w|^2 / (2 N prior_std^2).

        The quadratic is torch's coupled weight decay, a part of the gradient; AdamW's decoupled one is no prior.
        """
        network = TanhMLP(self.curve.hidden_sizes, num_labels=2 if noise == "head" else 1)
        decay = 1 / (len(self.x) * self.curve.prior_std**2)
        adam = torch.optim.Adam(network.parameters(), self.args.learning_rate, weight_decay=decay)

        def mean_nll(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            logits = outputs.logits
            if noise != "head":
                logits = torch.cat([logits, torch.full_like(logits, 2 * math.log(noise))], dim=1)
            return gaussian_nll(logits, labels)

        self.train(network, noise, self.curve.map_steps, compute_loss_func=mean_nll, optimizers=(adam, None))
        return network

    def variational(self, network: TanhMLP, noise: Noise) -> Fitted:
        """A mean-field Gaussian by the ELBO, under the prior of the reference, from the deterministic weights on."""
        prior, network = NormalPrior(std=self.curve.prior_std, centre=0.0), copy.deepcopy(network)
        how = {"freeze": False, "prior": prior, "estimator": "local_reparameterization"}
        model = to_bayesian(network, self.curve.delta, **how)
        self.train(model, noise, self.curve.variational_steps)
        return self.sampled(partial(predict, model), {"noise_std": noise})

    def sampled(self, says: Callable[..., Predictive], facts: dict[str, Any]) -> Fitted:
        """The network itself at drawn weights."""
        return Fitted(
            lambda x: says({"x": x}, num_samples=self.args.num_eval_samples),
            lambda x: says({"x": x}, num_samples=NUM_FUNCTIONS).values,
            facts,
        )

    def linearized(self, network: TanhMLP, **options: Any) -> tuple[LaplacePosterior, Fitted]:
        """Laplace, prior and noise by the evidence unless ``options`` say; the network's tangent: exact moments."""
        chosen = {"curvature": self.curve.laplace_curvature, "prior_precision": "marglik", **options}
        posterior = laplace.fit(network, [self.batch], likelihood="regression", progress=False, **chosen)
        facts = {name: getattr(posterior, name) for name in ("prior_precision", "noise_std", "log_marginal_likelihood")}
        return posterior, Fitted(
            lambda x: posterior.predict({"x": x}, noise_std=posterior.noise_std),
            lambda x: experiments.linearized_draws(posterior, {"x": x}, num_samples=NUM_FUNCTIONS)[..., 0],
            {**facts, "effective_parameters": sum(posterior.effective_parameters.values())},
        )

    def last_layer(self, network: TanhMLP) -> Fitted:
        """The deterministic features with an exact Bayesian last layer, once as Laplace and once in closed form.

        At the closed form's tau, s and mean the two are one posterior: ``difference_from_closed_form`` is rounding.
        """
        network = copy.deepcopy(network)
        exact = LinearRegression.of_last_layer(network, self.x, self.y)
        known = {"prior_precision": exact.prior_precision, "noise_std": exact.noise_std}
        posterior, fitted = self.linearized(network, subset="last_layer", curvature="full", **known)
        fitted.facts["difference_from_closed_form"] = exact.difference_from(posterior, network, self.x)
        return fitted

    def reference(self, network: TanhMLP, noise: Noise) -> Fitted:
        """Draws of the posterior itself, of the prior and likelihood that the ELBO is given, by HMC."""
        curve = self.curve
        target = MLPRegression(network, self.x, self.y, noise, curve.prior_std)
        chains = target.sample(
            parameters_to_vector(network.parameters()).detach(), num_chains=curve.hmc_chains, seed=self.args.seed,
            num_samples=curve.hmc_samples, num_warmup=curve.hmc_warmup, num_steps=curve.hmc_steps,
            progress=not self.args.disable_tqdm,
        )  # fmt: skip
        flat = chains.draws[:: max(1, len(chains.draws) * curve.hmc_chains // 1024)].flatten(0, 1)
        shown = flat[torch.linspace(0, len(flat) - 1, NUM_FUNCTIONS).long()]
        facts = {"acceptance": chains.acceptance, "step_size": chains.step_size, "r_hat": target.r_hat(chains)}
        facts["noise_std"] = noise
        return Fitted(lambda x: target.predict(flat, x), lambda x: target.logits(shown, x)[..., 0], facts)


def fit_all(
    data: CurveData, curve: CurveArguments, args: CurveTrainingArguments, clock: experiments.Clock
) -> dict[str, Fitted]:
    """Every method, by its name in the tables, in the order of the picture's panels."""
    x, y = data.scaled_x(data.train.x), data.scaled_y(data.train.y)
    held_x, held_y = data.scaled_x(data.validation.x), data.scaled_y(data.validation.y)
    methods, found = Methods({"x": float_tensor(x), "labels": float_tensor(y)}, curve, args), {}

    def fit(name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        experiments.say(name)
        made = method(*arguments)
        clock.lap(name)
        return made

    for noise, tail in ((curves.noise_of_neighbours(x, y), ""), ("head", ", noise head")):
        network = fit(f"deterministic{tail}", methods.map_network, noise)
        own = noise
        if noise != "head":  # its root mean square error on held-out points
            predicted = network(float_tensor(held_x)).logits[:, 0].detach().double().numpy()
            own = float(np.sqrt(np.mean((predicted - held_y) ** 2)))
        says = partial(predict, network, noise_std=own)
        found[f"deterministic{tail}"] = Fitted(lambda x, says=says: says({"x": x}), facts={"noise_std": own})
        if curve.hmc_samples:
            name = HMC_HEAD if noise == "head" else HMC
            found[name] = fit(name, methods.reference, network, noise)
        found[f"variational{tail}"] = fit(f"variational{tail}", methods.variational, network, noise)
        if noise != "head":
            posterior, tangent = fit("Laplace", methods.linearized, network)
            says = partial(posterior.predict, method="sample", noise_std=posterior.noise_std)
            found["Laplace, linearised"], found["Laplace, local draws"] = tangent, methods.sampled(says, tangent.facts)
            found["last layer, exact"] = fit("last layer", methods.last_layer, network)
    return found


# -------------------------------------------------------------------------------------------------------------- report


def bands(fitted: Fitted, data: CurveData, x: np.ndarray, y: np.ndarray | None = None) -> Bands:
    """What a method says at some x, in the data's units; without y, for the picture, with drawn functions."""
    inputs, targets = float_tensor(data.scaled_x(x)), None if y is None else float_tensor(data.scaled_y(y))
    functions = fitted.functions(inputs) if y is None else None
    units = {"centre": float(data.train.y.mean()), "scale": float(data.train.y.std())}
    return Bands.from_predictive(fitted.predict(inputs), targets=targets, functions=functions, **units)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned, printed and written to ``--output_dir``."""
    curve, args = parse_arguments(argv)
    with experiments.user_input():
        file = curve.data_file
        data = curves.generate(args.seed, curve.num_points) if file is None else curves.read_points(file, args.seed)
    set_seed(args.seed)
    clock = experiments.Clock()
    methods = fit_all(data, curve, args, clock)

    test, truth, reports = data.test, data.truth(data.test.x), {}
    found = {name: bands(fitted, data, test.x, test.y) for name, fitted in methods.items()}
    score = partial(Bands.report, y=test.y, groups=test.region, noise_std=truth and truth[1])
    for name, of in found.items():
        reference = found.get(HMC_HEAD if name.endswith("head") else HMC)
        reports[name] = {"regions": score(of, reference=reference), **methods[name].facts}
    if truth is not None:
        reports["the truth"] = {"regions": score(Bands.of_truth(*truth, test.y))}
    grid = np.linspace(*data.limits, GRID_POINTS)
    shown = {name: bands(fitted, data, grid) for name, fitted in methods.items()}
    clock.lap("prediction")
    results = {"seed": args.seed, "points": len(data.train.x), "methods": reports}
    results |= {"seconds": clock.seconds, "arguments": asdict(curve)}
    if args.process_index == 0:
        regions = {name: report["regions"] for name, report in reports.items()}
        figure = bands_figure(
            grid, shown, (data.train.x, data.train.y), title=data.question, reports=regions, truth=data.truth(grid),
            observations=np.concatenate([data.train.y, test.y]),
        )  # fmt: skip
        tables = [
            format_table({name: found[region] for name, found in regions.items()}, corner=f"{region} points")
            for region in dict.fromkeys(test.region.tolist())
        ]
        folder = Path(args.output_dir or ".")
        write_results(folder, results, {"bands.png": figure}, *tables, also=["predictions.csv"], dpi=90)
        write_bands(folder / "predictions.csv", grid, shown)
    return results


if __name__ == "__main__":
    experiments.run_command(main)
