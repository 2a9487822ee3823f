"""FSDP2 (`torch.distributed.fsdp.fully_shard`) of a Bayesian model: groups of their own for scales.

A group of FSDP2's is gathered as a whole and in one dtype: that of its `MixedPrecisionPolicy`, which suits means and
not scales. torch has no public way to give some Parameters of a module another policy, so this file reads the state
that `fully_shard` keeps, and nothing else of the package does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base import BayesianModule, bayesian_modules, check_module, variational_tensors
from ..processes.dtensors import is_split, reshard, split_like

_KEPT = ("_prior_centre", "_prior_scale")


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to ``model``, or to a part of it."""
    check_module(model)
    return next(states(model), None) is not None


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module] | None = None,
    *,
    mesh: Any = None,
    mp_policy: Any = None,
    reshard_after_forward: bool | int | None = None,
    offload_policy: Any = None,
) -> nn.Module:
    """Apply `fully_shard` to the layers of a Bayesian model, then to itself, and :func:`separate_scales`.

    Args:
        model: converted, or to be converted later; each process has all of it.
        layers: the modules that are gathered one at a time; None: of a transformers model the blocks that its class
            names in ``_no_split_modules``.
        mesh: as of `fully_shard`; None: all processes.
        mp_policy: as of `fully_shard`, for all but the scales, which stay in float32.
        reshard_after_forward: as of `fully_shard`.
        offload_policy: as of `fully_shard`.

    Returns:
        The same object.

    Raises:
        ValueError: ``model`` is sharded already.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if is_sharded(model):
        raise ValueError(f"`model` ({type(model).__name__}) is sharded already: call `separate_scales(model)` only.")
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy() if mp_policy is None else mp_policy,
        "offload_policy": OffloadPolicy() if offload_policy is None else offload_policy,
        "reshard_after_forward": reshard_after_forward,
    }
    for layer in blocks(model) if layers is None else layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    if hasattr(model, "peft_config") and hasattr(model, "generate"):  # it calls the model inside, not itself
        register_fsdp_forward_method(model, "generate")
    return separate_scales(model)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of the classes that a transformers model names in ``_no_split_modules``; none of another model."""
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in named]


@torch.no_grad()
def separate_scales(model: nn.Module) -> nn.Module:
    """After `fully_shard`: the scales of ``model`` stay float32 whatever the policy, and priors are split as means are.

    Where the group of a scale casts, or reduces, in another dtype than float32, its scales get a group of their own; it
    costs one more message per module and direction. Trained weights that a prior keeps beside means that train are
    split like these. Harmless where there is nothing to do; `BayesianTrainer` calls it.

    Returns:
        The same object.
    """
    check_module(model)
    reshard(model)
    scales = {id(tensor.rho) for tensor in variational_tensors(model)}
    for state in states(model):
        for group in list(state._fsdp_param_groups):
            if _casts(group):
                _separate(state, group, [p for p in group.fsdp_params if id(p.sharded_param) in scales])
    for layer in bayesian_modules(model).values():
        _split_priors(layer)
    return model


def _casts(group: Any) -> bool:
    """Whether a group gathers or reduces in another dtype than float32, or keeps means in one."""
    kept = {p.sharded_param.dtype for p in group.fsdp_params}
    wanted = {group.mp_policy.param_dtype, group.mp_policy.reduce_dtype} - {None}
    return bool((kept | wanted) - {torch.float32})


def _separate(state: Any, group: Any, own: list[Any]) -> None:
    if own and not (group.mp_policy.param_dtype is None and len(own) == len(group.fsdp_params)):
        group.fsdp_params = [p for p in group.fsdp_params if all(p is not one for one in own)]
        add_group(state, group, moved=own)


def add_group(state: Any, like: Any, parameters: Iterable[nn.Parameter] = (), moved: Iterable[Any] = ()) -> None:
    """Give a state a further group, which is gathered and reduced in float32.

    Args:
        state: FSDP2's, of some module.
        like: one of its groups, whose modules, processes and offloading the new one has.
        parameters: whole plain Parameters of these modules, which it splits.
        moved: what another group had of Parameters that are split already.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    added = FSDPParamGroup(
        list(parameters), like.modules, like.mesh_info, like.post_forward_mesh_info, like.device, None, policy,
        like.offload_policy,
    )  # fmt: skip
    added.fsdp_params += moved
    for name in ("reduce_grads", "all_reduce_grads", "reshard_after_backward", "gradient_divide_factor"):
        setattr(added, name, getattr(like, name))
    for name in ("reduce_scatter_unused_params", "force_sum_reduction_for_comms", "unshard_async_op"):
        setattr(added, name, getattr(like, name))
    state._fsdp_param_groups.append(added)
    _begin(state, added)


def drop_removed(model: nn.Module) -> None:
    """Forget Parameters that are gone from their modules, which FSDP2 would put back."""
    for state in states(model):
        for group in state._fsdp_param_groups:
            group.fsdp_params = [
                p for p in group.fsdp_params if p._module_info.param_name in p._module_info.module._parameters
            ]
        state._fsdp_param_groups[:] = [group for group in state._fsdp_param_groups if group.fsdp_params]


def _begin(state: Any, group: Any) -> None:
    """Where a forward has run already, FSDP2 has prepared its groups: this one as well."""
    if state._is_root is None:
        return
    if state._is_root and state._auto_reshard_after_forward:
        group.post_forward_mesh_info = None
    number = len(state._fsdp_param_groups)
    for index, one in enumerate(state._fsdp_param_groups):
        one.comm_ctx, one._param_group_index, one._num_param_groups = state._comm_ctx, index, number
    group.lazy_init()


def _split_priors(layer: BayesianModule) -> None:
    """What a prior keeps of a tensor is as large as it: hold the own part of it alone."""
    for name in layer.specs:
        mean = layer.get_parameter(name)
        for ending in _KEPT:
            kept = layer._buffers.get(f"{name}{ending}")
            if kept is not None and is_split(mean) and not is_split(kept):
                layer._buffers[f"{name}{ending}"] = _copied(kept, mean)


def _copied(value: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    split: Any = split_like(value, like)
    local = split.to_local().clone()  # else a view keeps the whole alive
    copy: Tensor = DTensor.from_local(
        local, split.device_mesh, split.placements, run_check=False, shape=split.shape, stride=split.stride()
    )
    return copy


def states(model: nn.Module) -> Iterator[Any]:
    """What `fully_shard` keeps of each module that it was called on, or of each list of them."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    seen = set()
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            state = part._get_fsdp_state()
            if id(state) not in seen:
                seen.add(id(state))
                yield state
