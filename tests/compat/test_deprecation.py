"""Each compatibility name warns once per place of use and says what to write instead; nothing depends on them."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bayeformers
from bayeformers.compat import bayeformers as older
from bayeformers.compat.bayesian_torch import layers
from bayeformers.compat.bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss
from bayeformers.compat.bayesian_torch.utils import avuc_loss, util
from bayeformers.compat.bayesian_torch.utils import uncertainty_calibration_loss as calibration
from bayeformers.compat.bayetorch import layers as bayetorch_layers
from bayeformers.compat.bayetorch.convert import init_bayesian_with_frequentist
from bayeformers.compat.bayetorch.metrics import ELBO, Uncertainty
from bayeformers.compat.bayetorch.models import BayesianModel

PARAMETERS = {
    "prior_mu": 0.0,
    "prior_sigma": 1.0,
    "posterior_mu_init": 0.0,
    "posterior_rho_init": -3.0,
    "type": "Reparameterization",
    "moped_enable": False,
    "moped_delta": 0.5,
}
PROBS = np.full((2, 3, 2), 0.5)


class Holder(BayesianModel):
    def __init__(self) -> None:
        super().__init__()
        self.fc = bayeformers.nn.Linear(2, 2)


def wrapped() -> older.Model:
    return older.Model(bayeformers.to_bayesian(nn.Linear(2, 2)))


USES: dict[str, Callable[[], Any]] = {
    "dnn_to_bnn": lambda: dnn_to_bnn(nn.Linear(2, 2), PARAMETERS),
    "get_kl_loss": lambda: get_kl_loss(bayeformers.nn.Linear(2, 2)),
    "predictive_entropy": lambda: util.predictive_entropy(PROBS),
    "mutual_information": lambda: util.mutual_information(PROBS),
    "get_rho": lambda: util.get_rho(torch.ones(2), 0.1),
    "avuc_loss.AvULoss": lambda: avuc_loss.AvULoss(),
    "AUAvULoss": lambda: avuc_loss.AUAvULoss(),
    "uncertainty_calibration_loss.AvULoss": lambda: calibration.AvULoss(),
    "EaULoss": lambda: calibration.EaULoss(),
    "EaCLoss": lambda: calibration.EaCLoss(),
    "BayesianLinear": lambda: bayetorch_layers.BayesianLinear(2, 2),
    "BayesianConv1D": lambda: bayetorch_layers.BayesianConv1D(1, 2, 1),
    "BayesianConv2D": lambda: bayetorch_layers.BayesianConv2D(1, 2, 1),
    "BayesianConv3D": lambda: bayetorch_layers.BayesianConv3D(1, 2, 1),
    "init_bayesian_with_frequentist": lambda: init_bayesian_with_frequentist(
        bayeformers.nn.Linear(2, 2), nn.Linear(2, 2)
    ),
    "ELBO": lambda: ELBO(10),
    "Uncertainty": lambda: Uncertainty(2),
    "BayesianModel.kl_divergence": lambda: Holder().kl_divergence,
    "BayesianModel.init_with_frequentist": lambda: Holder().init_with_frequentist(nn.Linear(2, 2)),
    "to_bayesian": lambda: older.to_bayesian(nn.Linear(2, 2)),
    "log_prior": lambda: wrapped().log_prior(),
    "log_variational_posterior": lambda: wrapped().log_variational_posterior(),
}


def building(name: str) -> Callable[[], Any]:
    return lambda: getattr(layers, name)(2, 2, *[1] * name.startswith("Conv"))


USES |= {name: building(name) for name in layers.__all__ if name != "VariationalLayer"}


def warnings_of(use: Callable[[], Any], times: int = 1) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            use()
    return [warning for warning in caught if "compatibility name" in str(warning.message)]


@pytest.mark.parametrize("name", USES)
def test_each_name_warns_once_and_names_the_new_way(name: str) -> None:
    """One warning for three calls from one line; every `bayeformers...` name in it exists."""
    caught = warnings_of(USES[name], times=3)
    assert [warning.category for warning in caught] == [DeprecationWarning]
    message = str(caught[0].message)
    old, new = message.split(" is a compatibility name; write ")
    assert name in old
    named = re.findall(r"\b(?:bayeformers(?:\.\w+)+|to_bayesian|kl_divergence)", new)
    assert named
    for path in named:
        thing: Any = bayeformers
        for part in path.removeprefix("bayeformers.").split("."):
            if not hasattr(thing, part):
                importlib.import_module(f"{thing.__name__}.{part}")
            thing = getattr(thing, part)


def test_warning_stands_at_the_place_of_use() -> None:
    """The file is this one, for a subclass of the user's too, and each of two lines has its own warning."""

    class Mine(layers.LinearFlipout):
        pass

    def use() -> None:
        Mine(2, 2)
        Mine(2, 2)

    caught = warnings_of(use)
    assert [warning.filename for warning in caught] == [__file__] * 2
    assert caught[1].lineno == caught[0].lineno + 1


def test_new_names_do_not_warn() -> None:
    def use() -> None:
        model = bayeformers.to_bayesian(nn.Linear(2, 2)).eval()
        model(torch.ones(1, 2))
        bayeformers.kl_divergence(model)

    assert not warnings_of(use)


PAGES = {
    "bayesian_torch": "migration/bayesian_torch.md",
    "bayetorch": "migration/bayetorch.md",
    "bayeformers": "migration/bayeformers.md",
}


def test_every_name_stands_on_its_migration_page() -> None:
    compat = Path(bayeformers.__file__).parent / "compat"
    for package, page in PAGES.items():
        text = (compat.parent.parent / "docs" / page).read_text("utf-8")
        for path in [*(compat / package).rglob("*.py"), *compat.glob(f"{package}.py")]:
            names = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", path.read_text("utf-8"), re.M)
            # helpers of one file for another, and the base of the layers, are no names that a user writes
            missing = [name for name in names if name not in text and name not in ("copy_weights", "BayesianLayer")]
            assert not missing, f"{path.name}: {missing} on {page}"


def test_nothing_imports_the_compatibility_packages() -> None:
    package = Path(bayeformers.__file__).parent
    inside = package / "compat"
    importing = [
        path
        for path in package.rglob("*.py")
        if inside not in path.parents and re.search(r"^\s*(from|import)\s.*\bcompat\b", path.read_text("utf-8"), re.M)
    ]
    assert not importing
