"""The formulas beside the tensors of a tiny decoder, as every process of a launch holds them after a training step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from bayeformers import to_bayesian

from .formulas import HALF, Decoder, Engine, Held, Lora, activations, draws, held, lora_weights

TINY = Decoder(vocabulary=67, hidden=48, intermediate=84, layers=2, heads=4, kv_heads=2)
# three pairs of Linears to adapt; neither 48 / 5 nor 67 / 2 is whole
LORA = Lora(rank=5, targets=("q_proj", "v_proj"))
BATCH, LENGTH = 3, 160
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def tiny(decoder: Decoder = TINY, lora: Lora = LORA, itemsize: int = 4) -> nn.Module:
    """A decoder of these sizes with a Bayesian adapter, in training."""
    config = LlamaConfig(
        vocab_size=decoder.vocabulary, hidden_size=decoder.hidden, intermediate_size=decoder.intermediate,
        num_hidden_layers=decoder.layers, num_attention_heads=decoder.heads, num_key_value_heads=decoder.kv_heads,
        tie_word_embeddings=decoder.tied, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(_DTYPES[itemsize])
    settings = LoraConfig(r=lora.rank, target_modules=list(lora.targets), task_type="CAUSAL_LM")
    matrices = ["lora_A", "lora_B"] if lora.both else ["lora_A"]
    return to_bayesian(get_peft_model(base, settings), delta=0.1, freeze=False, target_modules=matrices).train()


def tokens(decoder: Decoder = TINY, batch: int = BATCH, length: int = LENGTH) -> dict[str, Tensor]:
    ids = torch.randint(decoder.vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def kept(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The loss of a forward, and the bytes that it keeps for backward beside the parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found = dict[int, Any]()  # the storages themselves: else a freed one's address may be given away again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    return loss, sum(storage.nbytes() for address, storage in found.items() if address not in own)


def local(tensors: Iterator[Tensor]) -> int:
    """Bytes of this process's pieces."""
    pieces = (getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors)
    return sum(piece.numel() * piece.element_size() for piece in pieces)


def sharded(model: nn.Module, engine: Engine) -> nn.Module:
    """The model as an engine that runs without a GPU takes it."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def step(engine: Engine) -> tuple[Held, int]:
    """What this process holds after a step of AdamW, and what its forward kept."""
    model = sharded(tiny(), engine)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained)
    loss, bytes_kept = kept(model, tokens())
    loss.backward()
    adamw.step()
    gradients = (parameter.grad for parameter in trained if parameter.grad is not None)
    states = (state for states in adamw.state.values() for state in states.values())
    return Held(local(iter(model.parameters())), local(gradients), local(states)), bytes_kept


def expected(engine: Engine, world: int, rank: int) -> Held:
    return held(lora_weights(TINY, LORA, itemsize=4), engine, world, rank)


def measured(folder: Path, world: int = 2) -> list[dict[str, Any]]:
    """Start ``world`` processes, and read what each of them found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command += ["-m", "benchmarks.device_memory.measure", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the processes that measure have failed:\n{done.stderr[-3000:]}")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {engine: step(engine) for engine in ("ddp", "fsdp2")}
    rows = {engine: {**asdict(sums), "kept": bytes_kept} for engine, (sums, bytes_kept) in found.items()}
    torch.save(rows, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torn down by the interpreter, gloo's threads abort a process now and then


def error_of_activations(decoder: Decoder = TINY, lora: Lora = LORA, itemsize: int = HALF) -> float:
    """How far the formula is above what one process keeps, relative to it."""
    _, found = kept(tiny(decoder, lora, itemsize), tokens(decoder))
    weights = sum(weight.elements for weight in lora_weights(decoder, lora) if weight.trained) // 2
    return (activations(decoder, BATCH, LENGTH, lora, itemsize) + draws(weights)) / found - 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
