"""AdaLoRA finds its matrices by a part of their names, and so takes the scales beside them for matrices too."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .surgery import swap_class


class _OfMeans:
    """Mixin over PEFT's `AdaLoraModel` after a conversion: its loss speaks of the means, and its ranks stay."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's: to the loss of the model inside it adds the mean of ||P P^T - I|| over the matrices P = A, B^T."""
        outputs = self.model.forward(*args, **kwargs)
        adapter = self.trainable_adapter_name
        if isinstance(getattr(outputs, "loss", None), Tensor) and adapter is not None:
            config = self.peft_config[adapter]
            own = f"lora_A.{adapter}", f"lora_B.{adapter}"
            terms = [_distance(name, p) for name, p in self.model.named_parameters() if name.endswith(own)]
            outputs.loss += config.orth_reg_weight * (sum(terms) / max(len(terms), 1))
        return outputs

    def update_and_allocate(self, global_step: int) -> None:
        """Refuse, whatever the step."""
        raise RuntimeError(
            "`update_and_allocate` of AdaLoRA would take the scales of a Bayesian adapter for its matrices, and set "
            "some of them to 0: allocate ranks before `to_bayesian`."
        )


def _distance(name: str, matrix: Tensor) -> Tensor:
    """Of the Gram matrix from the identity, by Frobenius' norm: a scalar."""
    gram = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
    norm: Tensor = torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype))
    return norm


def take_means(model: nn.Module) -> None:
    """Let the AdaLoRA models inside ``model`` go by the means of their matrices alone."""
    for module in list(model.modules()):
        if type(module).__name__ == "AdaLoraModel" and not isinstance(module, _OfMeans):
            swap_class(module, _class_of(type(module)))  # type: ignore[arg-type]


def take_all(model: nn.Module) -> None:
    """Undo :func:`take_means`."""
    for module in list(model.modules()):
        if isinstance(module, _OfMeans):
            swap_class(module, type(module).__mro__[2])


@functools.cache
def _class_of(source: type[nn.Module]) -> type[nn.Module]:
    return type(source.__name__, (_OfMeans, source), {"__module__": source.__module__, "__reduce_ex__": _reduce})


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the source class: the class itself is made on demand and has no importable name."""
    return _rebuild, (type(self).__mro__[2],), self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(source: type[nn.Module]) -> nn.Module:
    kind = _class_of(source)  # type: ignore[arg-type]
    return kind.__new__(kind)
