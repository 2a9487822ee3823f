"""`fit`: from a trained model and a dataloader to its Laplace posterior."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..checks import check_number, is_whole
from ..likelihoods import logits_of
from ..likelihoods.registry import likelihood_of_family
from ..linearized import check_reads, record, recording_view
from ..linearized.captured import OutputOf
from ..processes import gathered, num_processes, process_index
from ..sampling.random_state import preserved
from ..sampling.views import View
from .accumulate import Accumulator
from .config import CurvatureConfig, LaplaceConfig, LaplaceOptions, settled
from .curvature import Curvature, check_finite
from .data import Batch, Loader, likelihood_of
from .evidence import checked_precision
from .kronecker import KroneckerEigen
from .moved import in_columns
from .perturbed import TokenMask, check_token_mask, is_perturbable
from .posterior import FitRecord, LaplacePosterior
from .targets import Target, choose_targets, squared_distances
from .tuning import check_perturbable, checked_rows, default_choice, tune

logger = logging.getLogger(__name__)

Layers = list[tuple[Target, KroneckerEigen]]

MAX_DENSE = 5000
"""Weights of a last layer up to which curvature="auto" takes its dense GGN: 100 MB in float32."""
MAX_BACKWARDS = 16
"""Backward passes per batch up to which fisher="auto" is exact."""


def fit(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: LaplaceConfig | None = None,
    *,
    prior_mean: nn.Module | None = None,
    noise_std: float | None = None,
    validation: Iterable[Any] | None = None,
    token_mask: TokenMask | None = None,
    seed: int = 0,
    logits: OutputOf = logits_of,
    **options: Unpack[LaplaceOptions],
) -> LaplacePosterior:
    """Fit a Laplace posterior N(theta*, (GGN / (T s^2) + tau)^-1) around a trained model: one pass over the data.

    The model is used in `eval()` mode and comes back as it was. Under a launcher (`torch.distributed` initialised)
    every process passes its share; the sums are reduced over all, without the duplicates that samplers pad with. A
    model, data or an option that do not fit are refused (a TypeError or ValueError) before anything changes.

    Args:
        model: any trained module whose forward takes a batch of the loader.
        dataloader: the training data, in any order: mappings with labels inside, (inputs, labels) pairs, or inputs.
            Labels are needed for the log marginal likelihood, the noise of a regression and fisher="empirical" only.
            An example whose every label is -100 (ignored) is as good as not there.
        config: how to fit: which layers, the form of their curvature, the prior precision; see `LaplaceConfig`.
        prior_mean: the model that holds the prior's mean mu0, such as the pretrained one before fine-tuning; by
            default, and for layers that it lacks or has in another shape, 0. Only the evidence knows it: the posterior
            is centred at theta*.
        noise_std: s of a regression; by default the one of largest evidence.
        validation: held-out batches with labels, of prior_precision="holdout".
        token_mask: how words are masked, of prior_precision="perturbed" with a model that reads words.
        seed: of the label draws of fisher="mc".
        logits: from the model's output to (B, C), (B, T, C), or (B,) of a regression.
        **options: fields of `LaplaceConfig` by name; they replace those of ``config``.

    Returns:
        The posterior.

    >>> net, x = nn.Linear(3, 2), torch.randn(20, 3)
    >>> posterior = fit(net, [(x, torch.randint(2, (20,)))], progress=False)
    >>> posterior.predict(x[:4]).logit_covariance.shape
    torch.Size([4, 2, 2])
    """
    _check_kinds(model, prior_mean, logits, seed)
    check_token_mask(token_mask, model)
    config = settled(config, options)
    _check_noise(noise_std, config.likelihood or likelihood_of(model))
    precision = (
        default_choice(model, validation, dataloader) if config.prior_precision is None else config.prior_precision
    )
    if precision in ("holdout", "leverage", "perturbed"):
        checked_rows(model, precision, validation if precision == "holdout" else dataloader)
    targets, skipped = choose_targets(model, config.target_modules, config.exclude_modules)
    if not isinstance(precision, str):
        checked_precision(precision, [target.name for target in targets])
    shows = config.progress is not False
    loader = Loader(model, dataloader, config.num_batches, config.num_data, shows)
    with preserved(), recording_view(model, training=False) as view:  # a DataLoader takes its seed from the generator
        passes = _Passes(
            view, loader, in_columns(logits), None if config.device is None else torch.device(config.device)
        )
        batch = loader.first()
        outputs, called = passes.probe(batch, targets)
        if config.subset == "last_layer":
            targets, skipped = _last_layer(targets, skipped, called)
        likelihood = config.likelihood or likelihood_of(model, batch.labels)
        if precision == "perturbed":
            check_perturbable([batch], likelihood, token_mask)
        elif config.prior_precision is None and precision == "leverage":
            precision = "perturbed" if is_perturbable(batch, likelihood, token_mask) else "leverage"
        covered = {module for target in targets for module in target.modules}
        check_reads(model, batch.inputs, covered & set(called), passes.outputs_of)
        distances = None if prior_mean is None else squared_distances(targets, model, prior_mean)
        measured = _measured(config, targets, outputs, likelihood, seed)
        sums = passes.sums(measured, targets, config.checkpoint, config.checkpoint_steps)
        targets, skipped = _called(targets, skipped, sums)
        layers = passes.corrected(sums.decomposed(targets, releases=True), sums)
    posterior = LaplacePosterior(
        model,
        layers,
        FitRecord.from_sums(sums, skipped, distances),
        temperature=config.temperature,
        noise_std=noise_std or 1.0,
        outputs_of=logits,
    )
    return tune(
        posterior,
        precision,
        noise_std=noise_std,
        validation=validation,
        training=loader,
        token_mask=token_mask,
        link=config.link,
        progress=shows,
    )


# -- passes over the data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Passes:
    """The passes of one fit; ``device`` of the sums, the model's if None."""

    view: View
    loader: Loader
    outputs_of: OutputOf
    device: torch.device | None

    def probe(self, batch: Batch, targets: list[Target]) -> tuple[Tensor, list[nn.Module]]:
        """Outputs, and the covered layers in the order in which the model calls them."""
        modules = [module for target in targets for module in target.modules]
        with torch.no_grad():
            outputs, uses = record(self.view, batch.inputs, modules, self.outputs_of)
        return outputs.detach(), [use.module for use in uses]

    def sums(
        self, config: CurvatureConfig, targets: list[Target], checkpoint: str | os.PathLike[str] | None, steps: int
    ) -> Curvature:
        """The curvature's sums; those of ``checkpoint``, written every so many ``steps``, go on where they stopped."""
        path = None if checkpoint is None else _own_path(checkpoint)
        sums = _begun(path, config, targets, self.device)
        accumulator = Accumulator(sums, self.view, targets, self.outputs_of, device=self.device)
        for batch in self.loader.batches("Curvature", skip=sums.num_batches):
            accumulator.add(batch)
            if path is not None and sums.num_batches % steps == 0:
                sums.save(path)
        if path is not None:
            sums.save(path)
        sums.all_reduce()
        seen, num_data = sums.num_examples + sums.num_unlabelled, self.loader.num_data
        if seen == 0:
            raise ValueError("`dataloader` is empty: it must give at least one batch.")
        if sums.num_examples == 0:
            raise ValueError(f"`dataloader` has no label: all those of its {seen} examples are -100, which is ignored.")
        if num_data is not None and (self.loader.num_batches is not None or num_data != seen):
            sums.data_scale = num_data / seen
        return sums

    def corrected(self, layers: Layers, sums: Curvature) -> Layers:
        """Of "ekfac" with the best eigenvalues in KFAC's basis, the same in every process; else as they are."""
        bases = {target.name: eigen for target, eigen in layers if eigen.right is not None}
        if sums.config.curvature != "ekfac" or not bases:  # normalisations have their exact diagonal
            return layers
        squares = Curvature(sums.config)
        rotated = [target for target, _ in layers if target.name in bases]
        accumulator = Accumulator(squares, self.view, rotated, self.outputs_of, bases=bases, device=self.device)
        for batch in self.loader.batches("EKFAC's eigenvalues"):
            accumulator.add(batch)
        squares.all_reduce()
        for name, own in squares.sums.items():
            check_finite(name, own)
            sums.sums[name]["squares"] = own["squares"]
        values = {name: sums.data_scale * own["squares"] for name, own in squares.sums.items()}
        return [
            (target, KroneckerEigen(eigen.left, eigen.right, values.get(target.name, eigen.eigenvalues)))
            for target, eigen in layers
        ]


def _own_path(checkpoint: str | os.PathLike[str]) -> Path:
    """Each process keeps its own sums."""
    path, count = Path(checkpoint), num_processes()
    return path if count == 1 else path.with_name(f"{path.stem}-{process_index()}-of-{count}{path.suffix}")


def _begun(path: Path | None, config: CurvatureConfig, targets: list[Target], device: torch.device | None) -> Curvature:
    """The sums of the file, on the layers' devices; none yet without one."""
    weights = {target.name: target.squared_norm for target in targets}
    digests = {} if path is None else {target.name: target.digest for target in targets}
    if path is None or not path.exists():
        return Curvature(config, weights=weights, digests=digests)
    sums = Curvature.load(path)
    if sums.config != config or set(sums.weights) != set(weights):
        raise ValueError(f"`checkpoint` {str(path)!r} holds the sums of another fit ({sums.config}); remove it.")
    same = all(math.isclose(sums.weights[name], weights[name], rel_tol=1e-6) for name in weights)
    if not same or any(sums.digests.get(name, own) != own for name, own in digests.items()):
        raise ValueError(f"`checkpoint` {str(path)!r} holds the sums of other weights than the model's; remove it.")
    for target in targets:
        place = device or next(iter(target.parameters.values())).device
        sums.sums[target.name] = {k: v.to(place) for k, v in sums.sums.get(target.name, {}).items()}
    logger.info("Resuming the curvature pass after %d batches of %s.", sums.num_batches, path)
    return sums


# -- choices ----------------------------------------------------------------------------------------------------------


def _last_layer(
    targets: list[Target], skipped: dict[str, str], called: list[nn.Module]
) -> tuple[list[Target], dict[str, str]]:
    if not called:
        raise ValueError('`subset`="last_layer": the model calls none of the layers that could be covered.')
    last = next(target for target in targets if called[-1] in target.modules)
    return [last], {**skipped, **{target.name: "not the last layer" for target in targets if target is not last}}


def _called(targets: list[Target], skipped: dict[str, str], sums: Curvature) -> tuple[list[Target], dict[str, str]]:
    """A layer that no batch of any process called, or that is only read, has no curvature."""
    used = [target for target in targets if sums.sums.get(target.name)]
    if not used:
        raise ValueError("The model calls none of the layers that `target_modules` leaves: nothing has curvature.")
    silent = {target.name: "the model does not call it" for target in targets if target not in used}
    return used, {**skipped, **silent}


def _measured(
    config: LaplaceConfig, targets: list[Target], outputs: Tensor, likelihood: str, seed: int
) -> CurvatureConfig:
    """How curvature is measured, with "auto" decided by the covered layers and the outputs of a batch."""
    curvature, fisher = config.curvature, config.fisher
    if curvature == "auto":
        is_small = config.subset == "last_layer" and targets[0].num_weights <= MAX_DENSE and targets[0].rule.is_affine
        curvature = "dense" if is_small else "kfac"
    if fisher == "auto":
        positions = max(gathered(outputs.shape[1] if outputs.ndim == 3 else 1))
        is_cheap = likelihood_of_family(likelihood).num_columns(outputs.shape[-1]) * positions <= MAX_BACKWARDS
        fisher = "exact" if is_cheap else "mc"
    return CurvatureConfig(
        curvature="dense" if curvature == "full" else curvature,
        fisher=fisher,
        weight_sharing=config.weight_sharing,
        likelihood=likelihood,
        num_mc_samples=int(config.num_mc_samples),
        seed=int(seed),
    )


def _check_kinds(model: Any, prior_mean: Any, logits: Any, seed: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if any(f"{name}_rho" in names for name in names):  # whatever made them: this room knows no Bayesian layer
        raise ValueError(
            "`model` has one set of weights for a Laplace posterior, but this one's layers are Bayesian already: call "
            "`to_deterministic(model)` first, which takes the posterior mean."
        )
    if any(getattr(module, "is_own_posterior", False) for module in model.modules()):
        raise ValueError(
            "`model` has a VBLL or SNGP head, which is a posterior already and would be left out of this one: call "
            "`to_plain_head(model)` first."
        )
    if not is_whole(seed):
        raise TypeError(f"`seed` must be a whole number, got {seed!r}.")
    if not callable(logits):
        raise TypeError(f"`logits` must be a function of the model's output, got {logits!r}.")
    if not isinstance(prior_mean, nn.Module | None):
        raise TypeError(f"`prior_mean` must be a model, got {type(prior_mean).__name__}.")


def _check_noise(noise_std: float | None, likelihood: str) -> None:
    if noise_std is None:
        return
    check_number("noise_std", noise_std, 0.0, strict=True)
    if not likelihood_of_family(likelihood).has_noise:
        raise ValueError(f"`noise_std` is a regression's, got {noise_std!r} for {likelihood!r}; see `temperature`.")
