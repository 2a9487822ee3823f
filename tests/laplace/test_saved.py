"""A posterior's file holds all that its layers need, is of these weights, and is read as it was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayeformers.laplace import Curvature, InfPosterior, LaplacePosterior, fit, inf_posterior
from bayeformers.laplace.from_sums import posterior_of
from bayeformers.laplace.posterior import FILE
from bayeformers.laplace.sparse.inf_posterior import FILE as INF_FILE
from tests.laplace.networks import batches, classes, mlp, normal

QUIET: dict[str, Any] = {"progress": False, "prior_precision": 2.0}
Tensors = dict[str, Tensor]


def posterior(**options: Any) -> LaplacePosterior:
    return fit(mlp(), batches(normal(8, 4), classes(8)), **{**QUIET, **options})


def rewritten(path: Path, change: Callable[[Tensors, dict[str, Any]], Any], *, is_old: bool) -> None:
    """Other tensors or other meta; ``is_old``: as a version without digests wrote it."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors, meta = load_file(path), json.loads(header["meta"])
    if is_old:
        del header["digests"]
        for layer in meta.get("layers", {}).values():
            del layer["digests"]
    change(tensors, meta)
    save_file(tensors, path, {**header, "meta": json.dumps(meta)})


def scaled(tensors: Tensors, name: str, factor: float) -> None:
    tensors[name] = tensors[name] * factor


DAMAGED: dict[str, tuple[Callable[[Tensors, dict[str, Any]], Any], str]] = {
    "no eigenvalues": (lambda t, m: t.pop("0/eigenvalues"), r"lacks \['0/eigenvalues'\]"),
    "no left": (lambda t, m: t.pop("2/left"), r"lacks \['2/left'\]"),
    "no right": (lambda t, m: t.pop("0/right"), r"lacks \['0/right'\]"),
    "surplus": (lambda t, m: t.update({"4/left": torch.eye(2)}), r"surplus tensors, such as \['4/left'\]"),
    "forgotten layer": (lambda t, m: m["layers"].pop("2"), r"surplus tensors, such as \['2/"),
    "negative": (lambda t, m: scaled(t, "0/eigenvalues", -1), "'0' has negative eigenvalues"),
    "NaN": (lambda t, m: scaled(t, "0/eigenvalues", float("nan")), "'0/eigenvalues' has NaN or infinite"),
    "infinite": (lambda t, m: scaled(t, "2/right", float("inf")), "'2/right' has NaN or infinite"),
    "short values": (lambda t, m: t.update({"0/eigenvalues": torch.ones(1, 2, 2)}), "whose weights number"),
    "short vectors": (lambda t, m: t.update({"0/left": torch.eye(3)[None]}), r"left eigenvectors of shape \(1, 3, 3\)"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_an_earlier_version(name: str, tmp_path: Path) -> None:
    posterior(curvature="ekfac").save(tmp_path)
    change, message = DAMAGED[name]
    rewritten(tmp_path / FILE, change, is_old=True)
    with pytest.raises(ValueError, match=message):
        LaplacePosterior.load(tmp_path, mlp())


@pytest.mark.parametrize("name", [*(name for name in DAMAGED if name != "forgotten layer"), "permuted"])
def test_digests_tell(name: str, tmp_path: Path) -> None:
    posterior(curvature="ekfac").save(tmp_path)
    flipped = lambda t, m: t.update({"0/left": t["0/left"].flip(1).contiguous()})  # noqa: E731
    rewritten(tmp_path / FILE, DAMAGED[name][0] if name in DAMAGED else flipped, is_old=False)
    with pytest.raises(ValueError, match="is damaged: of the tensors that were written it"):
        LaplacePosterior.load(tmp_path, mlp())


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal", "dense"])
def test_an_earlier_versions_file_is_read(curvature: str, tmp_path: Path) -> None:
    saved = posterior(curvature=curvature)
    saved.save(tmp_path)
    rewritten(tmp_path / FILE, lambda t, m: None, is_old=True)
    loaded = LaplacePosterior.load(tmp_path, mlp())
    with loaded.draw(3), saved.draw(3):
        assert all(torch.equal(p, q) for p, q in zip(loaded.model.parameters(), saved.model.parameters(), strict=True))


def permuted() -> torch.nn.Module:
    """Other weights of equal norms: the classes in another order."""
    model = mlp()
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.copy_(parameter.flip(0))
    return model


def test_permuted_rows_are_other_weights(tmp_path: Path) -> None:
    found = posterior(curvature="ekfac")
    found.save(tmp_path)
    inf_posterior(found, rank=2).save(tmp_path)
    for kind in (LaplacePosterior, InfPosterior):
        kind.load(tmp_path, mlp())
        with pytest.raises(ValueError, match="fitted to other weights: those of '2'"):
            kind.load(tmp_path, permuted())


def test_a_sparse_file_is_checked(tmp_path: Path) -> None:
    inf_posterior(posterior(curvature="ekfac"), rank=2).save(tmp_path)
    rewritten(tmp_path / INF_FILE, lambda t, m: scaled(t, "0/0/eigenvalues", -1), is_old=True)
    with pytest.raises(ValueError, match="negative eigenvalues"):
        InfPosterior.load(tmp_path, mlp())
    tensors = load_file(tmp_path / INF_FILE)
    del tensors["0/0/rows"]
    with safe_open(tmp_path / INF_FILE, framework="pt") as file:
        header = dict(file.metadata())
    save_file(tensors, tmp_path / INF_FILE, header)
    with pytest.raises(ValueError, match=r"lacks \['0/0/rows'\]"):
        InfPosterior.load(tmp_path, mlp())


def test_sums_know_their_weights(tmp_path: Path) -> None:
    """A pass is not resumed, nor a posterior made, for weights of equal norms; sums of such do not add."""
    path = tmp_path / "sums.safetensors"
    fit(mlp(), batches(normal(8, 4), classes(8)), checkpoint=path, **QUIET)
    with pytest.raises(ValueError, match="holds the sums of other weights"):
        fit(permuted(), batches(normal(8, 4), classes(8)), checkpoint=path, **QUIET)
    with pytest.raises(ValueError, match="is of other weights than those of '2'"):
        posterior_of(permuted(), Curvature.load(path))
    other = tmp_path / "other.safetensors"
    fit(permuted(), batches(normal(8, 4), classes(8)), checkpoint=other, **QUIET)
    with pytest.raises(ValueError, match="other layers, shapes or weights"):
        Curvature.load(path).merge(Curvature.load(other))
    rewritten(path, lambda t, m: m.pop("digests"), is_old=True)
    assert Curvature.load(path).merge(Curvature.load(path)).num_examples == 16
