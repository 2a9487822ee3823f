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
from typing import Any, ClassVar, Final, cast

import torch
from torch import Tensor, nn

from .variational import TensorSpec, Variational

MEAN: Final = "mean"
_DESCRIPTIONS = frozenset(("dtype", "device", "shape", "ndim", "layout", "is_meta", "requires_grad"))
_PARAMETRIZE = "torch.nn.utils.parametrize"
_TUNERS, _MERGES = "peft.tuners.", ("merge", "unmerge")
_DRAWN_MERGE = (
    "`{}` of an adapter while {!r} is drawn: it would change the draw, which is a copy, and not the weight. Call it "
    "outside of `fixed_draw` and of the forward."
)
_GET_PARAMETER = nn.Module.get_parameter.__code__
_LOADS = ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_FAST", "LOAD_DEREF", "LOAD_NAME")


class DrawnWhereRead(nn.Module):
    """Mixin: reading one of ``bayesian_parameters`` gives its value under the active draw.

    That is the held draw, or the training draw while the model runs forward in `train()`, also when a part of it is
    recomputed in backward; otherwise the Parameter, which is the mean. Noise enters a reading by plain sampling
    whatever the estimator: one draw for the whole batch.
    """

    bayesian_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    draw: Any
    specs: dict[str, TensorSpec]
    scope: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "torch_class" not in vars(cls):  # a mixin: what it is mixed into may have such an attribute of another kind
            return
        for name in cls.bayesian_parameters:
            if name not in vars(cls):
                read, write = functools.partial(_read, name=name), functools.partial(_write, name=name)
                setattr(cls, name, property(read, write))

    def get_parameter(self, target: str) -> nn.Parameter:
        """The Parameter, which is the mean, under a draw too."""
        own = self._parameters.get(target)
        return super().get_parameter(target) if own is None else own

    def variational(self, name: str) -> Variational:
        """The tensor ``name`` with its active draw."""
        raise NotImplementedError

    def _mean_of(self, name: str) -> Tensor:
        """The Parameter, or what `torch.func.functional_call` has put in its place.

        Raises:
            RuntimeError: something else computes the tensor since the conversion.
        """
        value = self._parameters.get(name)
        if value is None:
            raise RuntimeError(replaced(self.specs[name].name))
        return value

    def _value(self, name: str) -> Tensor:
        """The tensor under the draw; a copy, so that who edits it in place leaves the draw alone."""
        return self.variational(name).sample().clone()

    @property
    def _is_drawing(self) -> bool:
        if "specs" not in self.__dict__:  # half way through a conversion
            return False
        return bool(self.training and self.scope.is_running) if self.draw is None else self.draw is not MEAN


def replaced(name: str) -> str:
    """What is wrong with a Bayesian tensor that is no Parameter any more."""
    return (
        f"{name!r} is no longer a Parameter of its layer: pruning, weight norm, `target_parameters` of PEFT or another "
        "parametrization replaced it after the conversion, so that its draws would be lost. Undo that, or apply it "
        "before `to_bayesian`."
    )


def _read(self: DrawnWhereRead, name: str) -> Tensor | None:
    """What the attribute ``name`` is at present."""
    if name not in self._parameters:
        if name in self.__dict__:  # None of an instance that has no such tensor
            return cast("Tensor | None", self.__dict__[name])
        raise AttributeError(name)  # `nn.Module.__getattr__` has the words for it
    parameter = self._parameters[name]
    if parameter is None or parameter.is_meta or not self._is_drawing or name not in self.specs:
        return parameter
    if not torch.compiler.is_compiling():
        reader = sys._getframe(1)
        parametrizes = reader.f_globals.get("__name__") == _PARAMETRIZE and reader.f_locals.get("self") is not self
        if parametrizes:  # it would keep the draw in the place of the Parameter
            raise RuntimeError(replaced(self.specs[name].name))
        if reader.f_code.co_name in _MERGES and reader.f_globals.get("__name__", "").startswith(_TUNERS):
            raise RuntimeError(_DRAWN_MERGE.format(reader.f_code.co_name, self.specs[name].name))
        if reader.f_code is _GET_PARAMETER or only_describes(reader):
            return parameter
    try:
        return self._value(name)
    except AttributeError as error:  # a property that raises it would silently become `_parameters[name]`
        raise RuntimeError(f"`{name}` of {type(self).__name__} could not be drawn.") from error


def _write(self: DrawnWhereRead, value: object, name: str) -> None:
    """Only what is no Parameter arrives here: `nn.Module` keeps those."""
    spec = self.__dict__.get("specs", {}).get(name)
    if spec is not None:
        raise RuntimeError(replaced(spec.name))
    self.__dict__[name] = value


def only_describes(frame: types.FrameType) -> bool:
    """Whether the code that reads an attribute just now asks for its dtype, device or shape, its type, or for None.

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
