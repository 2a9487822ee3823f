"""Seconds of a training step, relative to the deterministic one: python -m benchmarks.training_step

MiniLM, 32 x 64 tokens, AdamW: forward, loss, backward, optimizer step. A Bayesian step's loss is the ELBO, its KL
included. The baseline is ordinary fine-tuning of all parameters, dropout included; it is listed without its dropout as
well, since conversion turns that off too.
"""

import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bayeformers import kl_divergence, to_bayesian
from benchmarks.harness import EMBEDDINGS, arguments, batch, interleaved, median_ratio, minilm, report

NUM_TRAINING_ITEMS = 8551
BASELINE = "deterministic"


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rho = [parameter for name, parameter in trained if name.endswith("_rho") or ".rho_" in name]
    others = [parameter for name, parameter in trained if not (name.endswith("_rho") or ".rho_" in name)]
    groups = [{"params": others, "lr": 5e-5}, {"params": rho, "lr": 1e-2, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)  # the Trainer's default


def no_kl(model: nn.Module) -> float:
    return 0.0


def training_step(model: nn.Module, kl: Callable[[nn.Module], Tensor | float] = no_kl) -> Callable[[], None]:
    """A function that takes one step on the same batch each time it is called."""
    model.train()
    adamw, inputs = optimizer(model), batch()

    def step() -> None:
        loss = model(**inputs).loss + kl(model) / NUM_TRAINING_ITEMS
        loss.backward()
        adamw.step()
        adamw.zero_grad()

    return step


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def bayesian_torch_linear(estimator: str) -> Callable[[], None]:
    """The other library's converter on the same model: its Linear layers, posterior from the pretrained weights."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    # its converter replaces `nn.Linear`, and transformers' layers call it as `nn.Linear`: plain tensors come back
    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0}
    model = minilm()
    dnn_to_bnn(model, {**settings, "type": estimator, "moped_enable": True, "moped_delta": 0.05})
    return training_step(without_dropout(model), get_kl_loss)


def variants() -> dict[str, Callable[[], None]]:
    steps = {
        BASELINE: training_step(minilm()),
        "deterministic, no dropout": training_step(without_dropout(minilm())),
    }
    for layers, excluded in (("Linear", EMBEDDINGS), ("Linear + Embedding", None)):
        for freeze in (True, False):
            model = to_bayesian(minilm(), delta=0.05, freeze=freeze, exclude_modules=excluded)
            steps[f"{layers}, means {'frozen' if freeze else 'trained'}"] = training_step(model, kl_divergence)
    if find_spec("bayesian_torch") is not None:
        for estimator in ("Reparameterization", "Flipout"):
            steps[f"bayesian-torch, Linear, {estimator}"] = bayesian_torch_linear(estimator)
    return steps


def main() -> None:
    args = arguments(__doc__.splitlines()[0], repeats=20).parse_args()
    times = interleaved(variants(), args.repeats)
    rows = [
        {
            "step": name,
            "median seconds": statistics.median(values),
            "ratio": median_ratio(values, times[BASELINE]),
            "to no dropout": median_ratio(values, times["deterministic, no dropout"]),
        }
        for name, values in times.items()
    ]
    report("Training step / deterministic training step", rows, args.json, repeats=args.repeats)


if __name__ == "__main__":
    main()
