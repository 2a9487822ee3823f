"""IVON: a Gaussian posterior at the cost of Adam (Shen et al. 2024, arXiv 2402.17641, Algorithm 1)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from ..checks import check_count
from ..processes import gathered, num_processes
from ..sampling.generators import NOISE_VERSION, check_noise_version
from .ivon_step import Step, Sums, check_options, draw, normal, parts, scales, step_of, update

__all__ = ["IVON"]

_NOISE = "noise"  # the state of the draws in a `state_dict`
_TENSORS = ("mean", "momentum", "hessian")


class IVON(torch.optim.Optimizer):
    """Trains the mean m and a Hessian's estimate h of the posterior N(m, 1 / (ess (h + weight_decay))).

    It maximises the ELBO of ``ess`` times the mean loss under the prior N(0, 1 / (ess weight_decay)). Every gradient is
    taken at a draw, inside `sampled_params`; outside of it the parameters are the mean::

        optimizer = IVON(model.parameters(), lr=0.1, ess=len(data))
        for batch in batches:
            for _ in range(mc_samples):
                with optimizer.sampled_params():
                    optimizer.zero_grad()
                    loss(model, batch).backward()          # the mean loss of the batch
            optimizer.step()

    Gradients are summed as torch sums them. So micro-batches that share an update, with losses that add up to the mean
    loss, may lie in one draw or have one each; the sums are divided by ``mc_samples``, the draws of each batch. A draw
    begins without gradients. `zero_grad` outside of a draw forgets the draws since the last step.

    In several processes all draw the same noise, so that the average of their gradients is that of one process with all
    the data, and so is its product with the noise. Every draw has to end with gradients that are averaged over the
    processes: under `DistributedDataParallel.no_sync` let one draw span all micro-batches of a step. State is float32
    (or float64) whatever the parameters are; of parameters in 16 bits it also keeps the mean.

    Args:
        params: parameters, or groups of them with their own ``lr``, ``ess``, ... Only those that require a gradient
            have a posterior and move.
        lr: alpha; see ``rescale_lr``.
        ess: lambda, the effective sample size: the number of training items N; more makes a colder posterior. None: it
            is set before the first draw, as `BayesianTrainer` does.
        hess_init: h_0 > 0.
        beta1: of the gradient's average.
        beta2: of the Hessian's average.
        weight_decay: delta >= 0.
        mc_samples: draws per batch, >= 1.
        rescale_lr: multiply lr by (hess_init + weight_decay), so that the first steps are of the size lr * gradient.
        clip_radius: xi > 0: no coordinate of the preconditioned gradient exceeds it; infinite: none is cut.
        seed: of the noise, which is a function of it and of the number of draws before.

    Raises:
        TypeError: parameters that are complex, sharded or no floating-point tensors.
        ValueError: a number that is not allowed.

    >>> weight = nn.Parameter(torch.ones(3))
    >>> optimizer = IVON([weight], lr=0.1, ess=100, hess_init=1.0)
    >>> with optimizer.sampled_params():
    ...     weight.square().sum().backward()
    >>> optimizer.step()
    >>> optimizer.scales()[weight].shape
    torch.Size([3])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        ess: float | None = None,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        rescale_lr: bool = True,
        clip_radius: float = math.inf,
        seed: int = 0,
    ) -> None:
        check_count("mc_samples", mc_samples, 1)
        check_count("seed", seed, 0)
        self.mc_samples, self.seed, self.noise_version = int(mc_samples), int(seed), NOISE_VERSION
        self._draws, self._sums = 0, Sums()
        self._kept: dict[nn.Parameter, Tensor] | None = None  # the means, while a draw stands in their place
        super().__init__(
            params,
            {
                "lr": lr,
                "ess": ess,
                "hess_init": hess_init,
                "beta1": beta1,
                "beta2": beta2,
                "weight_decay": weight_decay,
                "rescale_lr": rescale_lr,
                "clip_radius": clip_radius,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own or those of the constructor.

        Raises:
            TypeError: parameters that are complex, sharded or no floating-point tensors.
            ValueError: an option that is not allowed.
            RuntimeError: inside of a draw.
        """
        self._check_at_mean("add_param_group")
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if not parameter.is_floating_point() or isinstance(parameter, DTensor):
                del self.param_groups[-1]
                kind = "a sharded parameter" if isinstance(parameter, DTensor) else f"one of {parameter.dtype}"
                raise TypeError(f"`params` must be floating-point tensors that are whole in each process, got {kind}.")

    # -- draws -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def sampled_params(self, train: bool = True) -> Iterator[None]:
        """The parameters at a draw, until exit; then they are the mean again, bit by bit.

        Args:
            train: whether the gradients that are computed inside are those of the next step. False: for a prediction;
                gradients, and the noise of training, stay as they are.

        Raises:
            TypeError: ``train`` is no bool.
            ValueError: a group's ``ess`` is not known.
            RuntimeError: inside of another draw, or gradients that are sparse.
        """
        if not isinstance(train, bool):
            raise TypeError(f"`train` must be True or False, got {train!r}.")
        self.enter_draw(train)
        try:
            yield
        except BaseException:
            self.leave_draw(keeps=False)
            raise
        self.leave_draw(keeps=train)

    @torch.no_grad()
    def enter_draw(self, train: bool = True) -> None:
        """Begin what `sampled_params` does, for a loop whose draws end elsewhere; `leave_draw` ends it.

        Args:
            train: whether the gradients are those of the next step.

        Raises:
            ValueError: a group's ``ess`` is not known.
            RuntimeError: inside of another draw.
        """
        self._check_at_mean("sampled_params")
        steps = [step_of(group) for group in self.param_groups]
        self._noise = self._drawn_noise("training" if train else "prediction", self._draws)
        self._draws += train
        if train and self._sums.count == 1:  # DDP may use the memory of the gradients again
            self._sums.gradients = {p: gradient.clone() for p, gradient in self._sums.gradients.items()}
        self._kept = {p: self._taken_mean(p) for members in self._members() for p in members}
        try:
            for step, members in zip(steps, self._members(), strict=True):
                self._place(step, members)
        except BaseException:
            self.leave_draw(keeps=False)
            raise
        for parameter in self._kept if train else ():
            parameter.grad = None

    def _place(self, step: Step, members: list[nn.Parameter]) -> None:
        """A draw in the place of the means that are kept."""
        assert self._kept is not None
        aligned = [(self._kept[p], self.state[p]["hessian"], self._noise[p], p.detach()) for p in members]
        for means, hessians, noises, values in parts(aligned):
            torch._foreach_copy_(values, draw(means, hessians, noises, step))

    @torch.no_grad()
    def leave_draw(self, keeps: bool = True) -> None:
        """End a draw: the parameters are the mean again; nothing if there is no draw.

        Args:
            keeps: whether the gradients count for the next step.

        Raises:
            RuntimeError: gradients that are sparse.
        """
        if self._kept is None:
            return
        kept, noise, self._kept = self._kept, self._noise, None
        for parameter, mean in kept.items():
            parameter.copy_(mean)
        torch.clear_autocast_cache()  # which keeps low-precision copies of what it has seen
        del self._noise
        if not keeps:
            return
        self._sums.count += 1
        for parameter, eps in noise.items():
            if parameter.grad is not None:
                self._add(parameter, parameter.grad, eps)

    def _add(self, parameter: nn.Parameter, gradient: Tensor, noise: Tensor) -> None:
        """One draw's gradient to the sums; it stands in ``grad``, for clipping to see. The noise's memory is used."""
        if gradient.is_sparse:
            raise RuntimeError("IVON takes no sparse gradients: use `nn.Embedding(sparse=False)`.")
        if self.mc_samples > 1:
            gradient.div_(self.mc_samples)
        product = noise.mul_(gradient)
        if parameter in self._sums.gradients:
            self._sums.products[parameter].add_(product)
            parameter.grad = self._sums.gradients[parameter].add_(gradient)
        else:
            self._sums.products[parameter], self._sums.gradients[parameter] = product, gradient

    def _taken_mean(self, parameter: nn.Parameter) -> Tensor:
        """The mean while a draw stands in the parameter: a copy, or the state's own of parameters in 16 bits."""
        own: Tensor | None = self._state_of(parameter).get("mean")
        if own is None:
            return parameter.detach().clone()
        if not torch.equal(own.to(parameter.dtype), parameter):  # such as weights that were loaded
            own.copy_(parameter)
        return own

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            if dtype != parameter.dtype:
                state["mean"] = parameter.detach().to(dtype)
            state["momentum"] = torch.zeros_like(parameter, dtype=dtype)
            state["hessian"] = torch.full_like(parameter, group["hess_init"], dtype=dtype)
            state["step"] = 0
        return state

    def _members(self) -> list[list[nn.Parameter]]:
        """Of each group those parameters that have a posterior."""
        return [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]

    def _drawn_noise(self, kind: str, number: int) -> dict[nn.Parameter, Tensor]:
        """N(0, 1) for every parameter, as one stretch of random numbers per device and precision."""
        stretches: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for members in self._members():
            for parameter in members:
                dtype = self._state_of(parameter)["hessian"].dtype
                stretches.setdefault((parameter.device, dtype), []).append(parameter)
        noise: dict[nn.Parameter, Tensor] = {}
        for place, ((device, dtype), members) in enumerate(stretches.items()):
            name = f"{self.seed}/{number}/ivon/{kind}/{place}"
            pieces = normal(name, [p.shape for p in members], device, dtype, self.noise_version)
            noise |= zip(members, pieces, strict=True)
        return noise

    # -- steps -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the mean and the Hessian's estimate by the gradients of the draws since the last step.

        Args:
            closure: computes the loss and its gradients, and is called under ``mc_samples`` draws; None: the draws
                are those of `sampled_params`.

        Returns:
            The mean of the closure's losses, or None.

        Raises:
            RuntimeError: inside of a draw; gradients of no draw; draws that are no multiple of ``mc_samples``; or, in
                several processes, gradients that differ between them.
        """
        self._check_at_mean("step")
        loss = None if closure is None else self._run(closure)
        if not self._sums.count:
            if any(p.grad is not None for members in self._members() for p in members):
                raise RuntimeError("`step` found gradients of no draw: compute them in `sampled_params()`.")
            return loss
        self._check_sums()
        for group, members in zip(self.param_groups, self._members(), strict=True):
            self._step_group(step_of(group), [p for p in members if p.grad is not None and p in self._sums.products])
        self._sums = Sums()
        return loss

    def _run(self, closure: Callable[[], float]) -> float:
        losses = []
        for _ in range(self.mc_samples):
            with torch.enable_grad(), self.sampled_params():
                losses.append(float(closure()))
        return sum(losses) / len(losses)

    def _step_group(self, step: Step, members: list[nn.Parameter]) -> None:
        by_count: dict[int, list[nn.Parameter]] = {}
        for parameter in members:
            self.state[parameter]["step"] += 1
            by_count.setdefault(self.state[parameter]["step"], []).append(parameter)
        for count, group in by_count.items():
            aligned = []
            for parameter in group:
                state, gradient = self.state[parameter], parameter.grad
                assert gradient is not None  # of the members
                mean, product = state.get("mean", parameter.detach()), self._sums.products[parameter]
                aligned.append((mean, state["momentum"], state["hessian"], gradient.to(mean.dtype), product))
            for means, momenta, hessians, gradients, products in parts(aligned):
                update(means, momenta, hessians, gradients, products, step, count)
        for parameter in members:
            if "mean" in self.state[parameter]:
                parameter.copy_(self.state[parameter]["mean"])

    def _check_sums(self) -> None:
        if self._sums.count % self.mc_samples:
            raise RuntimeError(
                f"`step` after {self._sums.count} draws, which is no multiple of `mc_samples`={self.mc_samples}."
            )
        if self._sums.count > 1 and num_processes() > 1:
            norms = gathered([float(gradient.double().sum()) for gradient in self._sums.gradients.values()])
            if any(other != norms[0] for other in norms):
                raise RuntimeError(
                    "The gradients of the processes differ: every draw must end with averaged gradients. Under "
                    "`no_sync`, let one draw span all micro-batches of a step."
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; outside of a draw it also forgets the draws since the last step.

        Args:
            set_to_none: whether gradients become None, or zeros.
        """
        if self._kept is None:
            self._sums = Sums()
        super().zero_grad(set_to_none)

    # -- the posterior, and what is saved ------------------------------------------------------------------------------

    @torch.no_grad()
    def scales(self) -> dict[nn.Parameter, Tensor]:
        """Return the posterior's standard deviation of every parameter that requires a gradient, of its shape.

        Raises:
            ValueError: a group's ``ess`` is not known.
        """
        found: dict[nn.Parameter, Tensor] = {}
        for group, members in zip(self.param_groups, self._members(), strict=True):
            step = step_of(group)
            hessians = [self._state_of(parameter)["hessian"] for parameter in members]
            if members:
                found |= dict(zip(members, scales(hessians, step.ess, step.weight_decay), strict=True))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return all that a training needs to go on bit by bit, the noise's state included.

        Raises:
            RuntimeError: inside of a draw.
        """
        self._check_at_mean("state_dict")
        noise = {"seed": self.seed, "draws": self._draws, "version": self.noise_version}
        return {**super().state_dict(), _NOISE: noise}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; its tensors keep their precision.

        Raises:
            RuntimeError: inside of a draw.
            ValueError: the state of another optimizer, or of other parameters.
        """
        self._check_at_mean("load_state_dict")
        noise = state_dict.get(_NOISE)
        if not isinstance(noise, dict) or not {"seed", "draws", "version"} <= noise.keys():
            raise ValueError("`state_dict` is of another optimizer: it has no state of IVON's noise.")
        version = check_noise_version(noise["version"])
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, members, strict=True):
            saved = state_dict["state"].get(number, {})
            for name in _TENSORS:  # torch has rounded them to the parameter's precision
                if name in saved:
                    self.state[parameter][name] = saved[name].to(parameter.device, copy=True)
        self.seed, self._draws, self.noise_version = int(noise["seed"]), int(noise["draws"]), version
        self._sums = Sums()

    def __getstate__(self) -> dict[str, Any]:
        self._check_at_mean("pickle")
        own = ("mc_samples", "seed", "noise_version", "_draws")
        fresh = {"_kept": None, "_sums": Sums()}
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, **fresh}

    def _check_at_mean(self, what: str) -> None:
        if self._kept is not None:
            raise RuntimeError(f"`{what}` inside of a draw of IVON: leave `sampled_params` first.")
