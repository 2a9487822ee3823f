"""What tables of wrong calls share: models that a call must leave as they are, and the check of its error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayeformers as bf
from bayeformers import laplace
from tests.cases import case

NAN, INF = float("nan"), float("inf")
CLEAR = (ValueError, TypeError, RuntimeError, OSError)


class World:
    """Models that all calls share: each call must leave them as they are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        item = case("bert")
        self.plain, self.inputs, self.labels = item.build(), item.inputs(), item.labels()["labels"]
        self.batch = {**self.inputs, "labels": self.labels}
        self.model = bf.to_bayesian(item.build())
        self.net = bf.to_bayesian(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        self.hand = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
        self.x, self.y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        self.posterior = laplace.fit(self.hand, [(self.x, self.y)], progress=False)
        self.saved, self.laplace = root / "bayesian", root / "laplace"
        self.model.save_pretrained(self.saved)
        self.plain.save_pretrained(self.laplace)
        laplace.fit(self.plain, [self.batch], progress=False, subset="last_layer").save(self.laplace)

    def state(self) -> tuple[list[Any], list[Tensor]]:
        """All that a failed call may have changed."""
        facts: list[Any] = []
        tensors = [torch.get_rng_state()]
        for model in (self.plain, self.model, self.net, self.hand):
            facts += [p.requires_grad for p in model.parameters()]
            facts.append(list(model.state_dict()))
            tensors += [value.clone() for value in model.state_dict().values()]
            for module in model.modules():
                facts += [type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks)]
                facts.append(getattr(module, "draw", None))
        return facts, tensors

    def folder(self, name: str, source: str = "saved") -> Path:
        """A copy of a checkpoint, to be damaged."""
        target = self.root / name.replace(" ", "_")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(getattr(self, source), target)
        return target

    def trainer(self, model: nn.Module | None = None, rows: Any = None, **options: Any) -> bf.BayesianTrainer:
        """A trainer over three rows."""
        more = {
            key: options.pop(key) for key in list(options) if key in ("compute_metrics", "eval_dataset", "optimizers")
        }
        arguments = bf.BayesianTrainingArguments(
            output_dir=str(self.root / "run"), use_cpu=True, report_to="none", disable_tqdm=True, **options
        )
        if rows is None:
            rows = [{key: value[i] for key, value in self.batch.items()} for i in range(3)]
        return bf.BayesianTrainer(model or bf.to_bayesian(case("bert").build()), arguments, train_dataset=rows, **more)


Call = Callable[[World], Any]
Row = tuple[str, Call, tuple[str, ...]]


def enter(context: Any) -> None:
    """Enter a context that must refuse."""
    with context:
        raise AssertionError("entered")


def check(world: World, call: Call, named: tuple[str, ...], *, seeds: bool = False) -> None:
    """One clear error, all of whose texts are there, and nothing has changed; ``seeds``: but torch's generator."""
    before = world.state()
    with pytest.raises(CLEAR) as error:
        call(world)
    ours = any(room in str(error.traceback[-1].path) for room in ("bayeformers", "transformers"))
    assert type(error.value) is not RuntimeError or ours, error.value
    missing = [text for text in named if text.lower() not in str(error.value).lower()]
    assert not missing, f"{missing} not in: {type(error.value).__name__}: {error.value}"
    facts, tensors = world.state()
    assert facts == before[0]
    assert all(map(torch.equal, tensors[seeds:], before[1][seeds:]))


def rows(table: list[Row]) -> Any:
    """A parametrisation with the first of each row as its name."""
    names = [name for name, _, _ in table]
    assert len(names) == len(set(names))
    return pytest.mark.parametrize(("call", "named"), [row[1:] for row in table], ids=names)
