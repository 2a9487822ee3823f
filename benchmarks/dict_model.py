"""A transformers model as laplace-torch and curvlinops want it: one mapping in, logits out."""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel


class DictModel(nn.Module):
    """``forward(batch)`` gives the logits (B, C); labels inside the batch are left to the library."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
        logits: Tensor = self.model(**inputs).logits
        return logits
