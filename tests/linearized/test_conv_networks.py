"""The linearised predictive of Bayesian convolutions, against a Jacobian over all weights at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from bayeformers import to_bayesian
from bayeformers.posteriors import VariationalPosterior
from tests.reference import sigma


def flat_network() -> nn.Module:
    """Convolutions of one and of two axes, strided, grouped and padded by reflection, up and down again."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular"),
        nn.Tanh(),
        nn.ConvTranspose1d(4, 2, 2, stride=2, groups=2),
        nn.Tanh(),
        nn.Unflatten(2, (2, 4)),
        nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="reflect", bias=False),
        nn.Tanh(),
        nn.ConvTranspose2d(3, 2, (1, 2), stride=(1, 2), padding=(0, 1), output_padding=(0, 1)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(28, 3),
    )


def solid_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 2, (1, 2, 2), padding=(0, 1, 0), padding_mode="replicate"),
        nn.Tanh(),
        nn.ConvTranspose3d(2, 2, (2, 1, 2), dilation=(2, 1, 1), groups=2),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


@pytest.mark.parametrize(("build", "shape"), [(flat_network, (2, 8)), (solid_network, (1, 2, 2, 3))])
def test_covariance_is_dense(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    """S = J diag(sigma^2) J^T, with J of every weight of the network from `torch.func`, in float64."""
    torch.manual_seed(0)
    original = build().double()
    weights = {name: parameter.detach() for name, parameter in original.named_parameters()}
    x = torch.randn(3, *shape, dtype=torch.float64)
    model = to_bayesian(build(), delta=0.3).double()
    model.load_state_dict({**model.state_dict(), **weights})
    mean, covariance = VariationalPosterior(model.eval()).linearize(x)

    def logits(given: dict[str, Tensor]) -> Tensor:
        output: Tensor = functional_call(original, given, x)
        return output

    rows = jacrev(logits)(weights)
    scales = {name: sigma(model.get_parameter(f"{name}_rho")) for name in weights}
    jacobian = torch.cat([(rows[name] * scales[name]).flatten(2) for name in weights], dim=2)
    torch.testing.assert_close(mean, original(x))
    torch.testing.assert_close(covariance, jacobian @ jacobian.mT, rtol=1e-6, atol=1e-12)
