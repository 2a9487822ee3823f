"""A weight that is read outside its layer's forward has a Jacobian that no record of calls holds: an error."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers import predict, to_bayesian
from bayeformers.laplace import fit
from bayeformers.linearized.soundness import read_outside

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Reads(nn.Module):
    """``b`` is called, and read beside it."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(4, 4), nn.Linear(4, 3), twice

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.a(input).tanh()
        return self.b(hidden) + (hidden @ self.b.weight.T if self.twice else 0)


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_found_by_the_graph(twice: bool, is_frozen: bool) -> None:
    net = Reads(twice).requires_grad_(not is_frozen)
    flags = [p.requires_grad for p in net.parameters()]
    assert read_outside(net, X, [net.a, net.b], lambda output: output) == [net.b] * twice
    assert [p.requires_grad for p in net.parameters()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_linearised_predictions_and_fits_refuse() -> None:
    """With a call alone, both work; with the reading, the variance would lack what the reading adds."""
    for twice in (False, True):
        model = to_bayesian(Reads(twice), delta=0.3).eval()
        if twice:
            with pytest.raises(ValueError, match=r"reads the weights of \['b'\].*method='sample'.*exclude_modules"):
                predict(model, X, method="glm", problem_type="single_label_classification")
            with pytest.raises(ValueError, match=r"reads the weights of \['b'\]"):
                fit(Reads(twice), [(X, Y)], progress=False)
            excluded = fit(Reads(twice), [(X, Y)], exclude_modules=["b"], progress=False)
            assert list(excluded.layers) == ["a"]
        else:
            predict(model, X, method="glm", problem_type="single_label_classification")
            fit(Reads(twice), [(X, Y)], progress=False)
    assert predict(model, X, problem_type="single_label_classification").probs.shape == (6, 3)


def test_a_state_space_layer() -> None:
    """Its step's projection is multiplied by hand: no call of the layer tells of it."""
    config = hf.JambaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, num_experts=2, pad_token_id=0,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_cache=False,
    )  # fmt: skip
    model = to_bayesian(hf.JambaForSequenceClassification(config), delta=0.3, target_modules=["dt_proj"]).eval()
    with pytest.raises(ValueError, match=r"dt_proj"):
        predict(model, {"input_ids": torch.tensor([[5, 6, 7]])}, method="glm")
