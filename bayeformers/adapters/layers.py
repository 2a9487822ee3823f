"""The LoRA matrices of a PEFT model's active adapters: where the posteriors of this room live.

Nothing of PEFT is imported: a model has its layers only where somebody else did.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..linearized import rule_of
from ..nn.base import is_bayesian

logger = logging.getLogger(__name__)

__all__ = ["LoraPair", "lora_pairs", "plain_lora_pairs"]


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The two matrices of one adapted layer, whose weight is W0 + s B A.

    Attributes:
        name: of the adapted layer in the model.
        adapter: which of the layer's adapters.
        down: A, a Linear of weight (r, d_in).
        up: B, a Linear of weight (d_out, r).
        scaling: s.
    """

    name: str
    adapter: str
    down: nn.Linear
    up: nn.Linear
    scaling: float

    @property
    def down_name(self) -> str:
        """The name of A in the model."""
        return f"{self.name}.lora_A.{self.adapter}".lstrip(".")

    def delta(self) -> Tensor:
        """The change s B A of the layer's weight, (d_out, d_in)."""
        return self.scaling * self.up.weight.detach() @ self.down.weight.detach()


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """Return the matrices of the active LoRA adapters of linear layers, in the model's order.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has none, they are switched off, or one is merged into the weights beside it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    kind = getattr(sys.modules.get("peft.tuners.lora.layer"), "LoraLayer", None)
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if kind is not None and isinstance(module, kind)
    ]
    if off := next((name for name, layer in layers if layer.disable_adapters), None):
        raise ValueError(f"`model` has its adapters switched off (in {off!r}): switch them on, for draws change them.")
    if merged := next((name for name, layer in layers if layer.merged), None):
        raise ValueError(
            f"`model` has the adapter of {merged!r} merged into the weights beside it, where its draws would have no "
            "effect: call `model.unmerge_adapter()` first."
        )
    found = [
        LoraPair(name, adapter, layer.lora_A[adapter], layer.lora_B[adapter], float(layer.scaling[adapter]))
        for name, layer in layers
        for adapter in layer.active_adapters
        if adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)
    ]
    if not found:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no active LoRA adapter of linear layers: make one by "
            "`peft.get_peft_model(model, peft.LoraConfig(...))`."
        )
    _tell_of_others(layers, found)
    return found


def _tell_of_others(layers: list[tuple[str, Any]], found: list[LoraPair]) -> None:
    """A posterior of some of an adapter's matrices must not pass for one of all."""
    known = {(pair.name, pair.adapter) for pair in found}
    others = [
        name
        for name, layer in layers
        for adapter in layer.active_adapters
        if (adapter in layer.lora_A or adapter in layer.lora_embedding_A) and (name, adapter) not in known
    ]
    if others:
        logger.warning(
            "%s (%d) have LoRA matrices of convolutions or embeddings: they stay deterministic, for this posterior is "
            "of linear layers alone. `to_bayesian(model)` makes them Bayesian too.",
            others[:3],
            len(others),
        )


def plain_lora_pairs(model: nn.Module) -> list[LoraPair]:
    """Return the same of a trained adapter that is not Bayesian, for a posterior around its weights.

    Raises:
        ValueError: as `lora_pairs`, or the model is Bayesian already, a layer of A has a forward of its own, or A holds
            the matrices of several experts.
    """
    pairs = lora_pairs(model)
    if is_bayesian(model):
        raise ValueError("`model` is Bayesian already: call `to_deterministic(model)` first.")
    if odd := next((pair.down_name for pair in pairs if rule_of(pair.down) is None), None):
        raise ValueError(f"`model` has in {odd!r} no plain torch.nn.Linear, whose draws would be those of its weight.")
    if stacked := next((pair for pair in pairs if _is_stacked(model, pair)), None):
        raise ValueError(
            f"`model` has in {stacked.name!r} the A and B of several experts in one matrix each (`target_parameters`), "
            "whose product is not the weight's change: use `to_bayesian(model)`, or leave it out of the adapter."
        )
    return pairs


def _is_stacked(model: nn.Module, pair: LoraPair) -> bool:
    """Whether A and B hold more ranks than the adapter has: one set for every expert."""
    ranks: Any = model.get_submodule(pair.name).r
    return pair.adapter in ranks and pair.down.weight.shape[0] != ranks[pair.adapter]
