"""Import paths of the layout before the rooms: each still works for one version, with a `DeprecationWarning`."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "keep_old_paths", "old_module"]

# old module -> where its names are now, within the package
MOVED = {
    "accounting": "checkpoint.accounting",
    "architectures": "checkpoint.load",
    "calibration": "delta",
    "config": "conversion.config",
    "continual": "conversion.continual",
    "digests": "storage",
    "distributions.normal_kl": "distributions.block_kl",
    "distributions.posterior_prior": "distributions.gaussian_priors",
    "distributions.separable_kl": "distributions.block_kl",
    "dropout": "conversion.surgery",
    "fresh": "checkpoint.load",
    "generators": "sampling.generators",
    "jacobians": "linearized",
    "jacobians.reads": "linearized.soundness",
    "jacobians.recording": "linearized.recording",
    "jacobians.rules": "linearized.rules",
    "jacobians.separation": "linearized.soundness",
    "laplace.choice": "laplace.posterior",
    "laplace.directions": "laplace.analysis.directions",
    "laplace.fingerprint": "laplace.saving",
    "laplace.gradients": "laplace.analysis.gradients",
    "laplace.hessian": "likelihoods.loss_hessian",
    "laplace.holdout": "laplace.tuning",
    "laplace.inf": "laplace.sparse.inf",
    "laplace.inf_posterior": "laplace.sparse.inf_posterior",
    "laplace.influence": "laplace.analysis.influence",
    "laplace.inner": "laplace.analysis.inner",
    "laplace.loading": "laplace.data",
    "laplace.parts": "laplace.saving",
    "laplace.processes": "processes",
    "laplace.spectrum": "laplace.evidence",
    "laplace.storage": "storage",
    "laplace.weights": "laplace.moved",
    "losses.gaussian": "likelihoods.gaussian",
    "monte_carlo": "sampling.passes",
    "nn.bilinear": "nn.linear",
    "nn.embedding_bag": "nn.embedding",
    "nn.generation": "nn.draws",
    "objective": "nn.kl",
    "plain_weights": "conversion.plain_weights",
    "plots": "reports",
    "posteriors.blocks": "linearized.blocks",
    "posteriors.covariance": "linearized.covariance",
    "posteriors.linearized": "linearized.captured",
    "posteriors.logits": "linearized.links",
    "posteriors.methods": "linearized.methods",
    "predictive.noise": "likelihoods",
    "predictive.outputs": "likelihoods",
    "predictive.pixels": "likelihoods",
    "predictive.problem": "likelihoods",
    "pruning": "conversion.pruning",
    "random_state": "sampling.random_state",
    "registry": "conversion.registry",
    "renaming": "conversion.persistence",
    "report": "reports",
    "rollback": "conversion.rollback",
    "saving": "checkpoint.saving",
    "scalars": "checks",
    "selection": "conversion.selection",
    "shared_prefix": "sampling.shared_prefix",
    "snapshot": "sampling.snapshot",
    "summary": "conversion.summary",
    "surgery": "conversion.surgery",
    "ties": "conversion.ties",
    "training.calibration_arguments": "training.alignment",
    "training.calibration_term": "training.alignment",
    "training.direction": "training.arguments",
    "training.given_loss": "training.own_terms",
    "training.lengths": "training.order",
    "training.likelihood": "training.items",
    "training.number_checks": "checks",
    "training.objective_check": "training.objective",
    "training.precision": "training.records",
    "training.residual": "training.items",
    "training.resuming": "training.trainer",
    "training.scores": "training.evaluator",
    "views": "sampling.views",
    "wrappers": "conversion.persistence",
}

FUNCTIONS = ("jacobians.separation", "laplace.inf_posterior", "laplace.influence", "summary")
"""Old modules with a function of their name beside them."""

_PACKAGE = "bayeformers"


class _OldPaths(MetaPathFinder, Loader):
    """Finds a module under its old path; what is imported is the new module itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """A blank module, as Python makes it: `exec_module` puts the new one in its place."""

    def exec_module(self, module: ModuleType) -> None:
        """Import the new module, and leave it where the import system looks for the old one."""
        _tell(module.__name__)
        sys.modules[module.__name__] = importlib.import_module(_new_path(module.__name__))


class _Beside(ModuleType):
    """An old module beside a function of its name, which importing it must not put in the function's place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system and others ask of every module
            raise AttributeError(name)
        _tell(self.__name__)
        return getattr(importlib.import_module(_new_path(self.__name__)), name)


def _new_path(old: str) -> str:
    return f"{_PACKAGE}.{MOVED[old.partition('.')[2]]}"


def _tell(old: str) -> None:
    warnings.warn(f"`{old}` has moved: import from `{_new_path(old)}`.", DeprecationWarning, stacklevel=3)


def old_module(name: str) -> ModuleType:
    """Return the module that an attribute of the package named, before it moved; AttributeError if none did."""
    if name not in MOVED:
        raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
    return importlib.import_module(f"{_PACKAGE}.{name}")


def keep_old_paths() -> None:
    """Let `import` find modules under old paths: asked first, or `jacobians.reads` would be loaded twice."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldPaths())
    for name in FUNCTIONS:
        sys.modules.setdefault(f"{_PACKAGE}.{name}", _Beside(f"{_PACKAGE}.{name}"))
