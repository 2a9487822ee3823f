"""Made-up outliers, and the weights that they choose."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from bayeformers.ood import FeatureDensity, fit_density, score_ood
from bayeformers.ood.choice import standardized, weighted
from bayeformers.ood.density import Part
from bayeformers.ood.made_up import KINDS, can_be_made_up, made_up
from tests.training import tiny

START, END, PAD = 1, 2, 0


def texts() -> list[dict[str, Tensor]]:
    """Rows of 3 to 6 tokens between a first and a last one that all have, padded to 8, in two batches."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size in (5, 7):
        ids, mask = torch.full((size, 8), PAD), torch.zeros(size, 8, dtype=torch.long)
        for row, where in zip(ids, mask, strict=True):
            length = int(torch.randint(3, 7, (1,), generator=generator))
            row[0], row[length + 1] = START, END
            row[1 : length + 1] = torch.randint(10, 60, (length,), generator=generator)
            where[: length + 2] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def inner(batches: list[dict[str, Tensor]]) -> list[list[int]]:
    ids = [row.tolist() for batch in batches for row in batch["input_ids"]]
    return [[token for token in row if token not in (START, END, PAD)] for row in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_length_ends_and_padding_stay(kind: str) -> None:
    given, found = texts(), made_up(texts(), kind, 0)
    for before, after in zip(given, found, strict=True):
        for token in (START, END, PAD):
            assert torch.equal(before["input_ids"] == token, after["input_ids"] == token)
        assert torch.equal(before["attention_mask"], after["attention_mask"])
    assert inner(given) != inner(found)
    assert inner(given) == inner(texts())  # what was given is untouched


def test_each_kind_is_what_it_says() -> None:
    rows = inner(texts())
    for before, after in zip(rows, inner(made_up(texts(), "shuffled", 0)), strict=True):
        assert sorted(before) == sorted(after)
    pool = {token for row in rows for token in row}
    assert {token for row in inner(made_up(texts(), "replaced", 0)) for token in row} <= pool
    for before, after in zip(rows, inner(made_up(texts(), "mixed", 0)), strict=True):
        half = len(before) - len(before) // 2
        assert after[:half] == before[:half]
        others = [row for row in rows if row != before]
        assert any(row[len(row) - len(after[half:]) :] == after[half:] for row in others)


def test_a_seed_gives_the_same_rows() -> None:
    first, again, other = (inner(made_up(texts(), "replaced", seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_only_token_ids_can_be_changed() -> None:
    assert can_be_made_up(texts()[0])
    for inputs in (
        {"pixel_values": torch.ones(2, 3)},
        torch.ones(2, 3),
        {"input_ids": torch.ones(2, 3)},
        [torch.ones(2)],
    ):
        assert not can_be_made_up(inputs)


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    ranks = rankdata(np.r_[inside, outside])[len(inside) :]
    return float((ranks.sum() - len(outside) * (len(outside) + 1) / 2) / (len(inside) * len(outside)))


def test_weights_are_the_best_of_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [Part(method=m, tensors={}) for m in ("energy", "entropy", "max_logit")]
    familiar = torch.randn(3, 80, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [5.0], [0.2]])
    shift = torch.tensor([[1.0], [4.0], [-0.1]])
    unfamiliar = {
        "a": torch.randn(3, 60, generator=generator, dtype=torch.float64) * 3 + shift,
        "b": torch.randn(3, 50, generator=generator, dtype=torch.float64) + shift,
    }
    parts = standardized(parts, familiar)
    kept = weighted(parts, familiar, unfamiliar)
    values = {}
    for steps in itertools.product(range(5), repeat=3):
        if sum(steps) == 4:
            by = np.array(steps) / 4 / familiar.numpy().std(1)
            values[steps] = np.mean([auroc(by @ familiar.numpy(), by @ rows.numpy()) for rows in unfamiliar.values()])
    best = max(values, key=lambda steps: values[steps])
    chosen = {part.method: part.weight for part in kept}
    assert set(chosen) == {part.method for part, step in zip(parts, best, strict=True) if step}
    total = sum(chosen.values())
    for part, step in zip(parts, best, strict=True):
        if step:
            assert chosen[part.method] / total == pytest.approx(step / 4)
    score = sum(p.standardized(familiar[i]) for i, p in enumerate(parts) for q in kept if q.is_like(p) for p in [q])
    assert float(torch.as_tensor(score).std(correction=0)) == pytest.approx(1.0)


def test_the_first_family_counts_alone_without_unfamiliar_rows() -> None:
    familiar = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double() * 7
    parts = standardized([Part(method=m, tensors={}) for m in ("energy", "entropy")], familiar)
    assert [(part.method, part.weight) for part in weighted(parts, familiar, {})] == [("energy", pytest.approx(1.0))]


def test_nothing_is_more_familiar_than_calibration_rows() -> None:
    familiar = torch.linspace(-2, 2, 21, dtype=torch.float64)[None]
    [part] = standardized([Part(method="energy", tensors={})], familiar)
    low, least = part.standardized(torch.tensor([-50.0, -2.0], dtype=torch.float64))
    assert low == least


def test_auto_has_three_families_of_a_classifier_and_saves_them(tmp_path: Path) -> None:
    """A network that knows its classes: the families that are kept, one forward, and a file that gives the same."""
    model = tiny.plain().double().eval()
    rows = tiny.dataset("single", 120).columns
    density = fit_density(model, [rows], progress=False)
    assert {part.method for part in density.parts} <= {"marginal_mahalanobis", "relative_mahalanobis", "energy"}
    assert float(density.calibration.std(correction=0)) == pytest.approx(1.0)
    assert density.num_rows + len(density.calibration) == 120
    density.save(tmp_path)
    again = FeatureDensity.load(tmp_path, model)
    new = tiny.tokens(7, seed=4)
    assert torch.equal(again.score(model, new), score_ood(model, new, density=density))
    assert [part.method for part in again.parts] == [part.method for part in density.parts]


def test_given_outliers_choose_the_weights() -> None:
    """Outliers that shift all logits alone differ in energy: it gets the weight."""

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] + x[:, 3:]

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 4, generator=generator), torch.arange(300) % 3
    x[:, 3] = 0
    x[torch.arange(300), y] += 3
    network = nn.Sequential(nn.Identity(), Shifted())
    outliers = x[:100].clone()
    outliers[:, 3] = -5
    density = fit_density(
        network, [(x, y)], layer="0", pooling="mean", outliers=[outliers], progress=False
    )  # fmt: skip
    assert (density.score(network, outliers) > density.threshold(0.1)).double().mean() > 0.9
    assert (density.score(network, x) > density.threshold(0.1)).double().mean() < 0.2
