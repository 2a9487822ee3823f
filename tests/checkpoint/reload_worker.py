"""Run as a script in a fresh process: reload every saved model and record what its draws give.

    python tests/checkpoint/reload_worker.py FOLDER

Each subfolder holds a checkpoint, ``inputs.pt`` and perhaps ``arguments.json`` for the loader; ``draws.pt`` is written.
"""

import json
import sys
from pathlib import Path

import torch

from bayeformers import fixed_draw, from_pretrained, kl_divergence, posterior_mean
from bayeformers.nn import NamedVariational, variational_tensors
from tests.reference import tensors_of


def describe(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, object]:
    """Outputs under the mean and two draws, the KL, and how the parameters are shared."""
    model.eval()
    result: dict[str, object] = {"class": type(model).__name__}
    with torch.no_grad():
        with posterior_mean(model):
            result["mean"] = tensors_of(model(**inputs))
        for index in (0, 5):
            with fixed_draw(model, index, seed=3):
                result[f"draw {index}"] = tensors_of(model(**inputs))
                result[f"weights {index}"] = {t.name: sampled(t) for t in variational_tensors(model)}
        result["kl"] = kl_divergence(model).double()
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    result["ties"] = sorted(sorted(group) for group in groups.values() if len(group) > 1)
    result["requires_grad"] = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    result["rho"] = {name: p.detach() for name, p in model.named_parameters() if name.endswith("_rho")}
    return result


def sampled(tensor: NamedVariational) -> torch.Tensor:
    """Value of a Bayesian tensor under the draw that is held."""
    return tensor.module.variational(tensor.parameter_name).sample().clone()


def main(folder: Path) -> None:
    """Describe every checkpoint below ``folder``."""
    torch.set_num_threads(1)
    for saved in sorted(path.parent for path in folder.glob("*/inputs.pt")):
        arguments = json.loads((saved / "arguments.json").read_text()) if (saved / "arguments.json").exists() else {}
        model = from_pretrained(saved, **arguments)
        torch.save(describe(model, torch.load(saved / "inputs.pt")), saved / "draws.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
