"""The modules of a model, in torch's order, without torch's generator for every level: a training step walks often."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["named_modules"]


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()``: each module once, under its first name, before those inside it.

    Yields:
        Name and module.

    >>> inner = nn.Linear(1, 1)
    >>> [name for name, _ in named_modules(nn.Sequential(inner, nn.Sequential(nn.Tanh()), inner))]
    ['', '0', '1', '1.0']
    """
    seen: set[int] = set()
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        name, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        inside = [
            (f"{name}.{key}" if name else key, child) for key, child in module._modules.items() if child is not None
        ]
        ahead += reversed(inside)
