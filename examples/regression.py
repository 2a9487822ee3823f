"""Which uncertainty bands are right? A tiny network on 1-D data by every method, next to draws of its true posterior.

    python -m examples.regression                                     # data with a known truth, a minute of CPU
    python -m examples.regression --data_file points.csv              # a CSV file with the columns x,y
    python -m examples.regression --hidden_sizes 16 16 --prior_std 0.8 --hmc_samples 1000

Constant noise: the deterministic network, Hamiltonian Monte Carlo (the reference), the ELBO, Laplace linearised and
sampled, and an exact last layer. Noise that the network predicts itself: deterministic, reference and ELBO again.
Every flag: ``--help``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from bayeformers.reports import write_json
from examples.commands import run as run_command
from examples.commands import user_input
from examples.curves import fitting
from examples.curves.arguments import Arguments, parse_arguments
from examples.curves.data import CurveData, generate, noise_of_neighbours, read_points
from examples.curves.evaluation import GRID_POINTS, bands, method_report, truth_bands
from examples.curves.fitting import Fitted, Noise, TrainingPoints
from examples.curves.network import CurveNetwork
from examples.curves.outputs import FIGURE, format_results, write_figure, write_predictions
from examples.running import Clock, say

HMC, HMC_HEAD = "HMC, the reference", "HMC, noise head"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    curve, args = arguments
    with user_input():
        file = curve.data_file
        data = generate(args.seed, curve.num_points) if file is None else read_points(file, args.seed)
    set_seed(args.seed)
    clock = Clock()
    methods = fit_all(data, arguments, clock)

    test, scaling = data.test, data.scaling
    found = {name: bands(fitted, scaling, test.x, test.y) for name, fitted in methods.items()}
    references = {name: found.get(HMC_HEAD if name.endswith("head") else HMC) for name in found}
    reports = {
        name: {"regions": method_report(of, data, references[name]), **methods[name].facts}
        for name, of in found.items()
    }
    if (truth := truth_bands(data)) is not None:
        reports["the truth"] = {"regions": method_report(truth, data, None)}
    results: dict[str, Any] = {"seed": args.seed, "points": len(data.train.x), "methods": reports}
    grid = np.linspace(*data.limits, GRID_POINTS)
    curves = {name: bands(fitted, scaling, grid, functions=True) for name, fitted in methods.items()}
    clock.lap("prediction")
    results |= {"seconds": clock.seconds, "arguments": asdict(curve)}

    folder = Path(args.output_dir or ".")
    if args.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", results)
        write_predictions(folder / "predictions.csv", grid, curves)
        write_figure(folder / FIGURE, data, grid, curves, reports)
        print(f"\n{format_results(results)}\n\nWritten to {folder}: results.json, predictions.csv, {FIGURE}")
    return results


def fit_all(data: CurveData, arguments: Arguments, clock: Clock) -> dict[str, Fitted]:
    """Every method, by its name in the tables, in the order of the picture's panels."""
    curve, args = arguments
    x, y = data.scaling.x(data.train.x), data.scaling.y(data.train.y)
    points = TrainingPoints(torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32))
    noise, found = noise_of_neighbours(x, y), {}

    def fit(name: str, method: Callable[[], Any]) -> Any:
        say(name)
        made = method()
        clock.lap(name)
        return made

    network = fit("deterministic", partial(fitting.train_map, points, noise, arguments))
    found["deterministic"] = fitting.deterministic(network, _validation_noise(network, data))
    if curve.hmc_samples:
        found[HMC] = fit(HMC, partial(fitting.reference, network, points, noise, arguments))
    found["variational"] = fit("variational", partial(fitting.variational, network, points, noise, arguments))
    posterior = fit("Laplace", partial(fitting.laplace_posterior, network, points, arguments))
    found["Laplace, linearised"] = fitting.linearized(posterior)
    found["Laplace, local draws"] = fitting.local_draws(posterior, args.num_eval_samples)
    found["last layer, exact"] = fit("last layer", partial(fitting.last_layer, network, points, arguments))

    head: Noise = "head"
    network = fit("deterministic, noise head", partial(fitting.train_map, points, head, arguments))
    found["deterministic, noise head"] = fitting.deterministic(network, head)
    if curve.hmc_samples:
        found[HMC_HEAD] = fit(HMC_HEAD, partial(fitting.reference, network, points, head, arguments))
    name = "variational, noise head"
    found[name] = fit(name, partial(fitting.variational, network, points, head, arguments))
    return found


def _validation_noise(network: CurveNetwork, data: CurveData) -> float:
    """The deterministic network's noise: its root mean square error on held-out points."""
    validation, scaling = data.validation, data.scaling
    with torch.no_grad():
        x = torch.as_tensor(scaling.x(validation.x), dtype=torch.float32)
        predicted = network(x).logits[:, 0].double().numpy()
    return float(np.sqrt(np.mean((predicted - scaling.y(validation.y)) ** 2)))


if __name__ == "__main__":
    run_command(main)
