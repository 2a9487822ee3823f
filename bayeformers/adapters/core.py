"""`fit_core`: a Laplace posterior of the r x r core of a trained LoRA, as small as uncertainty gets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..forward import logits_of
from ..laplace import LaplaceConfig, LaplaceOptions, LaplacePosterior, fit
from ..laplace.config import settled
from ..linearized.captured import OutputOf
from ..sampling.views import alone
from .layers import LoraPair, plain_lora_pairs
from .posterior import AdapterPosterior, LowRankBlock, target_of

__all__ = ["fit_core"]

_ATTRIBUTE = "core"


class _CoredLinear(nn.Linear):
    """A with the core behind it, C A x, of A's own weight."""

    core: nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Shape: (*, d_in) -> (*, r)."""
        output: Tensor = self.core(super().forward(input))
        return output


def fit_core(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: LaplaceConfig | None = None,
    *,
    validation: Iterable[Any] | None = None,
    seed: int = 0,
    outputs_of: OutputOf = logits_of,
    **options: Unpack[LaplaceOptions],
) -> AdapterPosterior:
    """Fit a Laplace posterior to the cores of a trained LoRA: W0 + s B C A with C (r, r) around the identity.

    A handful of numbers per layer, r^2, whatever the model's width: their generalised Gauss-Newton matrix is kept whole
    (curvature="dense", the default) or as Kronecker factors ("kfac"). B and A are the projections, as in B-LoRA-XS
    (Marszałek et al. 2025, arXiv 2502.12122), which trains nothing but C; here A and B are those of the trained
    adapter, and C is the identity at the posterior mean, so that any LoRA will do. A draw is one of A: C A.

    Args:
        model: with a trained LoRA adapter; it comes back as it was.
        dataloader: the training data, as of `laplace.fit`.
        config: how to fit, see `LaplaceConfig`; it may not name layers.
        validation: held-out batches with labels, of prior_precision="holdout".
        seed: of the label draws of fisher="mc".
        outputs_of: the logits in what the model returns.
        **options: fields of `LaplaceConfig` by name; they replace those of ``config``.

    Returns:
        The posterior, which predicts by the linearised network; its `scale_found` is the prior's standard deviation
        tau^(-1/2) of an element of C, where it is one number.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: layers that are named, a regression, no LoRA, one that is merged or Bayesian, DoRA, or what
            `laplace.fit` refuses.
    """
    named = [name for name in ("target_modules", "exclude_modules") if options.get(name) is not None]
    named += [name for name in ("target_modules", "exclude_modules") if config and getattr(config, name) is not None]
    if named:
        raise ValueError(f"`{named[0]}` cannot be given: the posterior is of the cores of the active adapter alone.")
    pairs = plain_lora_pairs(model)
    _check_no_magnitude(model, pairs)
    chosen = settled(config, options)
    if config is None and "curvature" not in options:
        chosen = settled(chosen, {"curvature": "dense"})
    chosen = settled(chosen, {"target_modules": [f"{pair.down_name}.{_ATTRIBUTE}" for pair in pairs]})
    with alone(model), _cored(model, pairs):
        found = fit(model, dataloader, chosen, validation=validation, seed=seed, logits=outputs_of)
        blocks = _blocks(found, pairs)
    tau = found.prior_precision
    scale = tau**-0.5 if isinstance(tau, float) else float("nan")
    return AdapterPosterior(model, blocks, method="core", scale=scale, default_method="glm", outputs_of=outputs_of)


def _check_no_magnitude(model: nn.Module, pairs: Sequence[LoraPair]) -> None:
    """Raise ValueError for DoRA: PEFT's gradients hold the norm that it divides by fixed, and are no slope."""
    for pair in pairs:
        if pair.adapter in getattr(model.get_submodule(pair.name), "lora_magnitude_vector", ()):
            raise ValueError(
                f"`model` has DoRA in {pair.name!r}: PEFT takes no gradient through the norm that it divides by, and "
                "the curvature and the linearised network would be wrong. `fit_tfb`, which draws, takes it."
            )


@contextlib.contextmanager
def _cored(model: nn.Module, pairs: Sequence[LoraPair]) -> Iterator[None]:
    """The model with a core of its own behind every A, the identity, until exit."""
    places = [model.get_submodule(pair.down_name.rpartition(".")[0]) for pair in pairs]
    try:
        for place, pair in zip(places, pairs, strict=True):
            place.add_module(pair.adapter, _with_core(pair.down))
        yield
    finally:
        for place, pair in zip(places, pairs, strict=True):
            place.add_module(pair.adapter, pair.down)


def _with_core(down: nn.Linear) -> _CoredLinear:
    with torch.device("meta"):
        cored = _CoredLinear(down.in_features, down.out_features, bias=down.bias is not None)
    cored.weight, cored.bias = down.weight, down.bias
    weight = down.weight
    cored.core = nn.Linear(down.out_features, down.out_features, bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        cored.core.weight.copy_(torch.eye(down.out_features))
    return cored.train(down.training)


def _blocks(posterior: LaplacePosterior, pairs: Sequence[LoraPair]) -> list[LowRankBlock]:
    """The Gaussians of the cores, each as one of its A."""
    by_name = {block.name: block for block in posterior.blocks()}
    found = []
    for pair in pairs:
        block = by_name[f"{pair.down_name}.{_ATTRIBUTE}"]
        variance, a = block.variances()[0], pair.down.weight.detach().clone()
        left, columns = block.left, block.right
        if left is None and not block.is_flat:  # "diagonal": the identity
            left = torch.eye(len(a), dtype=variance.dtype, device=variance.device)[None]
        if columns is None:
            side = variance.shape[-1]
            columns = torch.eye(side, dtype=variance.dtype, device=variance.device)[None]
        found.append(LowRankBlock(target_of(pair), variance, left, columns, a, block.noise_version))
    return found
