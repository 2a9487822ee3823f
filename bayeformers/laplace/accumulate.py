"""One batch's contribution to the curvature: one forward pass, and one backward pass per column."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..likelihoods.registry import likelihood_of_family
from ..linearized import Use, examples_first, gradients, record, separation
from ..linearized.blocks import GaussianBlock
from ..linearized.captured import Captured, captured_block, in_block
from ..linearized.rules import EmbeddingRule, LinearRule
from ..processes import process_index
from ..sampling.views import View
from .curvature import Curvature
from .data import Batch
from .kronecker import KroneckerEigen, add_second_moment
from .targets import Target

OutputsOf = Callable[[Any], Tensor]
Owned = Sequence[tuple[Target, list[Use]]]
_ROUNDING = 16  # units in the last place
_CHUNK_ELEMENTS = 2**24  # of one layer's per-example Jacobians: 64 MiB in float32


class Accumulator:
    """Adds batches to the sums of a `Curvature`, in place.

    Args:
        curvature: the sums so far.
        model: in `eval()` mode.
        targets: the layers.
        outputs_of: logits (B, C) or (B, T, C) in what the model returns.
        bases: of the second pass of "ekfac", which sums squares in these bases and nothing else.
        device: of the sums; the model's if None.
    """

    def __init__(
        self,
        curvature: Curvature,
        model: nn.Module | View,
        targets: Sequence[Target],
        outputs_of: OutputsOf,
        *,
        bases: Mapping[str, KroneckerEigen] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.curvature, self.model, self.targets, self.outputs_of = curvature, model, list(targets), outputs_of
        self.is_second_pass, self.device = bases is not None, device
        self._num_seen, self._process = curvature.num_examples, process_index()
        if bases is not None:
            self.targets = [replace(t, left=bases[t.name].left, right=bases[t.name].right) for t in self.targets]
        self._likelihood = likelihood_of_family(curvature.config.likelihood)
        self._modules = [module for target in self.targets for module in target.modules]

    def add(self, batch: Batch) -> None:
        """One forward pass, one backward pass per column; one example at a time where a layer does not keep them apart.

        Of the examples with a loss term; the others are counted. Outputs or labels that are not finite or do not fit
        are refused with a ValueError.
        """
        labelled = batch.labelled(self._likelihood)
        if len(labelled):
            self._add(labelled, self._generators(labelled) if self.curvature.config.fisher == "mc" else [])
        self._num_seen += len(labelled)
        self.curvature.num_unlabelled += len(batch) - len(labelled)
        self.curvature.num_batches += 1

    def _add(self, batch: Batch, generators: Sequence[torch.Generator]) -> None:
        outputs, uses = record(self.model, batch.inputs, self._modules, self.outputs_of)
        _check_outputs(outputs, batch)
        apart = separation(self.model, batch.inputs, outputs, uses, self.outputs_of)
        if apart == "none" or apart == "rows" and self._needs_examples:
            for i, one in enumerate(batch.examples()):
                self._add(one, generators[i : i + 1])
            return
        owned = [(target, [use for use in uses if use.module in target.modules]) for target in self.targets]
        owned = [(target, found) for target, found in owned if found]
        with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
            self._count(outputs.detach(), batch)
            columns = list(self._columns(outputs.detach(), batch, generators))
            positions = _Positions(batch, self._masked(batch, uses), self.curvature.config.weight_sharing)
            for number, column in enumerate(columns, start=1):
                grads = gradients(outputs, uses, column, last=number == len(columns))
                self._add_column(owned, dict(zip(uses, grads, strict=True)), batch, positions)
            if not self.is_second_pass:
                self._add_inputs(positions, [(target, found) for target, found in owned if self._is_factored(target)])

    def _masked(self, batch: Batch, uses: Sequence[Use]) -> set[Use]:
        """Uses whose positions may be the tokens: elsewhere there may be as many of another kind."""
        if batch.attended is None:
            return set()
        return examples_first(self.model, batch.inputs, len(batch), uses, self.outputs_of)

    @property
    def _needs_examples(self) -> bool:
        """Whether some sum adds an example's positions before it squares: it must know which belong to which."""
        is_reduced = self.curvature.config.weight_sharing == "reduce"
        return is_reduced or not all(self._is_factored(target) for target in self.targets)

    def _is_factored(self, target: Target) -> bool:
        """Whether its sums are Kronecker factors; a normalisation has the exact diagonal."""
        return (
            target.rule.kind.has_factors
            and self.curvature.config.curvature in ("kfac", "ekfac")
            and not self.is_second_pass
        )

    def _generators(self, batch: Batch) -> list[torch.Generator]:
        """Return a generator of Monte-Carlo labels per example: the same in batches of any size, and after a resume.

        An example is known by its place in the dataset, else by its number among those that this process saw: a loader
        in the dataset's order gives the same.
        """
        process = f"{self._process}/" if self._process else ""
        names = [f"{n}" for n in batch.numbers or ()]
        names = names or [f"{process}{self._num_seen + i}" for i in range(len(batch))]
        return [_generator(f"{self.curvature.config.seed}/{name}") for name in names]

    # -- what is backpropagated --------------------------------------------------------------------------------------

    def _columns(self, outputs: Tensor, batch: Batch, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
        config = self.curvature.config
        if config.fisher == "empirical":
            if batch.labels is None:
                raise ValueError('`fisher`="empirical" needs labels in every batch; "exact" and "mc" need none.')
            yield self._likelihood.empirical_column(outputs, batch.labels)
            return
        if config.fisher == "mc":
            found = self._likelihood.sampled_columns(outputs, num_samples=config.num_mc_samples, generator=generators)
        else:
            found = self._likelihood.hessian_columns(outputs)
        counted = self._counted(outputs, batch)
        for column in found:
            column = column if counted is None else column * counted
            if outputs.ndim == 2 or config.fisher == "mc":
                yield column
            else:
                yield from _by_position(column)

    def _counted(self, outputs: Tensor, batch: Batch) -> Tensor | None:
        """1 where an output has a loss term: by its label, else by the attention mask."""
        if batch.labels is not None:
            return self._likelihood.label_mask(outputs, batch.labels).to(outputs.dtype)
        if outputs.ndim == 3 and batch.attended is not None and batch.attended.shape == outputs.shape[:2]:
            return batch.attended.unsqueeze(-1).to(outputs.dtype)
        return None

    def _count(self, outputs: Tensor, batch: Batch) -> None:
        sums, likelihood = self.curvature, self._likelihood
        if self.is_second_pass:
            return
        sums.num_examples += len(batch)
        if not likelihood.has_noise:  # N C of the batch: outputs that a loss term reads
            counted = self._counted(outputs, batch)
            sums.num_outputs += outputs.numel() if counted is None else int(counted.expand_as(outputs).count_nonzero())
        if batch.labels is None:
            sums.log_likelihood = float("nan")
            return
        sums.log_likelihood += float(likelihood.log_likelihood(outputs, batch.labels))
        if likelihood.has_noise:
            residual = outputs.double() - batch.labels.reshape(outputs.shape).double()
            sums.squared_error += float(residual.square().sum())
            sums.num_outputs += outputs.numel()

    # -- sums of gradients -------------------------------------------------------------------------------------------

    def _add_column(self, owned: Owned, grads: Mapping[Use, Tensor], batch: Batch, positions: _Positions) -> None:
        for target, uses in owned:
            found = [(grads[use],) for use in uses]
            block = cast(GaussianBlock, _near(target))  # of which captures need all but a variance
            if not self._is_factored(target):
                self._add_squares(target, captured_block(block, uses, found, len(batch)))
            elif self.curvature.config.weight_sharing == "reduce" and target.rule.is_affine:
                summed = captured_block(block, uses, found, len(batch)).gradients[:, :, 0].sum(2)  # (K, B, d_out)
                self.curvature.add_second_moment(target.name, "gradients", summed, self.device)
                positions.note(uses, grads)
            else:
                for use in uses:
                    g = _trained_rows(use, use.rule.gradients(use.module, grads[use]))
                    self.curvature.add_second_moment(target.name, "gradients", g.flatten(1, 2), self.device)
                positions.note(uses, grads)

    def _add_inputs(self, positions: _Positions, owned: Owned) -> None:
        """Layers that read the same tensor (query, key, value) share its second moment."""
        readers = Counter(positions.key(target, use) for target, uses in owned for use in uses)
        moments: dict[Any, Tensor] = {}
        for target, uses in owned:
            add = partial(self.curvature.add, target.name, device=self.device)
            if isinstance(target.rule, EmbeddingRule):
                counts = torch.stack([positions.counts(use) for use in uses]).sum(0)
                add("inputs", counts)
                add("count", counts.sum())
                continue
            for use, rows, with_one in positions.rows(target, uses):
                key = positions.key(target, use)
                if readers[key] == 1:
                    self.curvature.add_second_moment(target.name, "inputs", rows, self.device, with_one=with_one)
                else:
                    moments[key] = _second_moment(rows, with_one) if key not in moments else moments[key]
                    add("inputs", moments[key])
                add("count", rows.new_tensor(float(rows.shape[1])))

    def _add_squares(self, target: Target, captured: Captured) -> None:
        if self.curvature.config.curvature == "dense":
            rows = captured.jacobian().movedim(0, 2).flatten(2).flatten(0, 1)
            self.curvature.add_second_moment(target.name, "products", rows.unsqueeze(0), self.device)
            return
        for part in captured.split(max(1, _CHUNK_ELEMENTS // target.num_weights)):
            self.curvature.add(target.name, "squares", part.squares(), self.device)


class _Positions:
    """Which positions of a batch count, and what layers read there: rows (K, P, d_in') whose second moment is A.

    By the attention mask where the positions are the tokens. Elsewhere all, or, in a model with padding, those that a
    gradient reaches (a pooler has one position, a mixture's expert some tokens of all examples).

    Args:
        batch: of which.
        masked: uses whose positions are tokens if they are as many.
        sharing: "expand" or "reduce".
    """

    def __init__(self, batch: Batch, masked: set[Use], sharing: str) -> None:
        self._batch, self._masked, self._sharing = batch, masked, sharing
        self._reached: dict[Use, Tensor] = {}
        self._numbers: dict[int | None, Tensor] = {}

    def key(self, target: Target, use: Use) -> Any:
        """Equal where the rows are: linear layers that read the same memory, and the same positions of it."""
        is_alone = use in self._reached or self._sharing == "reduce" or not isinstance(use.rule, LinearRule)
        place = (use.input.data_ptr(), use.input.shape, use.input.stride())
        return use if is_alone else (*place, tuple(target.parameters))

    def rows(self, target: Target, uses: Sequence[Use]) -> Iterator[tuple[Use, Tensor, bool]]:
        """Every position of every use that counts, and whether a 1 belongs behind it; with "reduce" averages."""
        if self._sharing == "reduce":
            yield uses[0], self._averages(target, uses), False
            return
        for use in uses:
            kept = self._counting(use.rule.inputs(use.module, use.input).to(use.dtype), use)
            is_whole = [*target.parameters] == ["weight", "bias"]
            yield use, kept if is_whole else in_block(target.parameters, kept), is_whole

    def _counting(self, a: Tensor, use: Use) -> Tensor:
        """Inputs (K, P, d_in) of the positions that count, of inputs (K, B, T, d_in)."""
        mask, flat = self._mask(a, use), a.flatten(1, 2)
        key = id(mask) if mask is self._batch.attended else None  # one mask of most layers: looked through once
        numbers = self._numbers[key] if key in self._numbers else mask.flatten().nonzero()[:, 0]
        if key is not None:
            self._numbers[key] = numbers
        return flat if len(numbers) == flat.shape[1] else flat.index_select(1, numbers)

    def _averages(self, target: Target, uses: Sequence[Use]) -> Tensor:
        sums, counts = [], []
        for use in uses:
            a = use.inputs(len(self._batch)).to(use.dtype)
            mask = self._mask(a, use)
            sums.append(torch.einsum("kbtj,bt->kbj", a, mask.to(a.dtype)))
            counts.append(mask.sum(1))
        total = torch.stack(counts).sum(0).clamp_min(1)
        return in_block(target.parameters, torch.stack(sums).sum(0) / total[:, None])

    def counts(self, use: Use) -> Tensor:
        """How often each row of a table was looked up, (rows,)."""
        ids = use.rule.inputs(use.module, use.input)
        kept = ids[:, self._mask(ids, use)].flatten()
        padding = getattr(use.module, "padding_idx", None)
        kept = kept if padding is None else kept[kept != padding]
        table = use.module._parameters["weight"]
        assert table is not None  # of an Embedding
        return torch.bincount(kept, minlength=len(table)).to(use.dtype)

    def _mask(self, a: Tensor, use: Use) -> Tensor:
        """Which positions (B, T) of inputs (K, B, T, ...) count."""
        if use in self._reached:
            return self._reached[use]
        if self._batch.attended is not None and a.shape[1:3] == self._batch.attended.shape:
            return self._batch.attended
        return torch.ones(a.shape[1:3], dtype=torch.bool, device=a.device)

    def note(self, uses: Sequence[Use], grads: Mapping[Use, Tensor]) -> None:
        """Of one column's gradients."""
        for use in uses if self._batch.has_padding else ():
            g = use.rule.gradients(use.module, grads[use])
            if not self._has_own_mask(use, g.shape[1:3]):
                now = self._beyond_rounding(use, g.abs().amax((0, -1)))
                self._reached[use] = now | self._reached[use] if use in self._reached else now

    def _beyond_rounding(self, use: Use, sizes: Tensor) -> Tensor:
        """Of largest gradients (B, T): a query with one key has gradient 0, of which rounding may leave a trace."""
        peak = sizes.amax(1, keepdim=True) if use in self._masked else sizes.amax()
        return sizes > _ROUNDING * torch.finfo(sizes.dtype).eps * peak

    def _has_own_mask(self, use: Use, shape: torch.Size) -> bool:
        attended = self._batch.attended
        is_pooled = shape == (len(self._batch), 1)
        return attended is not None and use in self._masked and (shape == attended.shape or is_pooled)


def _second_moment(rows: Tensor, with_one: bool) -> Tensor:
    """Return sum_p r_p r_p^T of rows (K, P, d), or of (r_p, 1): the upper triangle."""
    width = rows.shape[-1] + with_one
    total = rows.new_zeros(len(rows), width, width)
    add_second_moment(total, rows, with_one=with_one)
    return total


def _generator(name: str) -> torch.Generator:
    key = hashlib.blake2b(name.encode(), digest_size=4).digest()  # a CPU generator takes 32 bits
    return torch.Generator().manual_seed(int.from_bytes(key))


def _by_position(column: Tensor) -> Iterator[Tensor]:
    """(B, T, C) as T columns with one position each: backpropagated together, positions would mix."""
    for position in range(column.shape[1]):
        alone = torch.zeros_like(column)
        alone[:, position] = column[:, position]
        if bool(alone.any()):
            yield alone


def _trained_rows(use: Use, gradients: Tensor) -> Tensor:
    """Gradients of a table less those of its padding row, which torch does not train."""
    padding = getattr(use.module, "padding_idx", None)
    if padding is None:
        return gradients
    is_trained: Tensor = use.rule.inputs(use.module, use.input) != padding
    return gradients * is_trained.unsqueeze(-1)


def _near(target: Target) -> Target:
    """With its basis on the layer's device for one batch: the sums may live elsewhere, for want of room."""
    if target.left is None and target.right is None:
        return target
    device = next(iter(target.parameters.values())).device
    left, right = (None if basis is None else basis.to(device) for basis in (target.left, target.right))
    return replace(target, left=left, right=right)


def _check_outputs(outputs: Tensor, batch: Batch) -> None:
    if outputs.ndim not in (2, 3) or len(outputs) != len(batch):
        raise ValueError(
            f"`logits` must give (B, C) or (B, T, C) for {len(batch)} examples, got {tuple(outputs.shape)}."
        )
    if not bool(outputs.isfinite().all()):
        raise ValueError("The model's outputs are not finite (NaN or infinity): check its weights and this batch.")
