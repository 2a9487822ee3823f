"""Logit covariances beside laplace-torch's: equal where the definitions coincide, and what differs elsewhere.

    pip install --no-deps -r benchmarks/requirements.txt
    python -m benchmarks.laplace_torch

Every case has the same model, data and prior on both sides and float64 throughout. The reference of each is built from
autograd's Jacobians and a dense precision, by neither library.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from .dict_model import DictModel
from .harness import arguments, report

Likelihood = Literal["classification", "regression"]
Subset = Literal["last_layer", "all"]
PRIOR_PRECISION = 0.7
SPREAD = 3.0  # of the inputs: enough for class probabilities that differ between them
PADDED_LENGTH = 24  # of sentences of 3 to 9 tokens, as `padding="max_length"` gives


def ours(model: nn.Module, loader: Any, inputs: Any, likelihood: Likelihood, subset: Subset) -> Tensor:
    """This package's logit covariance (B, C, C), Kronecker factors with the exact Gauss-Newton curvature."""
    from bayeformers import laplace

    model = model.model if isinstance(model, DictModel) else model
    posterior = laplace.fit(
        model, loader, likelihood=likelihood, subset=subset, curvature="kfac", fisher="exact",
        prior_precision=PRIOR_PRECISION, noise_std=1.0 if likelihood == "regression" else None, progress=False,
    )  # fmt: skip
    covariance: Tensor = posterior.predict(inputs, method="glm").logit_covariance
    return covariance


def theirs(model: nn.Module, loader: Any, inputs: Any, likelihood: Likelihood, subset: Subset) -> Tensor:
    """laplace-torch's, with its default backend."""
    from laplace import Laplace

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = Laplace(
            copy.deepcopy(model), likelihood,
            subset_of_weights=subset, hessian_structure="kron", prior_precision=PRIOR_PRECISION,
        )  # fmt: skip
        fitted.fit(loader)
        covariance: Tensor = fitted._glm_predictive_distribution(inputs)[1]
    return covariance.detach()


def exact(model: nn.Module, batches: Sequence[tuple[Any, Any]], inputs: Any, likelihood: Likelihood) -> Tensor:
    """J (sum_n J_n^T H_n J_n + tau I)^-1 J^T over the parameters that require gradients, no structure assumed."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def jacobian(batch: Any) -> tuple[Tensor, Tensor]:
        """Shape: (B, C, D), (B, C)."""
        rows = jacrev(lambda values: functional_call(model, values, (batch,)))(parameters)
        logits = model(batch).detach()
        return torch.cat([row.reshape(*logits.shape, -1) for row in rows.values()], dim=-1), logits

    size = sum(p.numel() for p in parameters.values())
    precision = PRIOR_PRECISION * torch.eye(size)
    for batch, _ in batches:
        rows, logits = jacobian(batch)
        probs = logits.softmax(-1)
        curvature = torch.eye(logits.shape[-1]).expand(len(logits), -1, -1)  # of Gaussian noise of scale one
        if likelihood == "classification":
            curvature = probs.diag_embed() - probs[:, :, None] * probs[:, None, :]
        precision += torch.einsum("bcp,bcd,bdq->pq", rows, curvature, rows)
    rows, _ = jacobian(inputs)
    return torch.einsum("bcp,pq,bdq->bcd", rows, torch.linalg.inv(precision), rows)


def kronecker_without_bias(model: nn.Sequential, inputs: Tensor) -> Tensor:
    """The definition for a last layer without bias: precision G (x) A + tau I, A averaged and G summed over data."""
    features, logits = model[:-1](inputs).detach(), model(inputs).detach()
    probs = logits.softmax(-1)
    curvature = (probs.diag_embed() - probs[:, :, None] * probs[:, None, :]).sum(0)
    average = features.T @ features / len(features)
    precision = torch.kron(curvature, average) + PRIOR_PRECISION * torch.eye(curvature.shape[0] * average.shape[0])
    rows = torch.stack([torch.kron(torch.eye(logits.shape[-1]), one[None]) for one in features])
    return torch.einsum("bcp,pq,bdq->bcd", rows, torch.linalg.inv(precision), rows)


def last_layer_case(likelihood: Likelihood, bias: bool) -> dict[str, str | float]:
    """Without bias both follow the definition. With one, a joint block is exact for Gaussian noise, a split is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3, bias=bias))
    inputs, targets = SPREAD * torch.randn(40, 4), torch.randint(3, (40,))
    labels = targets if likelihood == "classification" else torch.randn(40, 3)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=len(inputs))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    if likelihood == "classification":
        reference, against = kronecker_without_bias(model, inputs), "G (x) A"
    else:
        reference, against = exact(model, [(inputs, labels)], inputs, likelihood), "exact posterior"
    found = _covariances(model, loader, inputs, likelihood, "last_layer")
    return _row(f"last layer, {'with' if bias else 'without'} bias, {likelihood}", against, found, reference)


def padding_cases() -> list[dict[str, str | float]]:
    """Sentences, each alone or in one padded batch: the same data, hence the same posterior."""
    torch.manual_seed(0)
    model = _tiny_bert()
    whole, alone = _sentences()
    reference = exact(model, [(whole, None)], whole, "classification")
    unpadded, padded = (
        _covariances(model, _Loader(batches), whole, "classification", "all") for batches in (alone, [whole])
    )
    name = "all Linear layers of a tiny BERT"
    changes = {side: _relative(padded[side], unpadded[side]) for side in padded}
    return [
        _row(f"{name}, each sentence alone", "exact Gauss-Newton", unpadded, reference),
        _row(f"{name}, one padded batch", "exact Gauss-Newton", padded, reference),
        {"case": f"{name}, one padded batch", "reference": "own fit without padding"} | _columns(changes),
    ]


def _covariances(
    model: nn.Module, loader: Any, inputs: Any, likelihood: Likelihood, subset: Subset
) -> dict[str, Tensor]:
    """Of each library that is installed."""
    found = {}
    for side, function in (("theirs", theirs), ("ours", ours)):
        try:
            found[side] = function(model, loader, inputs, likelihood, subset)
        except ImportError as error:
            print(f"without {side}: {error}", file=sys.stderr)
    return found


def _row(case: str, against: str, found: dict[str, Tensor], reference: Tensor) -> dict[str, str | float]:
    return {"case": case, "reference": against} | _columns({
        side: _relative(value, reference) for side, value in found.items()
    })


def _columns(distances: dict[str, float]) -> dict[str, str | float]:
    return {side: f"{distances[side]:.1e}" if side in distances else "-" for side in ("theirs", "ours")}


def _relative(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|, Frobenius over all inputs."""
    return float(torch.linalg.norm(value - reference) / torch.linalg.norm(reference))


def _tiny_bert() -> nn.Module:
    """One layer of width 8. Embeddings and LayerNorm are frozen: laplace-torch raises on them otherwise."""
    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=PADDED_LENGTH, num_labels=2, initializer_range=0.6, attn_implementation="eager",
    )  # fmt: skip
    model = DictModel(BertForSequenceClassification(config)).eval()
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in linear)
    return model


def _sentences() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """24 sentences as one padded batch, and each alone without padding."""
    lengths = torch.randint(3, 10, (24,))
    mask = (torch.arange(PADDED_LENGTH) < lengths[:, None]).long()
    ids = torch.randint(1, 50, mask.shape) * mask
    whole = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, (len(ids),))}
    alone = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(len(lengths))]
    for one, length in zip(alone, lengths.tolist(), strict=True):
        one |= {name: one[name][:, :length] for name in ("input_ids", "attention_mask")}
    return whole, alone


class _Loader(list[dict[str, Tensor]]):
    """Ready batches with the ``dataset`` whose length laplace-torch takes for N."""

    @property
    def dataset(self) -> range:
        return range(sum(len(batch["input_ids"]) for batch in self))


def main() -> None:
    """Print the table."""
    args = arguments(__doc__ or "", repeats=1).parse_args()
    torch.set_default_dtype(torch.float64)
    rows = [
        last_layer_case("classification", bias=False),
        last_layer_case("regression", bias=False),
        last_layer_case("regression", bias=True),
        *padding_cases(),
    ]
    report("Relative distance of logit covariances", rows, args.json, prior_precision=PRIOR_PRECISION)


if __name__ == "__main__":
    main()
