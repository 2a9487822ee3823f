"""`fit`: from a trained model and a dataloader to its Laplace posterior."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..checks import is_whole
from ..likelihoods import logits_of
from ..likelihoods.loss_hessian import Fisher
from ..likelihoods.registry import families, likelihood_of_family
from ..linearized import check_reads, record, recording_view
from ..linearized.captured import OutputOf
from ..linearized.links import Link
from ..patterns import Patterns
from ..processes import gathered, num_processes, process_index
from ..sampling.random_state import preserved
from ..sampling.views import View
from .accumulate import Accumulator
from .curvature import Curvature, CurvatureConfig, CurvatureKind, WeightSharing, check_finite
from .data import likelihood_of
from .evidence import Precision
from .holdout import checked_validation
from .kronecker import KroneckerEigen
from .loading import Loader
from .moved import in_columns
from .posterior import FitRecord, LaplacePosterior, check_positive, checked_precision
from .targets import Subset, Target, choose_targets, squared_distances
from .tuning import PriorChoice, default_choice, tune

logger = logging.getLogger(__name__)

MAX_DENSE = 5000
"""Weights of a last layer up to which curvature="auto" takes its dense GGN: 100 MB in float32."""
MAX_BACKWARDS = 16
"""Backward passes per batch up to which fisher="auto" is exact."""


def fit(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    likelihood: str | None = None,
    subset: Subset = "all",
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    curvature: CurvatureKind | Literal["auto"] = "auto",
    fisher: Fisher | Literal["auto"] = "auto",
    weight_sharing: WeightSharing = "expand",
    prior_precision: Precision | PriorChoice | None = None,
    prior_mean: nn.Module | None = None,
    temperature: float = 1.0,
    noise_std: float | None = None,
    validation: Iterable[Any] | None = None,
    link: Link = "auto",
    num_batches: int | None = None,
    num_data: int | None = None,
    num_mc_samples: int = 1,
    seed: int = 0,
    logits: OutputOf = logits_of,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_steps: int = 100,
    progress: bool = True,
) -> LaplacePosterior:
    """Fit a Laplace posterior N(theta*, (GGN / (T s^2) + tau)^-1) around a trained model: one pass over the data.

    The model is used in `eval()` mode and comes back as it was. Under a launcher (`torch.distributed` initialised)
    every process passes its share; the sums are reduced over all, without the duplicates that samplers pad with.

    Args:
        model: any trained module whose forward takes a batch of the loader.
        dataloader: the training data, in any order: mappings with labels inside, (inputs, labels) pairs, or inputs.
            Labels are needed for the log marginal likelihood, the noise of a regression and fisher="empirical" only.
            An example whose every label is -100 (ignored) is as good as not there.
        likelihood: "classification", "multilabel", "regression" or "ordinal"; by default that of the model's head.
        subset: "all" layers, or the "last_layer": the layer called last.
        target_modules: PEFT's patterns of layers to cover instead, Embedding and normalisation layers included.
        exclude_modules: PEFT's patterns of layers to leave deterministic.
        curvature: "kfac", "ekfac" (a second pass; more accurate), "diagonal", "full" (dense per layer, for small
            ones); "auto": kfac, but the dense GGN of a last layer with at most 5,000 weights.
        fisher: "exact" (one backward pass per class but one, and per position), "mc" (one per label draw), "empirical";
            "auto": exact up to 16 backward passes per batch, else mc.
        weight_sharing: of layers with several positions: "expand" or "reduce".
        prior_precision: tau, or a mapping from layer name; or how to find it: "marglik" (the evidence), one for all
            layers, "marglik_per_layer", or "holdout": least NLL of the linearised predictive on ``validation``, which
            predicts better (docs/results.md). By default "holdout" with ``validation``, "marglik" without.
        prior_mean: the model that holds the prior's mean mu0, such as the pretrained one before fine-tuning; by
            default, and for layers that it lacks or has in another shape, 0. Only the evidence knows it: the posterior
            is centred at theta*.
        temperature: T of the likelihood p(y | x)^(1/T): below 1 a narrower posterior.
        noise_std: s of a regression; by default the one of largest evidence.
        validation: held-out batches with labels.
        link: of the predictive that "holdout" judges.
        num_batches: only so many batches (of each process); the curvature is scaled up to ``num_data``.
        num_data: N, the examples that the curvature stands for, ignored ones included; by default the dataset's length.
        num_mc_samples: label draws per item of fisher="mc".
        seed: of these draws.
        logits: from the model's output to (B, C), (B, T, C), or (B,) of a regression.
        device: of the sums and eigenvectors, where the model's own has no room; the posterior lives there until used.
        checkpoint: a file for the sums, written every ``checkpoint_steps`` batches and at the end. If it exists, the
            pass goes on where it stopped: the loader must give the same batches in the same order.
        checkpoint_steps: see ``checkpoint``.
        progress: show a progress bar.

    Returns:
        The posterior.

    Raises:
        TypeError, ValueError: an argument is not one of these, no batch, outputs that are not finite, no layer to
            cover, or a checkpoint of another fit.

    >>> net, x = nn.Linear(3, 2), torch.randn(20, 3)
    >>> posterior = fit(net, [(x, torch.randint(2, (20,)))], progress=False)
    >>> posterior.predict(x[:4]).logit_covariance.shape
    torch.Size([4, 2, 2])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    is_given, likelihood = likelihood is not None, likelihood_of(model) if likelihood is None else likelihood
    if noise_std is not None:
        check_positive("noise_std", noise_std)
        if not likelihood_of_family(likelihood).has_noise:
            raise ValueError(f"`noise_std` is a regression's, got {noise_std!r} for {likelihood!r}; see `temperature`.")
    prior_precision = default_choice(validation) if prior_precision is None else prior_precision
    _check_choices(likelihood, subset, curvature, fisher, weight_sharing, link, prior_precision)
    _check_counts(num_mc_samples=num_mc_samples, checkpoint_steps=checkpoint_steps)
    _check_counts(**{n: c for n, c in {"num_batches": num_batches, "num_data": num_data}.items() if c is not None})
    if not is_whole(seed):
        raise TypeError(f"`seed` must be a whole number, got {seed!r}.")
    check_positive("temperature", temperature)
    _device(device)
    if not callable(logits):
        raise TypeError(f"`logits` must be a function of the model's output, got {logits!r}.")
    if prior_mean is not None and not isinstance(prior_mean, nn.Module):
        raise TypeError(f"`prior_mean` must be a model, got {type(prior_mean).__name__}.")
    if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"`checkpoint` must be a path of a file, got {checkpoint!r}.")
    if prior_precision == "holdout":
        checked_validation(model, validation)
    targets, skipped = choose_targets(model, target_modules, exclude_modules)
    if not isinstance(prior_precision, str):
        checked_precision(prior_precision, [target.name for target in targets])
    loader = Loader(model, dataloader, num_batches, num_data, progress)
    with preserved(), recording_view(model, training=False) as view:  # a DataLoader takes its seed from the generator
        batch = loader.first()
        likelihood = likelihood if is_given else likelihood_of(model, batch.labels)
        first = _probe(view, batch, targets, logits)
        if subset == "last_layer":
            targets, skipped = _last_layer(targets, skipped, first.called)
        covered = {module for target in targets for module in target.modules}
        check_reads(model, batch.inputs, covered & set(first.called), in_columns(logits))
        distances = None if prior_mean is None else squared_distances(targets, model, prior_mean)
        config = CurvatureConfig(
            curvature=_auto_curvature(curvature, subset, targets),
            fisher=_auto_fisher(fisher, first.outputs, likelihood),
            weight_sharing=weight_sharing,
            likelihood=likelihood,
            num_mc_samples=int(num_mc_samples),
            seed=int(seed),
        )
        sums = _pass(view, loader, targets, config, logits, _device(device), checkpoint, checkpoint_steps)
        targets, skipped = _called(targets, skipped, sums)
        layers = decompose(sums, targets)
        if config.curvature == "ekfac":
            layers = _second_pass(view, loader, layers, sums, logits, _device(device))
    seen = record_of(sums, skipped, distances)
    posterior = LaplacePosterior(
        model, layers, seen, temperature=temperature, noise_std=noise_std or 1.0, outputs_of=logits
    )
    return tune(posterior, prior_precision, noise_std=noise_std, validation=validation, link=link, progress=progress)


# -- the pass ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    outputs: Tensor
    called: list[nn.Module]


def _probe(view: View, batch: Any, targets: list[Target], logits: OutputOf) -> _Probe:
    """Outputs, and the covered layers in the order in which the model calls them."""
    modules = [module for target in targets for module in target.modules]
    with torch.no_grad():
        outputs, uses = record(view, batch.inputs, modules, in_columns(logits))
    return _Probe(outputs.detach(), [use.module for use in uses])


def _pass(
    view: View,
    loader: Loader,
    targets: list[Target],
    config: CurvatureConfig,
    logits: OutputOf,
    device: torch.device | None,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_steps: int,
) -> Curvature:
    path = None if checkpoint is None else _own_path(checkpoint)
    sums = _begun(path, config, targets, device)
    accumulator = Accumulator(sums, view, targets, in_columns(logits), device=device)
    for batch in loader.batches("Curvature", skip=sums.num_batches):
        accumulator.add(batch)
        if path is not None and sums.num_batches % checkpoint_steps == 0:
            sums.save(path)
    if path is not None:
        sums.save(path)
    sums.all_reduce()
    seen = sums.num_examples + sums.num_unlabelled
    if seen == 0:
        raise ValueError("`dataloader` is empty: it must give at least one batch.")
    if sums.num_examples == 0:
        raise ValueError(f"`dataloader` has no label: all those of its {seen} examples are -100, which is ignored.")
    if loader.num_data is not None and (loader.num_batches is not None or loader.num_data != seen):
        sums.data_scale = loader.num_data / seen
    return sums


def _second_pass(
    view: View,
    loader: Loader,
    layers: list[tuple[Target, KroneckerEigen]],
    sums: Curvature,
    logits: OutputOf,
    device: torch.device | None,
) -> list[tuple[Target, KroneckerEigen]]:
    """EKFAC: the best eigenvalues in KFAC's basis, which is the same in every process."""
    bases = {target.name: eigen for target, eigen in layers if eigen.right is not None}
    if not bases:  # normalisations only, whose diagonal is exact
        return layers
    squares = Curvature(sums.config)
    rotated = [target for target, _ in layers if target.name in bases]
    accumulator = Accumulator(squares, view, rotated, in_columns(logits), bases=bases, device=device)
    for batch in loader.batches("EKFAC's eigenvalues"):
        accumulator.add(batch)
    squares.all_reduce()
    for name, found in squares.sums.items():
        check_finite(name, found)
        sums.sums[name]["squares"] = found["squares"]
    corrected = {name: sums.data_scale * found["squares"] for name, found in squares.sums.items()}
    return [
        (target, KroneckerEigen(eigen.left, eigen.right, corrected.get(target.name, eigen.eigenvalues)))
        for target, eigen in layers
    ]


def decompose(sums: Curvature, targets: list[Target]) -> list[tuple[Target, KroneckerEigen]]:
    """Every layer with its eigendecomposed curvature; layers that read the same tensor share one basis."""
    known: list[tuple[Tensor, Tensor, Tensor]] = []
    return [(target, sums.eigen(target.name, known)) for target in targets]


def record_of(sums: Curvature, skipped: Mapping[str, str], distances: Mapping[str, float] | None = None) -> FitRecord:
    """What the sums say about the data; ``distances`` of the weights from a prior mean that is not 0."""
    return FitRecord(
        config=sums.config,
        num_data=round(sums.num_examples * sums.data_scale),
        log_likelihood=sums.log_likelihood * sums.data_scale,
        squared_error=sums.squared_error * sums.data_scale,
        num_outputs=round(sums.num_outputs * sums.data_scale),
        skipped=dict(skipped),
        squared_distances=dict(distances or {}),
    )


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


def _auto_curvature(curvature: str, subset: Subset, targets: list[Target]) -> CurvatureKind:
    if curvature != "auto":
        return curvature  # type: ignore[return-value]
    is_small = subset == "last_layer" and targets[0].num_weights <= MAX_DENSE and targets[0].rule.is_affine
    return "full" if is_small else "kfac"


def _auto_fisher(fisher: str, outputs: Tensor, likelihood: str) -> Fisher:
    if fisher != "auto":
        return fisher  # type: ignore[return-value]
    positions = max(gathered(outputs.shape[1] if outputs.ndim == 3 else 1))
    return (
        "exact"
        if likelihood_of_family(likelihood).num_columns(outputs.shape[-1]) * positions <= MAX_BACKWARDS
        else "mc"
    )


def _device(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'`device` must be a torch device such as "cpu" or "cuda:0", got {device!r}.') from error


def _check_choices(
    likelihood: str,
    subset: str,
    curvature: str,
    fisher: str,
    weight_sharing: str,
    link: str,
    prior_precision: Any,
) -> None:
    choices = {
        "likelihood": (likelihood, families()),
        "subset": (subset, get_args(Subset)),
        "curvature": (curvature, ("auto", *get_args(CurvatureKind))),
        "fisher": (fisher, ("auto", *get_args(Fisher))),
        "weight_sharing": (weight_sharing, get_args(WeightSharing)),
        "link": (link, get_args(Link)),
    }
    if isinstance(prior_precision, str):
        choices["prior_precision"] = (prior_precision, get_args(PriorChoice))
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not is_whole(count) or count < 1:
            raise ValueError(f"`{name}` must be a whole number >= 1, got {count!r}.")
