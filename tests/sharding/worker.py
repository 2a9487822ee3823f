"""Run by `torchrun` in some processes: what a sharded model gives, gathered, into one file of the first process."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import bayeformers
from bayeformers import fixed_draw, kl_divergence, predict, to_bayesian, to_deterministic
from bayeformers.nn import variational_tensors
from bayeformers.processes.dtensors import reshard, whole, write
from bayeformers.sharding import shard
from tests.training import steps, tiny

EXAMPLES = 8
DRAW = 3
PRIORS: dict[str, Any] = {
    "moped": bayeformers.MopedPrior(),
    "relative": bayeformers.RelativePrior(),
    "layer": bayeformers.EmpiricalBayesPrior(per="layer"),
    "mixture": bayeformers.ScaleMixturePrior(),
    "double": bayeformers.DoubleExponentialPrior(),
}


def moved(model: nn.Module) -> nn.Module:
    """Means and scales away from the prior, the same at every call and split in whatever way."""
    generator = torch.Generator().manual_seed(1)
    for tensor in variational_tensors(model):
        shift = 0.2 * torch.randn(tensor.rho.shape, generator=generator)
        with torch.no_grad():
            write(tensor.rho, whole(tensor.rho) + shift)
            write(tensor.loc, whole(tensor.loc) * (1 + 0.05 * shift))
    return model


def inputs_of(kind: str) -> dict[str, Tensor]:
    """A batch of which each of up to 4 processes takes as many items: no padding where tokens are counted."""
    columns = dict(tiny.dataset(kind, EXAMPLES).columns)
    if kind == "causal":
        columns = {"input_ids": columns["input_ids"], "labels": columns["input_ids"]}
    return columns


def by_hand(model: nn.Module, **options: Any) -> nn.Module:
    """Layers, then the table and its head together, then the model: as accelerate's plugin shards."""
    for module in list(model.modules()):
        if type(module).__name__ in ("BertLayer", "GPT2Block"):
            fully_shard(module, **options)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    fully_shard([table] if head is None else [table, head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    return model


def made(kind: str, how: str, freeze: bool, **options: Any) -> nn.Module:
    """A model converted, and sharded before or after that, in different groups; or not at all."""
    conversion = {"prior": options.pop("prior", None)}
    if how == "before":
        return shard(to_bayesian(tiny.plain(kind), 0.2, freeze, **conversion), **options)
    if how == "after":
        return to_bayesian(shard(tiny.plain(kind), **options), 0.2, freeze, **conversion)
    if how == "tables":
        return to_bayesian(by_hand(tiny.plain(kind), **options), 0.2, freeze, **conversion)
    if how == "late":
        model = by_hand(tiny.plain(kind), **options)
        model(**inputs_of(kind)).loss.backward()
        model.zero_grad()
        return to_bayesian(model, 0.2, freeze, **conversion)
    return to_bayesian(tiny.plain(kind), 0.2, freeze, **conversion)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    reshard(model)
    return {name: whole(tensor).detach().clone() for name, tensor in model.state_dict().items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    reshard(model)
    return {n: whole(p.grad).detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def described(kind: str, how: str, freeze: bool, prior: str = "moped", precision: Any = None) -> dict[str, Any]:
    """State after the conversion; KL, gradient of an ELBO in a held draw, log probabilities of three draws."""
    options = {} if precision is None or how == "alone" else {"mp_policy": precision}
    model = made(kind, how, freeze, prior=PRIORS[prior], **options)
    state, model = gathered(model), moved(model).train()
    batch, rank, size = inputs_of(kind), process_index(how), num_processes(how)
    own = {name: value.chunk(size)[rank] for name, value in batch.items()}
    found: dict[str, Any] = {"state": state, "kl": kl_divergence(model).detach(), "gradients": []}
    for _ in range(2):  # the second after whole Parameters were there, and freed
        model.zero_grad()
        with fixed_draw(model, DRAW), torch.autocast("cpu", torch.bfloat16, enabled=how == "alone" and bool(precision)):
            loss = model(**own).loss.float()
        (loss + kl_divergence(model) / 50).backward()
        found["gradients"].append(gradients(model))
    asked = {name: value for name, value in batch.items() if name != "labels"}
    found["log_probs"] = predict(model, asked, num_samples=3).log_probs
    found["kl again"] = kl_divergence(model).detach()
    found["dtypes"] = {str(tensor.rho.dtype) for tensor in variational_tensors(model)}
    plain = to_deterministic(model)
    plain.zero_grad()
    plain(**own).loss.backward()
    found["deterministic"] = sorted(name for name, _ in plain.named_parameters())
    return found


def process_index(how: str) -> int:
    return 0 if how == "alone" else dist.get_rank()


def num_processes(how: str) -> int:
    return 1 if how == "alone" else dist.get_world_size()


def refusals() -> dict[str, str]:
    """What is said of a policy that casts scales, and of a tensor that tensor parallelism has split."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    cast = to_bayesian(tiny.plain(), 0.2)
    fully_shard(cast, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = nn.Sequential(nn.Linear(4, 4))
    late = parallelize_module(to_bayesian(nn.Sequential(nn.Linear(4, 4)), 0.2), mesh, {"0": ColwiseParallel()})
    parallelize_module(split, mesh, {"0": ColwiseParallel()})
    calls: dict[str, Callable[[], Any]] = {
        "cast": lambda: cast.train()(**inputs_of("single")),
        "late": lambda: late.train()(torch.ones(2, 4)),
        "split": lambda: to_bayesian(split, 0.2),
    }
    return {name: _error(call) for name, call in calls.items()}


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def trained(folder: Path, kind: str, how: str, accumulation: int = 1) -> dict[str, Any]:
    """A training under a held draw with a checkpoint on the way; and one that goes on from there."""
    options = {
        "max_steps": 3, "gradient_accumulation_steps": accumulation, "train_sampling_strategy": "sequential",
        "optim": "sgd", "learning_rate": 1e-2, "rho_learning_rate": 1e-2, "max_grad_norm": 1.0,
        "per_device_train_batch_size": 8 // num_processes(how),
    }  # fmt: skip
    data = {"train_dataset": tiny.dataset(kind, 48), "eval_dataset": tiny.dataset(kind, 9, seed=5)}
    kept = steps.Gradients()
    trainer = tiny.trainer(
        folder, made(kind, how, False), kind, save_strategy="steps", save_steps=2, callbacks=[kept], **data, **options
    )
    with fixed_draw(trainer.model, DRAW):
        trainer.train()
    state = gathered(trainer.model)
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "saved"))
    again = tiny.trainer(folder, made(kind, how, False), kind, **data, **options)
    with fixed_draw(again.model, DRAW):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {
        "gradients": [{name: whole(grad) for name, grad in step["grads"].items()} for step in kept.steps],
        "state": state,
        "resumed": gathered(again.model),
        "metrics": metrics,
        "logs": [entry for entry in trainer.state.log_history if "nll" in entry],
    }


def fitted(folder: Path, how: str) -> dict[str, Any]:
    """A Laplace posterior of the Trainer: its evidence, evaluation by both methods, and its folder."""
    model = tiny.plain()
    trainer = tiny.trainer(folder, model if how == "alone" else shard(model), per_device_eval_batch_size=8)
    posterior = trainer.fit_laplace(prior_precision=1.0)
    found = {"evidence": posterior.log_marginal_likelihood, "glm": trainer.evaluate()}
    trainer.args.eval_method = "sample"
    found["sample"] = trainer.evaluate()
    trainer.save_model(str(folder))
    return found


def adapted(folder: Path, how: str) -> dict[str, Tensor]:
    """A LoRA posterior, saved as PEFT saves; and its state."""
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"])
        model: Any = peft.get_peft_model(tiny.plain("causal"), config)
    if how == "after":
        model = shard(model)
    model = to_bayesian(model, 0.2)
    if how == "before":
        model = shard(model)
    moved(model).save_pretrained(folder)
    return gathered(model)


def quick(folder: Path) -> dict[str, Any]:
    return {
        "described": described("single", "before", False),
        "trained": trained(folder / "trained", "single", "before"),
        "refusals": refusals(),
    }


CASES = [("single", how, freeze) for how in ("before", "after", "tables", "late") for freeze in (True, False)]
CASES += [("causal", how, False) for how in ("before", "tables")]


def full(folder: Path) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {
        "described": {case: described(*case) for case in CASES},
        "priors": {name: described("single", "before", False, name) for name in PRIORS},
        "bf16": {how: described("single", how, False, "moped", policy) for how in ("before", "after")},
        "trained": {k: trained(folder / f"{k[0]}{k[1]}", k[0], "before", k[1]) for k in (("single", 2), ("causal", 1))},
        "fitted": fitted(folder / "laplace", "before"),
        "adapted": {how: adapted(folder / f"lora {how}", how) for how in ("before", "after")},
    }


def main(folder: Path, what: str) -> None:
    results = {"quick": quick, "full": full}[what](folder)
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    gc.freeze()
    tiny.arguments(sys.argv[1]).device  # noqa: B018  makes the group of processes
    main(Path(sys.argv[1]), sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
