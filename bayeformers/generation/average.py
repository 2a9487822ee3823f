"""One answer by all draws: each token comes from the mean over networks of their next-token probabilities."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..forward import wide
from .networks import Networks, rows_of, standing_in
from .recording import Recorder

Forward = Callable[..., Any]


def average_answer(
    networks: Networks, inputs: Mapping[str, Any], options: Mapping[str, Any], recorder: Recorder | None
) -> Tensor:
    """Return sequences (R, T), each token chosen by the mean of all networks.

    Transformers' own ``generate`` runs on R rows; inside its forward S * R rows run and log mean_s p_s comes out as
    logits. So all that is done with logits (processors, warpers, beams, streamers) is done with those of the mean.

    Args:
        networks: the draws.
        inputs: of B rows.
        options: of ``generate``.
        recorder: notes the tokens' entropies; None under beams, whose rows change places.
    """
    parts = {networks.generator: _averaged(networks, networks.generator.forward, recorder or Recorder())}
    if networks.generator.config.is_encoder_decoder:
        encoder = networks.generator.get_encoder()
        parts[encoder] = _of_all(networks, encoder.forward)
    with standing_in(parts):
        sequences = networks.generate(**inputs, **options)
    return sequences


def _averaged(networks: Networks, own: Forward, recorder: Recorder) -> Forward:
    """R rows go in, S * R rows run, R rows of averaged logits come out; the cache holds those of all networks."""

    @functools.wraps(own)
    def forward(**arguments: Any) -> Any:
        size = rows_of(arguments)
        output = _run(networks, own, arguments, size)
        log_probs = wide(output.logits[:, -1]).log_softmax(-1).view(len(networks), size, -1)
        mean = recorder.step(log_probs)
        # of one network its own logits, for a processor may tell them from log-probabilities (repetition_penalty)
        output.logits = output.logits[:, -1:] if len(networks) == 1 else mean[:, None]
        cache = output.get("past_key_values")
        if hasattr(type(cache), "reorder_cache"):  # beams that change places do so in the rows of every network
            vars(cache)["reorder_cache"] = functools.partial(networks.reorder, cache)
        return output

    vars(forward)["__signature__"] = _without_features(own)
    return forward


def _without_features(own: Forward) -> inspect.Signature:
    # where a forward names `mm_encoder_outputs`, `generate` encodes the images before, by one network for all draws
    signature = inspect.signature(own)
    return signature.replace(parameters=[p for name, p in signature.parameters.items() if name != "mm_encoder_outputs"])


def _of_all(networks: Networks, own: Forward) -> Forward:
    """What stands in for an encoder's forward: B rows go in, S * B rows come out."""

    @functools.wraps(own)
    def forward(**arguments: Any) -> Any:
        return _run(networks, own, arguments, rows_of(arguments))

    return forward


def _run(networks: Networks, own: Forward, arguments: Mapping[str, Any], size: int) -> Any:
    with networks.installed(size):
        return networks.run(own, arguments, size)
