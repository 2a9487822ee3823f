"""laplace-torch on a transformers checkpoint, as its documentation's Hugging Face example uses it.

Installed for this comparison alone: pip install --no-deps laplace-torch==0.3, and what it imports.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from ..dict_model import DictModel
from .context import Context, Predictor
from .data import BATCH_SIZE, Batch, by_length


def last_layer(context: Context, structure: Literal["kron", "full"]) -> tuple[Predictor, dict[str, Any]]:
    """Last layer, exact Gauss-Newton, prior precision by their marginal likelihood, probit link.

    Their 100 steps of Adam need not converge: the slope that remains is recorded. For the dense matrix their default
    backend multiplies by every unit vector; formed from the features it is the same to 1e-7, in half the time.
    """
    from laplace import Laplace

    rows = [context.train[i] for i in by_length(context.train)]
    loader = DataLoader(rows, batch_size=BATCH_SIZE, collate_fn=DataCollatorWithPadding(context.tokenizer))
    backend = {"backend": _dense_from_features()} if structure == "full" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the link is theirs by default, and is the one used below
        laplace = Laplace(
            DictModel(context.model()), "classification",
            subset_of_weights="last_layer", hessian_structure=structure, **backend,
        )  # fmt: skip
        laplace.fit(loader)
        laplace.optimize_prior_precision()
    chosen = {"prior_precision": float(laplace.prior_precision), "evidence_slope": _evidence_slope(laplace)}

    def arrays(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"probs": laplace(batch)}

    return lambda part: context.predict(part, arrays), chosen


def _dense_from_features() -> type:
    """Their exact Gauss-Newton matrix of the last layer, sum_n J_n^T H_n J_n, by the route of their base class."""
    from laplace.curvature import CurvlinopsGGN, GGNInterface

    class DenseFromFeatures(CurvlinopsGGN):
        def full(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            loss, matrix = GGNInterface.full(self, x, y)
            return loss, matrix

    return DenseFromFeatures


def _evidence_slope(laplace: Any) -> float:
    """d log marginal likelihood / d log prior precision where their optimiser stopped."""
    log_precision = laplace.prior_precision.detach().log().requires_grad_()
    (slope,) = torch.autograd.grad(laplace.log_marginal_likelihood(log_precision.exp()).sum(), log_precision)
    laplace.prior_precision = log_precision.detach().exp()
    return float(slope)
