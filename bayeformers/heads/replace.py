"""`to_vbll`, `to_sngp`: another last layer for a transformers model, in place; `to_plain_head` undoes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..likelihoods import get_likelihood, resolve_problem_type
from ..nn.base import is_bayesian
from .base import Head, Replaced
from .config import HeadConfig, SNGPConfig, VBLLConfig
from .find import PROBLEMS, RECORD, find_head, find_linear, head_of
from .posterior import HeadPosterior
from .sngp import RandomFeatureHead
from .spectral import spectral_layers as named_spectral_layers
from .vbll import VariationalHead

__all__ = ["install", "to_plain_head", "to_sngp", "to_vbll"]

_OWN = "posterior"


def to_vbll(
    model: PreTrainedModel,
    config: VBLLConfig | None = None,
    *,
    head: str | None = None,
    freeze: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Replace a model's last layer by a variational Bayesian one, in place (Harrison et al. 2024).

    Its weights are the mean of the posterior, so the model's logits stay. `BayesianTrainer` then trains the bound of
    `heads.vbll`, and evaluates with Gaussian logits in one forward pass, as `bayeformers.predict` does.
    `model.save_pretrained` and `bayeformers.from_pretrained` keep all of it. Call it before `get_peft_model`.

    Args:
        model: of transformers, that classifies sequences, tokens, images or audio, or regresses.
        config: how the head is made.
        head: the name of the last layer, where it is not the only linear layer with `num_labels` outputs.
        freeze: whether the head alone trains.
        **options: fields of the configuration by name; they replace those of ``config``.

    Returns:
        The same model.

    Raises:
        TypeError: no model of transformers, or a wrong kind of argument.
        ValueError: a model of another kind, one that has such a head or Bayesian layers already, or an option out of
            its range; nothing has changed then.
    """
    settled = _settled(VBLLConfig, config, options)
    name, is_regression = _checked(model, settled, head)
    linear = cast(nn.Linear, model.get_submodule(name))
    new = install(model, name, settled, is_regression=is_regression, freeze=freeze)
    assert isinstance(new, VariationalHead)
    new.weight = _wide(linear.weight)
    new.bias = None if linear.bias is None else _wide(linear.bias)
    new.reset()
    return model


def to_sngp(
    model: PreTrainedModel,
    config: SNGPConfig | None = None,
    *,
    head: str | None = None,
    freeze: bool = False,
    layers: str | Sequence[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Replace a model's last layer by a Gaussian process on random features, in place (Liu et al. 2020, 2022).

    It begins with logits of 0: train it. After every optimizer step `BayesianTrainer` normalises the layers' spectra,
    and after training it computes the covariance in one pass over the training data (`fit_covariance` in a loop of
    one's own). Predictions take one forward pass.

    Args:
        model: of transformers, that classifies sequences, tokens, images or audio, or regresses.
        config: how the head is made.
        head: the name of the last layer, where it is not the only linear layer with `num_labels` outputs.
        freeze: whether the head alone trains.
        layers: which Linear layers have their spectral norm bounded, by PEFT's patterns; None: those between the
            encoder's stack and the head, such as BERT's pooler. Frozen layers stay as they are.
        **options: fields of the configuration by name; they replace those of ``config``.

    Returns:
        The same model.

    Raises:
        TypeError: no model of transformers, or a wrong kind of argument.
        ValueError: a model of another kind, one that has such a head or Bayesian layers already, or an option out of
            its range; nothing has changed then.
    """
    settled = _settled(SNGPConfig, config, options)
    name, is_regression = _checked(model, settled, head)
    found = tuple(layer for layer in named_spectral_layers(model, layers) if layer != name)
    if settled.spectral_bound is None:
        if layers is not None:
            raise ValueError(f"`layers` must be None where `spectral_bound` is None, got {layers!r}.")
        found = ()
    settled = replace(settled, spectral_layers=found)
    new = install(model, name, settled, is_regression=is_regression, freeze=freeze)
    assert isinstance(new, RandomFeatureHead)
    new.reset()
    return model


def install(
    model: PreTrainedModel, name: str, config: HeadConfig, *, is_regression: bool, freeze: bool = False
) -> Head:
    """Put an empty head in the place of a layer, and record it in the model's configuration.

    Args:
        model: of which.
        name: of the layer.
        config: of the head.
        is_regression: whether its outputs are values with Gaussian noise.
        freeze: whether the head alone trains.

    Returns:
        The head, whose tensors hold nothing yet.
    """
    linear = cast(nn.Linear, model.get_submodule(name))
    dtype = torch.promote_types(linear.weight.dtype, torch.float32)
    sizes: dict[str, Any] = {"device": linear.weight.device, "dtype": dtype, "is_regression": is_regression}
    new: Head
    if isinstance(config, VBLLConfig):
        has_bias = linear.bias is not None
        new = VariationalHead(linear.in_features, linear.out_features, config, bias=has_bias, **sizes)
    else:
        assert isinstance(config, SNGPConfig)
        layers = (model.get_submodule(layer) for layer in config.spectral_layers)
        widths = tuple(int(cast(torch.Tensor, layer.weight).shape[1]) for layer in layers)
        new = RandomFeatureHead(linear.in_features, linear.out_features, config, spectral_sizes=widths, **sizes)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    new.replaced = Replaced(linear, flags)
    if freeze:
        model.requires_grad_(False)
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, new.train(linear.training))
    record = {**config.to_dict(), "module": name, "is_regression": is_regression, "freeze": freeze}
    setattr(model.config, RECORD, record)
    model.__dict__[_OWN] = HeadPosterior(model)
    return new


def to_plain_head(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `to_vbll`, of which the mean stays, or `to_sngp`, in place of which the former layer comes back.

    Which parameters train is again as it was before.

    Args:
        model: with such a head.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is no model of transformers.
        ValueError: it has no such head, or an SNGP head that was loaded from a folder: the former layer is not there.
    """
    _check_model(model)
    head = head_of(model)
    name = next(name for name, module in model.named_modules() if module is head)
    former = head.replaced.layer
    linear = _mean_of(head, model.dtype) if isinstance(head, VariationalHead) else former
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"`model` ({type(model).__name__}) was loaded with its SNGP head: the former layer is not there."
        )
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, linear.to(head.weight.device).train(head.training))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(head.replaced.requires_grad.get(key, parameter.requires_grad))
    delattr(model.config, RECORD)
    model.__dict__.pop(_OWN, None)
    return model


def _mean_of(head: VariationalHead, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    linear.weight = head.weight
    linear.register_parameter("bias", head.bias)
    return linear.to(dtype)


def _settled(kind: type[Any], config: Any, options: dict[str, Any]) -> Any:
    if config is not None and type(config) is not kind:
        raise TypeError(f"`config` must be a {kind.__name__}, got {type(config).__name__}.")
    unknown = sorted(set(options) - set(kind.numbers()) | set(options) & {"spectral_layers"})
    if unknown:
        raise TypeError(f"Unknown options {unknown}: `{kind.__name__}` has {list(kind.numbers())}.")
    return kind(**options) if config is None else replace(config, **options)


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        told = ": call it before `get_peft_model`" if hasattr(model, "peft_config") else ""
        raise TypeError(f"`model` must be a PreTrainedModel of transformers, got {type(model).__name__}{told}.")


def _checked(model: Any, config: HeadConfig, head: str | None) -> tuple[str, bool]:
    """The name of the last layer, and whether it regresses, of a model that can have such a head."""
    _check_model(model)
    if is_bayesian(model):
        raise ValueError(
            f"`model` ({type(model).__name__}) has Bayesian layers: call `to_deterministic(model)` first, for a head "
            "of its own objective and the ELBO of other layers do not go together."
        )
    if find_head(model) is not None:
        raise ValueError(
            f"`model` ({type(model).__name__}) has such a head already: call `to_plain_head(model)` first."
        )
    problem = resolve_problem_type(model, or_unknown=True)
    if problem not in PROBLEMS or (callable(model.get_output_embeddings) and model.get_output_embeddings() is not None):
        raise ValueError(
            f"`model` ({type(model).__name__}) has a head of the kind {problem!r}: a VBLL or SNGP head is for one of "
            f"{PROBLEMS}, and not over a vocabulary."
        )
    is_regression = get_likelihood(problem).has_noise
    if is_regression and config.noise_std == 0:
        raise ValueError("`noise_std` must be > 0 for a regression, got 0.")
    if not is_regression and model.config.num_labels < 2 and problem != "multi_label_classification":
        raise ValueError(f"`model` must have at least 2 classes, got `num_labels`={model.config.num_labels}.")
    return find_linear(model, head), is_regression


def _wide(parameter: Tensor) -> nn.Parameter:
    """The Parameter itself, or one in float32."""
    if parameter.dtype.itemsize >= 4:
        return cast(nn.Parameter, parameter)
    return nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
