"""Seconds of S = 10 draws, relative to one deterministic pass: python -m benchmarks.prediction

MiniLM, batches of 32 x 64 tokens. Each round makes a new posterior, so that materialising its draws is counted, and
goes through all batches; every batch is timed for every variant before the next one.
"""

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayeformers import VariationalPosterior, to_bayesian
from benchmarks.harness import LAST_LAYER_AND_HEAD, arguments, batch, median_ratio, minilm, report, seconds

BASELINE = "deterministic, one pass"


def bayesian(target_modules: str) -> PreTrainedModel:
    return to_bayesian(minilm(), delta=0.05, target_modules=target_modules).eval()


def deterministic_pass(model: nn.Module) -> Callable[[Mapping[str, Tensor]], object]:
    @torch.no_grad()
    def run(inputs: Mapping[str, Tensor]) -> object:
        return model(**inputs).logits.log_softmax(-1)

    return run


def draws(model: PreTrainedModel, num_samples: int) -> Callable[[Mapping[str, Tensor]], object]:
    posterior = VariationalPosterior(model)
    return lambda inputs: posterior.predict(inputs, num_samples=num_samples)


def one_round(
    models: Mapping[str, PreTrainedModel], batches: list[dict[str, Tensor]], num_samples: int
) -> dict[str, float]:
    """Total seconds of each variant over all batches."""
    runs = {
        name: deterministic_pass(model) if name == BASELINE else draws(model, num_samples)
        for name, model in models.items()
    }
    totals = dict.fromkeys(runs, 0.0)
    for inputs in batches:
        for name, run in runs.items():
            totals[name] += seconds(lambda run=run, inputs=inputs: run(inputs))
    return totals


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], repeats=3)
    parser.add_argument("--num_samples", type=int, default=10, help="S, the draws of a prediction")
    parser.add_argument("--batches", type=int, default=20, help="batches of a round")
    args = parser.parse_args()
    models = {
        BASELINE: minilm().eval(),
        "all layers": bayesian("all"),
        "last layer and head": bayesian(LAST_LAYER_AND_HEAD),
    }
    batches = [{k: v for k, v in batch(seed).items() if k != "labels"} for seed in range(args.batches)]
    one_round(models, batches[:2], num_samples=2)  # warm-up
    rounds = [one_round(models, batches, args.num_samples) for _ in range(args.repeats)]
    times = {name: [totals[name] for totals in rounds] for name in models}
    rows = [
        {
            "prediction": name,
            "median seconds": statistics.median(values),
            "ratio": median_ratio(values, times[BASELINE]),
        }
        for name, values in times.items()
    ]
    settings = {"repeats": args.repeats, "batches": args.batches, "num_samples": args.num_samples}
    report(f"S = {args.num_samples} draws / one deterministic pass", rows, args.json, **settings)


if __name__ == "__main__":
    main()
