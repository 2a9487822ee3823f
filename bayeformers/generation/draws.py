"""S answers, each by one network with its own cache: a batch of S * B rows, or one network after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..forward import wide
from .networks import Networks, expanded, rows_of, standing_in
from .recording import Recorder


def drawn_answers(
    networks: Networks,
    inputs: Mapping[str, Any],
    options: Callable[[Recorder], Mapping[str, Any]],
    *,
    expand: int,
    records: bool,
) -> list[tuple[Tensor, Recorder]]:
    """Return sequences (R, T), draw-major, and what was noted of each token, of the batch or of each draw.

    Beams and several sequences per input stand beside each other, so that rows stay draw-major.

    Args:
        networks: the draws.
        inputs: of B rows.
        options: of transformers' ``generate``, with a recorder in it.
        expand: how many rows ``generate`` makes of one.
        records: whether rows keep their places, so that tokens' entropies can be noted.
    """
    count, size = len(networks), rows_of(inputs)
    if networks.batched is not None:
        with networks.installed(size, size * expand):
            return [_answer(networks, expanded(inputs, size, count), options, records)]
    found = []
    for index in networks.indices:
        with networks.draw(index):
            found.append(_answer(networks, inputs, options, records))
    return found


def _answer(
    networks: Networks, inputs: Mapping[str, Any], options: Callable[[Recorder], Mapping[str, Any]], records: bool
) -> tuple[Tensor, Recorder]:
    recorder, own = Recorder(), networks.generator.forward

    @functools.wraps(own)
    def forward(**arguments: Any) -> Any:
        output = own(**arguments)
        recorder.step(wide(output.logits[:, -1]).log_softmax(-1)[None])
        return output

    with standing_in({networks.generator: forward} if records else {}):
        sequences = networks.generate(**inputs, **options(recorder))
    return sequences, recorder


def padded(tensors: list[Tensor], value: float) -> Tensor:
    """Stack (R, T_i) along the rows, filled at the end to the longest."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors])
