"""`to_bayesian` and its inverse: layers change class in place, nothing else of the model changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..distributions import PosteriorPrior, Prior
from ..distributions.diagonal_normal import ScaleName
from ..nn import draws
from ..nn.adapters import keep_frozen, let_thaw, notice_other_adapters
from ..nn.base import RECORD, BayesianModule, variational_tensors
from ..nn.base import is_bayesian as is_bayesian
from ..patterns import Patterns
from ..sharding.late import keeps_sharding
from .adapters import (
    ADAPTERS,
    check_unmerged,
    floors_in,
    floors_of_zeros,
    forget_unloading,
    only_adapters,
    only_given,
    store_centres,
    target_of,
    trained_heads,
    watch_unloading,
)
from .config import BayesianConfig, Parametrization, check_flags
from .continual import HasModel, as_prior, fitted_prior, store_posterior, without_posterior
from .persistence import told_of_adapters, told_of_own_save, without_lost
from .plain_weights import check_plain_weights
from .rank1 import check_parametrization, fixed_means, prepare
from .record import (
    Conversion,
    bayesian_config,
    conversion_record,
    converted_module,
    not_bayesian,
    publish,
    update_config,
)
from .rollback import all_or_nothing
from .selection import (
    Chosen,
    check_ties,
    check_weights,
    choose,
    entries_in,
    estimators_of,
    first_names,
    matching_subtrees,
    meant,
    owner_shapes,
    owners_of,
    random_names,
    recorded,
)
from .surgery import (
    dropout_rates,
    padding_rows,
    predicted_padding,
    refuse_resize,
    set_dropout,
    set_padding_rows,
    swap_class,
    switch_fused_off,
    tie,
)
from .ties import TIES, declare_ties, full_name, hold_ties, release_ties, ties_of

logger = logging.getLogger(__name__)

_RESIZE = "resize_token_embeddings"


@keeps_sharding
def to_bayesian(
    model: nn.Module,
    delta: float | None = None,
    freeze: bool | None = None,
    *,
    prior: Prior | nn.Module | HasModel | None = None,
    scale: ScaleName | None = None,
    estimator: str | Mapping[str, str] = "reparameterization",
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    modules_to_save: Sequence[str] | None = None,
    norms: bool = False,
    keep_dropout: bool = False,
    parametrization: Parametrization = "weights",
) -> nn.Module:
    """Make a trained model Bayesian, in place: each weight becomes N(weight, (delta |weight|)^2) (MOPED).

    A layer takes the Bayesian subclass of its own class and keeps its Parameters as posterior means, so ties, hooks,
    `.generate`, `.config` and checkpoints go on working. All is checked first. Krishnan et al. 2020 (arXiv 1906.05323).

    Args:
        model: any `torch.nn.Module`; usually a fine-tuned transformers model.
        delta: initial posterior scale relative to |weight|, > 0; with the default prior also the prior's noise level.
            None: 0.05, of adapters 0.2.
        freeze: keep means and all other parameters fixed and train only the scales (``rho``); False leaves the
            `requires_grad` flags of the means as they are. None: True, but False where only adapters become Bayesian.
        prior: prior of every converted weight; None: `MopedPrior()`, of adapters `RelativePrior()`. Or a model of the
            last task that was converted and trained, or its `VariationalPosterior`: each tensor that it has too, by
            name, takes its posterior as the prior and starts at its scale (see `posterior_as_prior`).
        scale: "additive", sigma = softplus(rho), or "multiplicative", sigma = softplus(rho) max(|mean|, floor), which
            keeps its share of a mean that trains (sigma^2 = alpha mean^2); the floor is 0.1 mean|weight| of the tensor.
            None: "additive", of adapters "multiplicative".
        estimator: how noise enters in training: "reparameterization" (one draw per batch), "flipout" (one per example)
            or "local_reparameterization" (one per output element), for the whole model; or a mapping from module
            pattern (a name suffix, or a regular expression matched in full) to one of them, where the first
            pattern that matches a layer decides and other layers keep "reparameterization".
        target_modules: "all", a list of module-name suffixes, or one regular expression matched in full (as in PEFT).
            None: "all", but of a model with PEFT's adapters the active ones' weights (of LoRA the matrix that does not
            start at 0). PEFT's names, such as "lora_A" or "ia3_l", mean those of the active adapters.
        exclude_modules: names to leave out with all inside them, in the same forms.
        modules_to_save: name suffixes of modules that stay deterministic and trainable with all inside them, such as a
            fresh head.
        norms: convert the gains and biases of normalisations too: LayerNorm, RMSNorm and the models' own RMSNorm
            classes.
        keep_dropout: leave dropout on. By default it is switched off: dropout and weight noise are two posteriors.
        parametrization: "weights", or "rank1": a Linear's weight is multiplied by r s^T with random vectors r and s
            around 1, of scale ``delta`` (`bayeformers.nn.Rank1Linear`); "rows": by r alone (`RankLinear`); other layers
            stay deterministic.

    Returns:
        The same object.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: a wrong argument, a pattern that matches nothing convertible, a model that is Bayesian
            already, weights that are not finite, quantised, offloaded, sharded or on the meta device, or a tied weight
            of which only one owner is targeted.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> to_bayesian(net, delta=0.1)[0].weight_rho.shape
    torch.Size([8, 4])
    """
    check_flags(freeze=freeze is None or freeze, norms=norms, keep_dropout=keep_dropout)
    given = {"delta": delta, "freeze": freeze, "prior": None if prior is None else as_prior(prior), "scale": scale}
    config = BayesianConfig(parametrization=parametrization, **only_given(given))
    check_parametrization(parametrization, estimator, config.prior)
    _check_convertible(model)
    target_modules = target_of(model, target_modules)
    saved = matching_subtrees(model, modules_to_save)
    chosen, skipped = choose(model, target_modules, exclude_modules, saved, norms, parametrization)
    if only_adapters(model, chosen):
        config = replace(config, **only_given(vars(ADAPTERS) | only_given(given)))
    estimators_of(chosen, estimator)
    is_whole = target_modules == "all" and exclude_modules is None and not saved
    chosen, lost = without_lost(model, chosen, is_multiplicative=config.scale == "multiplicative", is_whole=is_whole)
    skipped |= lost
    check_ties(model, chosen, skipped)
    check_plain_weights(model, meant(model, chosen, target_modules, exclude_modules, saved), whole=is_whole)
    check_weights(model, chosen)
    check_unmerged(model, chosen)
    config = replace(
        config,
        prior=fitted_prior(config.prior, owner_shapes(model, chosen)),
        estimator=dict(estimator) if isinstance(estimator, Mapping) else estimator,
        modules={name: kind.__name__ for name, kind in chosen.items()},
        parameters=entries_in(model, chosen),
        floors_of_zeros=floors_of_zeros(model, first_names(model, chosen)),
        modules_to_save=list(modules_to_save or []),
        norms=norms,
        dropout={} if keep_dropout else dropout_rates(model),
        padding=padding_rows(model, chosen),
        predicted_padding=predicted_padding(model, owners_of(model, chosen).values()),
    )
    told = told_of_own_save(model) or told_of_adapters(model)
    convert(model, config, chosen, skipped)
    if target_modules is None:
        notice_other_adapters(model)
    if told is not None:
        logger.warning(told)
    return model


def convert(
    model: nn.Module,
    config: BayesianConfig,
    chosen: Chosen | None = None,
    skipped: dict[str, str] | None = None,
) -> nn.Module:
    """Return ``model`` after a checked conversion, or the one that ``config`` records (a checkpoint being loaded).

    Args:
        model: to be converted, in place.
        config: what the conversion is to do.
        chosen: the modules to convert with their Bayesian class; None: those that ``config`` records.
        skipped: the other modules with the reason why they stay deterministic; None: no reason is kept.

    Raises:
        ValueError: ``config`` names modules that ``model`` has not, or of another class.
    """
    with all_or_nothing(model):
        _convert(model, config, recorded(model, config) if chosen is None else chosen, dict(skipped or {}))
    return model


def _convert(model: nn.Module, config: BayesianConfig, chosen: Chosen, skipped: dict[str, str]) -> None:
    prior, posterior = without_posterior(config.prior)
    config = replace(config, prior=prior)
    prepare(model, chosen)
    state = Conversion(config, {name: p.requires_grad for name, p in _parameters(model)}, skipped)
    for key in config.dropout:
        set_dropout(model, key, 0.0)
    if config.freeze:
        freeze_means(model, config)
    if config.padding is not None:
        set_padding_rows(model, chosen, config.padding)
    if config.ties is not None:  # of a model that is being loaded, whose ties are a list until then
        declare_ties(model, config.ties, random_names(model, chosen))
    state.declared_ties = dict(vars(model).get(TIES) or {})
    owners = list(owners_of(model, chosen).values())
    config = replace(config, ties=ties_of(model, owners))
    estimators = estimators_of(chosen, config.estimator)
    for name, kind in chosen.items():
        _become(model, name, kind, config, estimators[name])
    for tied in owners:
        name = full_name(tied[0])
        layers = [(model.get_submodule(owner), key) for owner, key in tied]
        tie(layers, name, config.noise_version, predicts_padding=name in config.predicted_padding)
    if isinstance(config.prior, PosteriorPrior):
        store_posterior(model, config.prior, posterior, [tied[0] for tied in owners])
    declare_ties(model, config.ties or {}, random_names(model, chosen))
    hold_ties(model)
    state.fused = switch_fused_off(model)
    state.config = config
    setattr(model, RECORD, state)
    draws.one_draw_per_forward(model)
    watch_unloading(model, _unloaded)
    if config.freeze:
        keep_frozen(model)
    else:
        store_centres(model)
    if hasattr(model, _RESIZE):
        model.__dict__[_RESIZE] = refuse_resize
    publish(model, config)


def freeze_means(model: nn.Module, config: BayesianConfig) -> None:
    """``freeze=True``: of all Parameters only scales, and what is in ``modules_to_save``, ours or PEFT's, train."""
    saved = [*matching_subtrees(model, config.modules_to_save), *trained_heads(model, config.modules)]
    scales = {id(tensor.rho) for tensor in variational_tensors(model)}
    for name, parameter in _parameters(model):
        parameter.requires_grad_(id(parameter) in scales or any(name.startswith(f"{s}.") for s in saved))


def freeze_as_saved(model: nn.Module, missing: set[str]) -> None:
    """Restore the flags of a loaded model, whose Parameters the stock loader has made anew, all of them training.

    A mean whose prior's centre is ``missing`` in the checkpoint was frozen, and is that centre itself.
    """
    for tensor in variational_tensors(model):
        centre = f"{tensor.parameter_name}_prior_centre"
        if f"{tensor.name.removesuffix(tensor.parameter_name)}{centre}" in missing:
            tensor.module.drop_centre(tensor.parameter_name)
        if tensor.module.prior.needs_centre and not hasattr(tensor.module, centre):
            tensor.loc.requires_grad_(False)
    if bayesian_config(model).freeze:
        freeze_means(model, bayesian_config(model))
    for mean in fixed_means(model):
        mean.requires_grad_(False)


def settle_ties(model: nn.Module) -> dict[str, str]:
    """After a model was loaded, its ties: which names stand for one tensor now, whatever its configuration says."""
    hold_ties(model)
    chosen = {name: type(layer) for name, layer in draws.bayesian_modules(model).items()}
    return ties_of(model, owners_of(model, chosen).values())


@keeps_sharding
def to_deterministic(model: nn.Module) -> nn.Module:
    """Undo :func:`to_bayesian` in place, at the posterior mean: classes, `requires_grad` flags, dropout, config.

    Layers that were built by hand become torch's own; of those there are no flags to restore.

    Returns:
        The same object.

    Raises:
        ValueError: ``model`` is not Bayesian.
    """
    if not is_bayesian(model):
        raise ValueError(not_bayesian(model))
    with all_or_nothing(model):
        for part in [module for module in model.modules() if RECORD in vars(module)]:
            _undo(part)
        _become_deterministic(model)  # what was built by hand
        draws.release(model)
    return model


def _undo(model: nn.Module) -> None:
    """What :func:`convert` did to ``model`` itself."""
    state: Conversion = getattr(model, RECORD)
    _become_deterministic(model)
    for name, parameter in _parameters(model):
        parameter.requires_grad_(state.requires_grad.get(name, True))
    for key, rate in state.config.dropout.items():
        set_dropout(model, key, rate)
    for encoder, attribute, value in state.fused:
        setattr(encoder, attribute, value)
    release_ties(model)
    forget_unloading(model)
    if TIES in vars(model):
        model.all_tied_weights_keys = state.declared_ties  # type: ignore[assignment]
    draws.release(model)
    delattr(model, RECORD)
    model.__dict__.pop(_RESIZE, None)
    if hasattr(getattr(model, "config", None), "bayesian"):
        del model.config.bayesian  # type: ignore[union-attr]


def _unloaded(model: nn.Module) -> None:
    """Forget a conversion of which PEFT's `unload` has left no Bayesian layer."""
    if (record := conversion_record(model)) is not None and not is_bayesian(model):
        record.requires_grad = {name: p.requires_grad for name, p in _parameters(model)}
        _undo(converted_module(model))


def _become_deterministic(model: nn.Module) -> None:
    for module in draws.bayesian_modules(model).values():
        module.become_deterministic()
        swap_class(module, type(module).torch_class)


@keeps_sharding
def unfreeze(model: nn.Module) -> nn.Module:
    """Let the means train too: stores the prior's centres and restores the flags from before `to_bayesian`.

    Returns:
        The same object.

    Raises:
        ValueError: ``model`` is not Bayesian.
    """
    if not is_bayesian(model):
        raise ValueError(not_bayesian(model))
    flags = {} if (state := conversion_record(model)) is None else state.requires_grad
    converted = model if state is None else converted_module(model)
    with all_or_nothing(model):
        for tensor in variational_tensors(converted):
            tensor.module.store_centre(tensor.parameter_name)
        let_thaw(model)
        for name, parameter in _parameters(converted):
            if not name.endswith("_rho"):
                parameter.requires_grad_(flags.get(name, True))
        update_config(model, freeze=False)
    return model


def _check_convertible(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    if torch.is_inference_mode_enabled() or any(
        parameter.is_inference() for parameter in model.parameters() if not nn.parameter.is_lazy(parameter)
    ):
        raise ValueError(
            "`model` cannot be converted under `torch.inference_mode()`, nor if it was made there: scales made there "
            "can never be trained. Use `torch.no_grad()`, or convert outside."
        )
    if any(getattr(module, "is_own_posterior", False) for module in model.modules()):
        raise ValueError(
            "`model` has a VBLL or SNGP head, whose objective and the ELBO of other layers do not go together: call "
            "`to_plain_head(model)` first."
        )
    if is_bayesian(model):
        by_hand = conversion_record(model) is None
        raise ValueError(
            "`model` is Bayesian already: "
            + (
                "it has `bayeformers.nn` layers. Call `to_deterministic(model)` first and convert all layers in one "
                "call, or build the others of `bayeformers.nn` too."
                if by_hand
                else "`to_bayesian` was called twice. Call `to_deterministic(model)` first, or name the layers to "
                "convert in one call."
            )
        )


def _become(model: nn.Module, name: str, kind: type[BayesianModule], config: BayesianConfig, estimator: str) -> None:
    module = model.get_submodule(name)
    swap_class(module, kind)
    assert isinstance(module, BayesianModule)
    vars(module)["floors_of_zeros"] = floors_in(name, config.floors_of_zeros)
    module.become_bayesian(prior=config.prior, delta=config.delta, estimator=estimator, scale=config.scale)


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())
