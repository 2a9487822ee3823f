"""Stochastic gradient Hamiltonian Monte Carlo and Langevin dynamics (Chen et al. 2014; Welling & Teh 2011)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..sampling.generators import normal_of

__all__ = ["SGHMC"]

PriorMean = Literal["zero", "start"]


class SGHMC(torch.optim.Optimizer):
    r"""Steps through exp(-U(w) / T), U(w) = N \* mean loss + prior_precision / 2 ||w - w_0||^2.

    The gradient g is that of the *mean* loss over items, as `Trainer` computes it, so U'(w) / N = g + (prior_precision
    / N) (w - w_0). A step of rate lr and momentum 1 - alpha is (Chen et al. 2014, equation 15)

        v <- (1 - alpha) v - lr U'(w) / N + (2 alpha lr T / N)^1/2 xi,        w <- w + v,        xi ~ N(0, 1).

    With momentum 0 it is Langevin dynamics, of Welling & Teh's step size 2 lr / N. For the loss a w^2 / 2 without a
    prior and with exact gradients its stationary variance is T / (N a (1 - lr a / 2)): the posterior's 1 / (N a) as lr
    tends to 0. The noise of a minibatch's gradient adds to it, in proportion to lr.

    The noise is a function of the seed, the step and the Parameter's place alone: equal in all processes of a launch
    and for all batch sizes, and a resumed training draws what it would have drawn. State is in float32 or wider.

    Args:
        params: Parameters or groups of them, as of any optimizer, in float32 or float64.
        lr: learning rate, > 0, in the units of SGD on the mean loss.
        momentum: 1 - alpha, >= 0 and < 1; 0 is Langevin dynamics.
        temperature: T >= 0; 1 samples the posterior, 0 is SGD with momentum.
        num_data: N, how many items the mean loss stands for: examples, or tokens of a language model.
        prior_precision: of the Gaussian prior on every weight, >= 0; 0: none. Not to be combined with weight decay.
        prior_mean: "zero", or "start": w_0 are the weights at the first step, such as the pretrained ones.
        seed: of the noise, >= 0.

    Raises:
        ValueError: an argument is out of range, or a Parameter is of lower precision, where small steps are lost.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = SGHMC([weight], lr=0.1, momentum=0.0, temperature=0.0, num_data=100)
    >>> (weight - 1).square().sum().backward()
    >>> optimizer.step()
    >>> weight.item()
    0.20000000298023224
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        num_data: int,
        momentum: float = 0.9,
        temperature: float = 1.0,
        prior_precision: float = 0.0,
        prior_mean: PriorMean = "zero",
        seed: int = 0,
    ) -> None:
        check_count("seed", seed, 0)
        check_choice("prior_mean", prior_mean, ("zero", "start"))
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "temperature": temperature,
            "num_data": num_data,
            "prior_precision": prior_precision,
            "prior_mean": prior_mean,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer; a group may have values of its own for every argument.

        Raises:
            ValueError: one is out of range, or a Parameter is of lower precision.
        """
        group = {**self.defaults, **param_group}
        check_number("lr", group["lr"], 0, strict=True)
        check_number("momentum", group["momentum"], 0)
        if group["momentum"] >= 1:
            raise ValueError(f"`momentum` must be below 1, got {group['momentum']!r}: else there is no friction.")
        check_number("temperature", group["temperature"], 0)
        check_count("num_data", group["num_data"], 1)
        check_number("prior_precision", group["prior_precision"], 0)
        super().add_param_group(param_group)
        low = {str(p.dtype) for p in self.param_groups[-1]["params"] if p.dtype not in (torch.float32, torch.float64)}
        if low:
            self.param_groups.pop()
            raise ValueError(
                f"`params` must be float32 or float64, got {sorted(low)}: smaller steps than their precision are lost. "
                "Keep the weights in float32, and train with `bf16=True`."
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every Parameter that has a gradient; ``closure`` computes the loss anew and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._move(parameter, group, f"{number}/{place}")
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any], place: str) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if group["prior_mean"] == "start" and group["prior_precision"] > 0:
                state["prior_mean"] = parameter.detach().clone()
        gradient = parameter.grad
        assert gradient is not None  # else `step` leaves it out
        if group["prior_precision"] > 0:
            distance = parameter - state["prior_mean"] if "prior_mean" in state else parameter
            gradient = gradient.add(distance, alpha=group["prior_precision"] / group["num_data"])
        velocity: Tensor = state["momentum_buffer"]
        velocity.mul_(group["momentum"]).add_(gradient, alpha=-group["lr"])
        if group["temperature"] > 0:
            alpha = 1 - group["momentum"]
            std = math.sqrt(2 * alpha * group["lr"] * group["temperature"] / group["num_data"])
            key = f"{group['seed']}/{state['step']}/{place}"
            velocity.add_(normal_of(key, parameter.shape, parameter.device, parameter.dtype), alpha=std)
        parameter.add_(velocity)
        state["step"] += 1
