"""Two habits of PEFT's DoRA that matter to draws and to gradients: it may cache its norms, and it detaches them.

Nothing of PEFT is imported: a model has its layers only where somebody else did.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection

from torch import nn

logger = logging.getLogger(__name__)

__all__ = ["check_no_cached_norms", "tell_of_held_norms"]


def check_no_cached_norms(model: nn.Module) -> None:
    """Refuse to hold weights in a model with DoRA under `peft.helpers.DoraCaching` (peft 0.21).

    A layer then keeps the norm and the product B A of the first weights that it sees: other draws would have them too.

    Raises:
        RuntimeError: the caching is on, and the model has a DoRA layer.
    """
    dora = sys.modules.get("peft.tuners.lora.dora")
    if not getattr(dora, "ENABLE_DORA_CACHING", False):
        return
    kind = dora.DoraLinearLayer  # type: ignore[union-attr]
    if any(isinstance(module, kind) for module in model.modules()):
        raise RuntimeError(
            "`peft.helpers.DoraCaching` is on: this model's DoRA layers would keep the norms of the first draw in all "
            "others. Leave its `with`, or call `DoraCaching()(enabled=False)`."
        )


def tell_of_held_norms(model: nn.Module, modules: Collection[nn.Module]) -> None:
    """Warn where Jacobians in A or B of DoRA are asked for: PEFT takes none through the norm that it divides by.

    Args:
        model: that will be linearised.
        modules: the layers whose Jacobians are asked for.
    """
    kind = getattr(sys.modules.get("peft.tuners.lora.layer"), "LoraLayer", None)
    layers = [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]
    asked = set(modules)
    held = [layer for layer in layers if len(layer.lora_magnitude_vector) and not asked.isdisjoint(layer.modules())]
    if held:
        logger.warning(
            "%d DoRA layers: PEFT takes no gradient through the norm that they divide by, so a linearised prediction "
            "holds it fixed where draws do not. Its variances differ from theirs; `method='sample'` has no such gap.",
            len(held),
        )
