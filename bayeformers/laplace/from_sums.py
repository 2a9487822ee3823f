"""A posterior from sums of curvature alone, without data: merged from several passes, or read from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..likelihoods import logits_of
from ..linearized.captured import OutputOf
from .config import PriorChoice
from .curvature import Curvature
from .evidence import Precision
from .posterior import FitRecord, LaplacePosterior
from .targets import Target, targets_of
from .tuning import default_choice, tune


def posterior_of(
    model: nn.Module,
    curvature: Curvature,
    *,
    prior_precision: Precision | PriorChoice | None = None,
    temperature: float = 1.0,
    noise_std: float | None = None,
    num_data: int | None = None,
    logits: OutputOf = logits_of,
    device: torch.device | str | None = None,
    **tuning: Any,
) -> LaplacePosterior:
    """Return the posterior that `fit` would have given for the data whose sums ``curvature`` holds.

    Sums of parts of the data, each written by ``fit(..., checkpoint=path)`` in a process or at a time of its own, add
    with `Curvature.merge`. They know the layers by name: ``model`` must be the one they were taken of.

    Args:
        model: the trained model.
        curvature: the sums.
        prior_precision: as for `fit`: where nothing is said, by ``validation`` or else ``training`` if they are given,
            else by the evidence.
        temperature: as for `fit`.
        noise_std: as for `fit`.
        num_data: N, the examples that the sums stand for; by default those that were seen, times ``data_scale``.
        logits: as for `fit`.
        device: of the eigenvectors; by default that of the sums.
        tuning: ``validation`` and ``link`` of prior_precision="holdout", ``training`` of "leverage" and "perturbed",
            ``token_mask`` of the latter, and ``progress``: see `tune`.

    Raises:
        ValueError: no sums; a layer that the model lacks, or that has another form or other weights there; "ekfac"
            without its second pass: save the sums and give their path to `fit` as ``checkpoint``, with the data, which
            then makes that pass alone.

    >>> from bayeformers.laplace import Curvature, fit
    >>> import tempfile, os
    >>> net, x = nn.Linear(3, 2), torch.randn(20, 3)
    >>> y, folder = torch.randint(2, (20,)), tempfile.mkdtemp()
    >>> paths = [os.path.join(folder, f"{part}.safetensors") for part in range(2)]
    >>> for path, rows in zip(paths, (slice(12), slice(12, 20))):
    ...     _ = fit(net, [(x[rows], y[rows])], checkpoint=path, progress=False)
    >>> merged = Curvature.load(paths[0]).merge(Curvature.load(paths[1]))
    >>> posterior_of(net, merged).record.num_data
    20
    """
    if curvature.num_examples == 0 or not curvature.sums:
        raise ValueError("`curvature` holds no sums: it has seen no example.")
    targets = targets_of(model, (name for name, sums in curvature.sums.items() if sums))
    for target in targets:
        _check_form(target, curvature)
    if num_data is not None:
        curvature = curvature.scaled_to(num_data)
    if device is not None:
        curvature = curvature.to(torch.device(device))
    posterior = LaplacePosterior(
        model,
        curvature.decomposed(targets),
        FitRecord.from_sums(curvature, {}),
        temperature=temperature,
        noise_std=noise_std or 1.0,
        outputs_of=logits,
    )
    if prior_precision is None:
        prior_precision = default_choice(model, tuning.get("validation"), tuning.get("training"))
    return tune(posterior, prior_precision, noise_std=noise_std, **tuning)


def _check_form(target: Target, curvature: Curvature) -> None:
    sums = curvature.sums[target.name]
    if curvature.config.curvature == "ekfac" and "gradients" in sums and "squares" not in sums:
        raise ValueError(
            f'`curvature` lacks the squares of "ekfac" for {target.name!r}: save it and call '
            "`fit(..., checkpoint=path)` with the data, which makes that second pass alone."
        )
    norm = curvature.weights.get(target.name, target.squared_norm)
    is_close = math.isclose(norm, target.squared_norm, rel_tol=1e-6)
    recorded = curvature.digests.get(target.name)
    if not is_close or (recorded is not None and recorded != target.digest):
        raise ValueError(f"`curvature` is of other weights than those of {target.name!r} in `model`.")
    found, expected = _form(sums), target.matrix_shape
    if found != expected and not ("products" in sums and found == (1, 1, target.num_weights)):
        raise ValueError(
            f"`curvature` has the form {found} for {target.name!r}, whose trained weights have {expected}."
        )


def _form(sums: Mapping[str, Tensor]) -> tuple[int, ...]:
    """(K, d_out, d_in') of a layer's sums."""
    if "products" in sums:
        return (1, 1, sums["products"].shape[-1])
    if "gradients" not in sums:
        return tuple(sums["squares"].shape)
    gradients, inputs = sums["gradients"], sums["inputs"]
    if inputs.ndim == 1:  # counts of a table's rows
        return (1, len(inputs), gradients.shape[-1])
    return (len(gradients), gradients.shape[-1], inputs.shape[-1])
