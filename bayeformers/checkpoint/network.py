"""`network_of`: one network of a posterior as a plain model, for `torch.export`, ONNX and all that reads models."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..checks import check_draw
from ..heads import HeadPosterior
from ..nn import BayesianModule
from ..nn.rank1 import FactorLinear
from ..posteriors import PointPosterior, Posterior, VariationalPosterior
from ..posteriors.predict import as_posterior
from .mean import check_mean, mean_in_place, plain_copy

__all__ = ["network_of"]


def network_of(model: nn.Module | Posterior, index: int | None = None, *, seed: int = 0) -> nn.Module:
    """Return one network of a posterior as a plain model of its own: the mean, or a draw as the weights.

    The class is that from before the conversion, and nothing of bayeformers is left: no scale, no hook, no noise. It is
    in ``eval()``; its outputs are those of the model in `posterior_mean`, or in ``fixed_draw(model, index, seed)``. The
    weights are copies: neither model sees what becomes of the other's.

    Args:
        model: a converted model, or one that carries a posterior; or a posterior.
        index: of the draw; None: the mean.
        seed: of the sequence of draws.

    Returns:
        The network.

    Raises:
        TypeError: ``model`` is no model and no posterior.
        ValueError: a point estimate; a mean of a posterior that has none (ensembles, mixtures); one that is more than
            its weights (a temperature, dropout, an SNGP head, INT8); a draw that there is none of, or of a layer with
            random factors.

    >>> import bayeformers
    >>> model = bayeformers.to_bayesian(nn.Linear(4, 3))
    >>> network_of(model, 0)
    Linear(in_features=4, out_features=3, bias=True)
    """
    posterior = as_posterior(getattr(model, "_orig_mod", model))  # out of `torch.compile`
    if index is None:
        check_mean(posterior)
        with mean_in_place(posterior):
            return _with_own_storage(plain_copy(posterior.model)).eval()
    _check_draw(posterior, index, seed)
    with torch.no_grad(), posterior.draw(index, seed):
        return _with_own_storage(plain_copy(posterior.model, dict(_drawn(posterior.model)))).eval()


def _check_draw(posterior: Posterior, index: int, seed: int) -> None:
    """Raise ValueError where a draw is not one set of weights of the model."""
    check_draw(index, seed)
    kind, count = type(posterior).__name__, posterior.num_draws
    if count is not None and index >= count:
        raise ValueError(f"`index` must be below {count}, the number of this {kind}'s draws, got {index}.")
    is_of_weights = isinstance(posterior, VariationalPosterior) or getattr(posterior, "file_name", None) is not None
    is_more = getattr(posterior, "predicts_itself", False) or isinstance(posterior, (HeadPosterior, PointPosterior))
    if not is_of_weights or is_more or not list(posterior.random_parameters()):  # type: ignore[attr-defined]
        raise ValueError(f"A draw of a {kind} is no network with weights of its own: it has no plain copy.")
    if any(isinstance(module, FactorLinear) for module in posterior.model.modules()):
        raise ValueError("A draw of random factors (`parametrization='rank1'`) has no place in the plain layer.")


def _drawn(model: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """By the id of each Bayesian mean its value under the draw that is held."""
    for module in model.modules():
        if isinstance(module, BayesianModule):
            for name in module.specs:
                yield id(module.get_parameter(name)), module.variational(name).sample().detach()


def _with_own_storage(network: nn.Module) -> nn.Module:
    """Copies of all tensors, tied ones once."""
    copies: dict[int, Tensor] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in copies:
                copies[id(parameter)] = parameter
                parameter.data = parameter.data.clone()
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    return network
