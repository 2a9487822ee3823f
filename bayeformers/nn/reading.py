"""Random tensors where they are read: an attribute of a Bayesian layer is its value under the draw that is active.

A layer's own forward takes the draw through an estimator. But its weight may also be read from outside, by code that
multiplies it itself: the slow path of a state-space layer, a position table that is interpolated, an adapter that adds
B A to another weight. So each random tensor is a property of the layer's class; `nn.Module` keeps the Parameter, the
posterior mean, in ``_parameters``, where optimizers, checkpoints and `named_parameters` find it.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..processes.dtensors import is_split

MEAN: Final = "mean"
_DESCRIPTIONS = frozenset(("dtype", "device", "shape", "ndim", "layout", "is_meta", "requires_grad"))
_PARAMETRIZE = "torch.nn.utils.parametrize"
_ENGINES = ("torch.distributed.", "deepspeed.")  # FSDP2 looks its Parameters up when the first forward begins
_TUNERS, _MERGES = "peft.tuners.", ("merge", "unmerge")
_REPLACED = (
    "{!r} is no longer a Parameter of its layer: pruning, weight norm, `target_parameters` of PEFT or another "
    "parametrization replaced it after the conversion, so that its draws would be lost. Undo that, or apply it before "
    "`to_bayesian`."
)
_DRAWN_MERGE = (
    "`{}` of an adapter while {!r} is drawn: it would change the draw, which is a copy, and not the weight. Call it "
    "outside of `fixed_draw` and of the forward."
)
_GET_PARAMETER = nn.Module.get_parameter.__code__
_LOADS = ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_FAST", "LOAD_DEREF", "LOAD_NAME")


def replaced(name: str) -> str:
    """What is wrong with a Bayesian tensor that is no Parameter any more."""
    return _REPLACED.format(name)


def unfit(name: str, loc: Tensor, rho: Tensor) -> str:
    """Return why a tensor cannot be drawn.

    Args:
        name: the tensor's, in the model.
        loc: its means, as the forward finds them.
        rho: its scales before softplus, likewise.
    """
    if is_split(loc) or is_split(rho):
        return (
            f"{name!r} is split among processes inside the forward. Tensor and context parallelism (`tp_plan`, "
            "`parallelize_module`) cannot draw weights: shard the model by FSDP2 instead, `fully_shard` of its layers "
            "and of itself, and call it as a whole."
        )
    if loc.shape != rho.shape:
        return (
            f"{name!r} has shape {tuple(loc.shape)} but its scale {tuple(rho.shape)}: the layer was resized "
            "after conversion. Call `to_deterministic(model)`, resize, then `to_bayesian` again."
        )
    return (
        f"The scale of {name!r} is {rho.dtype} in the forward, in which small steps are lost: a "
        "`MixedPrecisionPolicy` casts it along with the means. Call `bayeformers.sharding.separate_scales(model)` "
        "after `fully_shard`, which keeps scales in float32."
    )


def read(self: Any, name: str) -> Any:
    """What the attribute ``name`` of a Bayesian layer is at present: its value under a draw, or the Parameter."""
    if name not in self._parameters:
        if name in self.__dict__:  # None of an instance that has no such tensor
            return self.__dict__[name]
        raise AttributeError(name)  # `nn.Module.__getattr__` has the words for it
    parameter = self._parameters[name]
    is_random = name in self.__dict__.get("specs", ())  # without them it is half way through a conversion
    if parameter is None or parameter.is_meta or not is_random or not self.is_random:
        return parameter
    if self.draw is None and not self.scope.is_running:
        return parameter
    if not torch.compiler.is_compiling() and _takes_parameter(sys._getframe(1), self, self.specs[name].name):
        return parameter
    try:
        return self._value(name)
    except AttributeError as error:  # a property that raises it would silently become `_parameters[name]`
        raise RuntimeError(f"`{name}` of {type(self).__name__} could not be drawn.") from error


def write(self: Any, value: object, name: str) -> None:
    """Set an attribute that is no Parameter: those `nn.Module` keeps.

    Raises:
        RuntimeError: it replaces a random tensor.
    """
    if name in self.__dict__.get("specs", ()):
        raise RuntimeError(replaced(self.specs[name].name))
    self.__dict__[name] = value


def _takes_parameter(reader: types.FrameType, layer: nn.Module, name: str) -> bool:
    """Return whether the code that reads a tensor of ``layer``, called ``name``, is content with the Parameter.

    Raises:
        RuntimeError: it would keep the draw in the place of the Parameter, or change the draw instead of the weight.
    """
    code, module = reader.f_code, reader.f_globals.get("__name__", "")
    if module == _PARAMETRIZE and reader.f_locals.get("self") is not layer:
        raise RuntimeError(replaced(name))
    if code.co_name in _MERGES and module.startswith(_TUNERS):
        raise RuntimeError(_DRAWN_MERGE.format(code.co_name, name))
    return code is _GET_PARAMETER or module.startswith(_ENGINES) or only_describes(reader)


def only_describes(frame: types.FrameType) -> bool:
    """Return whether the code that reads an attribute asks for its dtype, device or shape, its type, or for None.

    Mean and draw have them in common, and to draw a weight in order to ask for its dtype, as T5 does, costs as much as
    to use it. What is not recognised is drawn.
    """
    return frame.f_lasti in _describing_reads(frame.f_code)


@functools.lru_cache(4096)
def _describing_reads(code: types.CodeType) -> frozenset[int]:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG")]
    return frozenset(
        step.offset for number, step in enumerate(steps) if step.opname == "LOAD_ATTR" and _describes(steps, number)
    )


def _describes(steps: list[dis.Instruction], number: int) -> bool:
    after = steps[number + 1 :]
    if not after:
        return False
    if after[0].opname == "LOAD_ATTR":
        return after[0].argval in _DESCRIPTIONS
    if "IF_NONE" in after[0].opname or "IF_NOT_NONE" in after[0].opname:
        return True
    return _is_first_of_isinstance(steps, number)


def _is_first_of_isinstance(steps: list[dis.Instruction], number: int) -> bool:
    """``isinstance(self.layer.weight, torch.Tensor)``: loads of names lie between the reading and the call."""
    call = next((step for step in steps[number + 1 :] if step.opname not in _LOADS), None)
    if call is None or call.opname != "CALL" or call.arg != 2:
        return False
    before = next((step for step in reversed(steps[:number]) if step.opname != "LOAD_ATTR"), None)
    if before is None or before.opname not in _LOADS:
        return False
    position = steps.index(before)
    names = [step.argval for step in steps[max(position - 2, 0) : position + 1] if step.opname == "LOAD_GLOBAL"]
    return "isinstance" in names
