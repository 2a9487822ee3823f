"""Makes the folders of this directory: run once, from the root of the commit whose folders later ones must still read.

PYTHONPATH=. python tests/data/make_saved.py tests/data/saved
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from bayeformers import NormalPrior, ScaleMixturePrior, fixed_draw, laplace, predict, to_bayesian
from bayeformers.nn import variational_tensors
from bayeformers.quantization import quantize

SEED, DRAWS = 5, 3
INPUTS = {"input_ids": torch.arange(1, 25).reshape(4, 6), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
CONVERTED = {
    "converted": {"delta": 0.05, "freeze": True},
    "gaussian_prior": {"delta": 0.2, "prior": NormalPrior(0.5), "norms": True},
    "mixture_multiplicative": {
        "delta": 0.1,
        "prior": ScaleMixturePrior(0.5, 1.0, 0.1),
        "scale": "multiplicative",
        "estimator": "flipout",
    },
}


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForSequenceClassification(
        BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=3, **sizes)
    ).eval()


def drawn_weights(converted: torch.nn.Module) -> dict[str, torch.Tensor]:
    drawn = {}
    for index in range(DRAWS):
        with fixed_draw(converted, index, SEED):
            for tensor in variational_tensors(converted):
                value = getattr(tensor.module, tensor.parameter_name)
                drawn[f"{tensor.name}/{index}"] = value.detach().clone()
    return drawn


def main(root: Path) -> None:
    for name, options in CONVERTED.items():
        converted = to_bayesian(model(), **options)
        converted.save_pretrained(root / name)
        probs = predict(converted, INPUTS, num_samples=DRAWS, seed=SEED).probs
        save_file({**drawn_weights(converted), "probs": probs}, root / name / "expected.safetensors")
    batch = {**INPUTS, "labels": torch.tensor([0, 1, 2, 0])}
    for curvature, subset in (("ekfac", "all"), ("diagonal", "all"), ("full", "last_layer")):
        trained, folder = model(), root / f"laplace_{curvature}"
        posterior = laplace.fit(
            trained, [batch], subset=subset, curvature=curvature, prior_precision=3.0, progress=False
        )
        trained.save_pretrained(folder)
        posterior.save(folder)
        drawn = {}
        for index in range(DRAWS):
            with posterior.draw(index, SEED):
                drawn |= {f"{n}/{index}": p.detach().clone() for n, p in trained.named_parameters()}
        for method in ("sample", "glm"):
            drawn[method] = posterior.predict(INPUTS, num_samples=DRAWS, seed=SEED, method=method).probs
        save_file(drawn, folder / "expected.safetensors")
        if curvature == "ekfac":
            save_quantized(posterior, root / "int8_laplace")
    save_quantized(to_bayesian(model(), delta=0.2), root / "int8")


def save_quantized(posterior: Any, folder: Path) -> None:
    small = quantize(posterior, INPUTS)
    small.save(folder)
    save_file({"probs": small.predict(INPUTS, num_samples=DRAWS, seed=SEED).probs}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
