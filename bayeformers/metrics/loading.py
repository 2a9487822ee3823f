"""`load`: the package's `evaluate` modules by name, without network."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import evaluate

_MODULES = {"uncertainty": ("bayeformers.metrics.uncertainty_metric", "Uncertainty")}


def load(name: str, **kwargs: Any) -> "evaluate.EvaluationModule":
    """Return an `evaluate` module of this package, as `evaluate.load` would give; ``kwargs`` go to its constructor.

    Args:
        name: which module; there is "uncertainty".
        **kwargs: for example ``keep_in_memory=True``, or ``num_process``, ``process_id`` and ``experiment_id``.

    Raises:
        ValueError: ``name`` is unknown.
        ImportError: the optional dependency `evaluate` is not installed.

    >>> metric = load("uncertainty", keep_in_memory=True)
    >>> result = metric.compute(predictions=[[0.9, 0.1], [0.2, 0.8]], references=[0, 1])
    >>> round(result["nll"], 4), result["accuracy"]
    (0.1643, 1.0)
    """
    if name not in _MODULES:
        raise ValueError(f"`name` must be one of {sorted(_MODULES)}, got {name!r}.")
    try:
        import_module("evaluate")
    except ImportError as error:
        raise ImportError(
            "bayeformers.metrics.load needs the optional package `evaluate`: pip install 'bayeformers[evaluate]'."
        ) from error
    module, class_name = _MODULES[name]
    return getattr(import_module(module), class_name)(**kwargs)
