"""What training reports besides the loss: the ELBO's parts, how far scales moved, layers and steps without effect."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base import BayesianModule, variational_tensors
from ..nn.draws import bayesian_modules
from ..nn.variational import scale_of
from ..processes.dtensors import own_part, reshard

__all__ = [
    "SILENT_LAYERS",
    "CallWatch",
    "HeadRecord",
    "ScaleShift",
    "TrainingRecord",
    "lost_steps",
    "lost_steps_warning",
]

SAMPLED_PER_TENSOR = 4096
SILENT_LAYERS = (
    "{} Bayesian layers were neither called nor read in the first forward ({}): only the KL moves their scales. Name "
    "them in `exclude_modules` if the model never uses them."
)


class ScaleShift:
    """Median |log sigma now - log sigma at the start|, on at most about 4096 evenly spaced weights of each tensor.

    Of a sharded model on those that this process holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self._start = self._sample(model)

    @staticmethod
    @torch.no_grad()
    def _sample(model: nn.Module) -> Tensor:
        reshard(model)
        scales = []
        for tensor in variational_tensors(model):
            kept = slice(None, None, max(1, tensor.rho.numel() // SAMPLED_PER_TENSOR))
            loc, rho = own_part(tensor.loc).flatten()[kept], own_part(tensor.rho).flatten()[kept]
            scales.append(scale_of(loc, rho, tensor.floor).cpu())
        return torch.cat(scales).log()

    def median(self, model: nn.Module) -> float:
        """In units of log sigma. Near 0 after training, the scales have not been learned: see `rho_learning_rate`."""
        return float((self._sample(model) - self._start).abs().median())


class CallWatch:
    """Which of the given layers a forward calls, or reads; one counts with any other that shares its weight."""

    def __init__(self, layers: Mapping[str, BayesianModule]) -> None:
        self._layers = layers
        self._scopes = {id(layer.scope): layer.scope for layer in layers.values()}
        for scope in self._scopes.values():
            scope.drawn = set()
        self._called: set[str] = set()
        self._handles = [layer.register_forward_hook(self._note) for layer in layers.values()]

    def _note(self, layer: nn.Module, *_: object) -> None:
        self._called.update(_names(layer))

    def finish(self) -> list[str]:
        """Stop watching; the names of the layers that were not called."""
        for handle in self._handles:
            handle.remove()
        for scope in self._scopes.values():
            self._called |= scope.drawn or set()
            scope.drawn = None
        return [name for name, layer in self._layers.items() if not self._called & _names(layer)]


def _names(layer: Any) -> set[str]:
    """Of its random tensors: tied ones share theirs, and FSDP changes Parameters but no names."""
    return {spec.name for spec in layer.specs.values()}


class TrainingRecord:
    """One `train()` of a Bayesian model: its N, and what goes into the next log, summed on the device.

    Attributes:
        num_items: N.
        fits_noise: whether a regression's noise is estimated from the residual.
        starts_step: whether the next micro-batch is the first of its optimizer step.
    """

    def __init__(self, model: nn.Module, num_items: int, *, fits_noise: bool, watch_calls: bool) -> None:
        self.num_items, self.fits_noise, self.starts_step = num_items, fits_noise, False
        self._model, self._shift = model, ScaleShift(model)
        self._watch = CallWatch(bayesian_modules(model)) if watch_calls else None
        self._sums: Tensor | None = None
        self._steps = 0

    def start_step(self) -> None:
        """A new optimizer step begins."""
        self._steps += 1
        self.starts_step = True

    def add(
        self,
        nll: Tensor,
        kl: Tensor,
        log_posterior: Tensor | float,
        calibration: Tensor | float = 0.0,
        own_terms: Tensor | float = 0.0,
    ) -> None:
        """Add one micro-batch's share of its step, in nats.

        Args:
            nll: mean NLL.
            kl: KL divergence.
            log_posterior: E_q[log q], once per step.
            calibration: the calibration loss.
            own_terms: the model's own terms beside the likelihood.
        """
        values = (nll, kl, log_posterior, calibration, own_terms)
        share = torch.stack([torch.as_tensor(value, device=nll.device).detach().float() for value in values])
        self._sums = share if self._sums is None else self._sums + share
        self.starts_step = False

    def drain(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The log's entries: means per step since the last call, E_q[log p] = E_q[log q] - KL among them."""
        if self._sums is None:
            return {}
        nll, kl, log_posterior, calibration, own_terms = (mean_over_ranks(self._sums) / self._steps).tolist()
        self._sums, self._steps = None, 0
        return {
            "calibration_loss": calibration,
            "own_terms": own_terms,
            "nll": nll,
            "kl": kl,
            "log_prior": log_posterior - kl,
            "log_variational_posterior": log_posterior,
            "median_log_scale_change": self._shift.median(self._model),
        }

    def silent_layers(self) -> list[str]:
        """After the first forward, the Bayesian layers that it did not call; afterwards none."""
        silent = self._watch.finish() if self._watch is not None else []
        self._watch = None
        return silent


class HeadRecord:
    """One `train()` of a model with a VBLL or SNGP head, as `TrainingRecord` is of a Bayesian one.

    Attributes:
        num_items: N.
    """

    fits_noise = False
    starts_step = False

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self._sums: Tensor | None = None
        self._steps = 0

    def start_step(self) -> None:
        """A new optimizer step begins."""
        self._steps += 1

    def add(self, nll: Tensor, kl: Tensor, *others: object) -> None:
        """Add one micro-batch's share of its step, in nats.

        Args:
            nll: mean NLL, or its bound.
            kl: the head's penalty.
            *others: of a Bayesian model.
        """
        share = torch.stack([nll, kl.to(nll)]).detach().float()
        self._sums = share if self._sums is None else self._sums + share

    def drain(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The log's entries: means per step since the last call."""
        if self._sums is None:
            return {}
        nll, penalty = (mean_over_ranks(self._sums) / self._steps).tolist()
        self._sums, self._steps = None, 0
        return {"nll": nll, "penalty": penalty}

    def silent_layers(self) -> list[str]:
        """None: the head is what is called last."""
        return []


def lost_steps_warning(model: nn.Module, learning_rate: float) -> str | None:
    """What to say of :func:`lost_steps`; None where few are lost."""
    share, dtype = lost_steps(model, learning_rate)
    if share <= 0.05:
        return None
    return (
        f"The means are {dtype}, in which a step of `learning_rate`={learning_rate} leaves {share:.0%} of them where "
        "they are. Load the model with `dtype=torch.float32`; `bf16=True` computes in 16 bits all the same."
    )


@torch.no_grad()
def lost_steps(model: nn.Module, learning_rate: float) -> tuple[float, torch.dtype | None]:
    """Return the share of trainable 16-bit means that a step of ``learning_rate`` does not move, and their dtype.

    A number w = m 2^e, 1/2 <= m < 1, has neighbours 2^(e - 1) eps away: less than half of that rounds to w again.
    """
    means = [own_part(tensor.loc) for tensor in variational_tensors(model)]
    narrow = [mean for mean in means if mean.requires_grad and mean.dtype in (torch.bfloat16, torch.float16)]
    if not narrow:
        return 0.0, None
    lost = torch.cat([_is_lost(mean, learning_rate).cpu() for mean in narrow])
    return float(lost.float().mean()), narrow[0].dtype


def _is_lost(mean: Tensor, learning_rate: float) -> Tensor:
    sampled = mean.flatten()[:: max(1, mean.numel() // SAMPLED_PER_TENSOR)].float()
    exponent = torch.frexp(sampled).exponent
    half_spacing = torch.ldexp(torch.full_like(sampled, torch.finfo(mean.dtype).eps), exponent - 2)
    return (half_spacing > learning_rate) & (sampled != 0)
