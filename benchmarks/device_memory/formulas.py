"""Bytes of a Bayesian model on one of W devices: closed formulas, which `measure` holds against tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Engine = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
Curvature = Literal["kfac", "ekfac", "diagonal", "dense"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
FLOAT, HALF = 4, 2  # bytes of a float32 and of a bfloat16
ADAM_STATES = 2  # of the parameter's shape and dtype, and a float32 count of steps
# which of (parameters, gradients, optimizer) are in W pieces
_SHARDED: Mapping[Engine, tuple[bool, bool, bool]] = {
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp2": (True, True, True),
}


@dataclass(frozen=True)
class Weight:
    """A parameter: a mean, a rho (float32) or what stays deterministic."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Held:
    """Bytes on one device between two steps, gradients not yet cleared."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def held(weights: Iterable[Weight], engine: Engine, world: int, rank: int = 0) -> Held:
    """What one of ``world`` devices holds: parameters, their gradients and AdamW's two states.

    DeepSpeed's float32 copy of half-precision parameters (Rajbhandari et al. 2020, section 3.1) counts as optimizer.
    """
    sums = [0, 0, 0]
    for weight in weights:
        pieces = [_piece(weight, engine, world, rank) if is_cut else weight.elements for is_cut in _SHARDED[engine]]
        sums[0] += pieces[0] * weight.itemsize
        if weight.trained:
            sums[1] += pieces[1] * weight.itemsize
            sums[2] += ADAM_STATES * pieces[2] * (FLOAT if engine.startswith("zero") else weight.itemsize) + FLOAT
            if engine.startswith("zero") and weight.itemsize < FLOAT:
                sums[2] += pieces[2] * FLOAT
    return Held(*sums)


def _piece(weight: Weight, engine: Engine, world: int, rank: int) -> int:
    """Elements of one device: FSDP2 cuts the first axis, DeepSpeed what is flattened."""
    rows = weight.shape[0] if engine == "fsdp2" and weight.shape else weight.elements
    share = -(-rows // world)
    return min(share, max(rows - rank * share, 0)) * (weight.elements // rows)


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder of Llama's kind, by which alone its weights and activations are counted."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, int]) -> Decoder:
        """Of a ``config.json``, whose heads are hidden_size / num_attention_heads wide."""
        heads = config["num_attention_heads"]
        return cls(
            config["vocab_size"], config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"],
            heads, config.get("num_key_value_heads") or heads, bool(config.get("tie_word_embeddings", False)),
        )  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes of a layer's Linear weights."""
        h, f, k = self.hidden, self.intermediate, self.kv_heads * self.head_dim
        attention = {"q_proj": (h, h), "k_proj": (k, h), "v_proj": (k, h), "o_proj": (h, h)}
        return {**attention, "gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}

    @property
    def layer(self) -> list[tuple[int, ...]]:
        return [*self.linears.values(), (self.hidden,), (self.hidden,)]

    @property
    def outside(self) -> list[tuple[int, ...]]:
        """The embeddings, the last norm, and the head unless it is the embeddings."""
        table = (self.vocabulary, self.hidden)
        return [table, (self.hidden,), *([] if self.tied else [table])]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return self.layer * self.layers + self.outside


SIZES = {
    "7B": Decoder(32_000, 4096, 11_008, 32, 32, 32),  # Llama 2, Touvron et al. 2023
    "70B": Decoder(32_000, 8192, 28_672, 80, 64, 8),
}


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter of a decoder: float32 matrices A (r, in) and B (out, r), Bayesian either both or A alone."""

    rank: int = 16
    targets: Sequence[str] = ("q_proj", "v_proj")
    both: bool = True

    def shapes(self, decoder: Decoder) -> list[tuple[int, ...]]:
        """Of one layer: A and B in turn."""
        sizes = [decoder.linears[name] for name in self.targets]
        return [shape for out, inputs in sizes for shape in ((self.rank, inputs), (out, self.rank))]

    def bayesian(self, decoder: Decoder) -> list[tuple[int, ...]]:
        """Those with a rho."""
        return self.shapes(decoder)[:: 1 if self.both else 2]


def lora_weights(decoder: Decoder, lora: Lora, itemsize: int = HALF) -> list[Weight]:
    """A frozen base of ``itemsize`` bytes a weight, and in each layer a trained adapter with its rho."""
    base = [Weight(shape, itemsize, False) for shape in decoder.shapes]
    adapter = [*lora.shapes(decoder), *lora.bayesian(decoder)] * decoder.layers
    return base + [Weight(shape, FLOAT, True) for shape in adapter]


def full_weights(decoder: Decoder, itemsize: int, trains_means: bool) -> list[Weight]:
    """Every matrix Bayesian: means of ``itemsize`` bytes, a trained float32 rho each; norms are deterministic."""
    means = [Weight(shape, itemsize, trains_means) for shape in decoder.shapes]
    return means + [Weight(shape, FLOAT, True) for shape in decoder.shapes if len(shape) == 2]


def gathered(decoder: Decoder, lora: Lora | None, engine: Engine, itemsize: int = HALF) -> int:
    """Bytes that FSDP2 and ZeRO-3 hold whole while a layer computes: it, the next one, and what is in no layer."""
    if not _SHARDED[engine][0]:
        return 0
    layer = itemsize * sum(map(math.prod, decoder.layer))
    if lora is not None:
        layer += FLOAT * sum(map(math.prod, [*lora.shapes(decoder), *lora.bayesian(decoder)]))
    return 2 * layer + itemsize * sum(map(math.prod, decoder.outside))


def activations(
    decoder: Decoder, batch: int, length: int, lora: Lora, itemsize: int = HALF, *, checkpointing: bool = False
) -> int:
    """Bytes that a training forward keeps for backward on one device, of (``batch``, ``length``) tokens of its own.

    Per layer and token: two norms in float32, q and the attention's output, k and v, three vectors of the gated MLP,
    one number per head (SDPA), and per adapted Linear a float32 copy of its input (shared where the base is float32)
    and the r values between A and B. Once: the logits in float32, and the rotary tables. No dropout. Checkpointing
    keeps each layer's input instead, and one layer's activations while it is recomputed.
    """
    h, wide = decoder.hidden, itemsize * decoder.intermediate
    copies = len(lora.targets) if itemsize < FLOAT else min(len(lora.targets), 1)
    adapters = copies * FLOAT * h + len(lora.targets) * FLOAT * lora.rank
    attention = itemsize * 2 * (h + decoder.kv_heads * decoder.head_dim) + FLOAT * decoder.heads
    layer = 2 * FLOAT * (h + 1) + attention + 3 * wide + adapters
    layers = decoder.layers * itemsize * h + layer if checkpointing else decoder.layers * layer
    once = FLOAT * decoder.vocabulary + 8  # and the label, an int64
    return batch * length * (layers + once) + 2 * itemsize * length * decoder.head_dim


def draws(elements: int) -> int:
    """At most so many bytes of a training draw of Bayesian weights are kept for backward.

    Noise, scale, its derivative, the drawn weight, and a mask: 4 x 4 + 1 per weight.
    """
    return 17 * elements


def loss_gradient(decoder: Decoder, batch: int, length: int, itemsize: int = HALF) -> int:
    """Bytes on top when the loss goes backward: two float32 arrays of logits more, and those that are not float32."""
    return batch * length * decoder.vocabulary * (2 * FLOAT + (itemsize if itemsize < FLOAT else 0))


@dataclass(frozen=True)
class Peak:
    """Bytes on one device where a training step needs most of them."""

    held: Held
    gathered: int
    activations: int
    draws: int
    loss: int

    @property
    def total(self) -> int:
        return self.held.total + self.gathered + self.activations + self.draws + self.loss


def training(
    decoder: Decoder, lora: Lora, engine: Engine, world: int, *, batch: int = 1, length: int = 2048,
    itemsize: int = HALF, checkpointing: bool = False,
) -> Peak:  # fmt: skip
    """A step of the ELBO with a LoRA posterior, on the device that holds most, of (``batch``, ``length``) tokens."""
    noisy = decoder.layers * sum(map(math.prod, lora.bayesian(decoder)))
    return Peak(
        held(lora_weights(decoder, lora, itemsize), engine, world),
        gathered(decoder, lora, engine, itemsize),
        activations(decoder, batch, length, lora, itemsize, checkpointing=checkpointing),
        draws(noisy),
        loss_gradient(decoder, batch, length, itemsize),
    )


def laplace(outputs: int, inputs: int, curvature: Curvature = "kfac") -> int:
    """Bytes of a fitted layer: eigenvectors and eigenvalues in float32; ``inputs`` counts the bias as one more.

    KFAC keeps the factors' eigenvalues beside their product.
    """
    weights = outputs * inputs
    numbers = {
        "kfac": outputs**2 + inputs**2 + weights + outputs + inputs,
        "ekfac": outputs**2 + inputs**2 + weights,
        "diagonal": weights,
        "dense": weights**2 + weights,
    }
    return FLOAT * numbers[curvature]


def laplace_fit(outputs: int, inputs: int) -> int:
    """About what a KFAC fit takes where it decomposes the larger factor, in float64: twelve times its float32 size."""
    return 12 * FLOAT * max(outputs, inputs) ** 2
