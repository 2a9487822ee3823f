"""`import bayeformers` loads no library; every name is there when it is asked for, whatever was imported before."""

import ast
import inspect
from pathlib import Path

import pytest

import bayeformers
from tests.test_imports import run_python

SOURCE = ast.parse(Path(inspect.getsourcefile(bayeformers) or "").read_text(encoding="utf-8"))


def test_the_table_says_what_the_imports_say() -> None:
    """Type checkers and the documentation read the imports, Python the table."""
    guarded = next(node for node in SOURCE.body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    said = {node.module: tuple(alias.name for alias in node.names) for node in imports if node.module}
    assert said == bayeformers._HOMES
    modules = {alias.name for node in imports if node.module is None for alias in node.names}
    assert {name for names in said.values() for name in names} | modules == set(bayeformers.__all__)


def test_names_and_modules_are_found() -> None:
    done = run_python(
        """
import sys, warnings
import bayeformers
heavy = {"torch", "transformers", "numpy", "scipy", "sklearn"} & set(sys.modules)
assert not heavy, heavy
assert set(bayeformers.__all__) <= set(dir(bayeformers))
assert bayeformers.metrics.__name__ == "bayeformers.metrics" and bayeformers.training.BayesianTrainer
from bayeformers import *
assert to_bayesian is bayeformers.conversion.convert.to_bayesian and "to_bayesian" in vars(bayeformers)
assert not hasattr(bayeformers, "no_such_name") and not hasattr(bayeformers, "__no_such__")
try:
    bayeformers.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert bayeformers.calibration is bayeformers.delta
assert any("has moved" in str(one.message) for one in said)
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "before", ["", "import transformers.quantizers.auto", "from transformers import AutoTokenizer", "import peft"]
)
@pytest.mark.parametrize("is_first", [True, False], ids=["package first", "package last"])
@pytest.mark.slow
def test_auto_classes_know_the_models(before: str, is_first: bool) -> None:
    """In whatever order transformers' modules are loaded, which import each other."""
    lines = ["import bayeformers", before] if is_first else [before, "import bayeformers"]
    check = """
from transformers import AutoConfig
assert list(AutoConfig.for_model("bayeformers_lenet").conv_channels) == [6, 16]
from transformers import AutoModelForImageClassification
from transformers import Trainer, pipeline
model = AutoModelForImageClassification.from_config(AutoConfig.for_model("bayeformers_lenet"))
assert type(model).__module__ == "bayeformers.models.lenet"
"""
    done = run_python("\n".join([*lines, check]))
    assert done.returncode == 0, done.stderr


def test_a_posterior_of_a_room_above_is_found() -> None:
    """Which posteriors a folder may hold does not hang on what was imported."""
    done = run_python(
        """
from bayeformers.posteriors.files import saved_kinds
names = {kind.__name__ for kind in saved_kinds().values()}
assert {"LaplacePosterior", "InfPosterior", "AdapterPosterior", "SWAGPosterior"} <= names, names
"""
    )
    assert done.returncode == 0, done.stderr
