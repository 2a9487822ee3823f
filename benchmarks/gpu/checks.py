"""Is everything right on the device? Each check raises AssertionError where not, and returns the numbers it judged."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bayeformers import (
    BayesianTrainer,
    BayesianTrainingArguments,
    fixed_draw,
    from_pretrained,
    generate,
    kl_divergence,
    laplace,
    posterior_mean,
    predict,
)
from bayeformers.nn import variational_tensors
from bayeformers.nn.draws import bayesian_modules
from bayeformers.nn.noise import Draw
from bayeformers.processes import gathered, summed
from bayeformers.sampling import philox
from bayeformers.sampling.random_state import all_equal, preserved, rng_state, set_rng_state

from .setup import Inputs, Setup, Skipped, bayesian, bert, compilable, llama, optimizer, twins

Numbers = dict[str, float]


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest value, in float64 on the CPU."""
    found, expected = (tensor.detach().double().cpu() for tensor in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def below(limit: float, **errors: float) -> Numbers:
    """The errors, if all of them are numbers below ``limit``."""
    wrong = {name: value for name, value in errors.items() if not value <= limit}
    assert not wrong, f"must be <= {limit}: {wrong}"
    return errors


def noise(model: nn.Module, index: int) -> dict[str, Tensor]:
    """The noise of every random tensor in one draw, by name."""
    draw = Draw(0, index)
    specs = [(module, *item) for module in bayesian_modules(model).values() for item in module.specs.items()]
    return {spec.name: draw.noise(spec, module.get_parameter(name)) for module, name, spec in specs}


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits


def rho_gradients(model: nn.Module) -> Tensor:
    return torch.cat([tensor.rho.grad.flatten() for tensor in variational_tensors(model)])


# --- Draws -----------------------------------------------------------------------------------------------------------
def mean_equals_cpu(setup: Setup) -> Numbers:
    """Logits, KL and its gradient at the posterior mean."""
    cpu, device, inputs = twins(setup)
    divergences = [kl_divergence(model) for model in (cpu, device)]
    for divergence in divergences:
        divergence.backward()
    with posterior_mean(cpu), posterior_mean(device):
        found = error(logits(device, setup.moved(inputs)), logits(cpu, inputs))
    gradients = error(rho_gradients(device), rho_gradients(cpu))
    return below(1e-4, logits=found, kl=error(divergences[1], divergences[0]), kl_gradient=gradients)


def draws_equal_cpu(setup: Setup) -> Numbers:
    """Noise bit for bit, hence logits and gradients of a held draw up to rounding."""
    cpu, device, inputs = twins(setup)
    moved = setup.moved(inputs)
    for index in (0, 1, 1_000_003):
        for name, value in noise(cpu, index).items():
            assert torch.equal(noise(device, index)[name].cpu(), value), f"noise of {name} in draw {index}"
    with fixed_draw(cpu, 3), fixed_draw(device, 3):
        found = error(logits(device, moved), logits(cpu, inputs))
        cpu(**inputs).loss.backward()
        device(**moved).loss.backward()
    return below(1e-3, logits=found, gradient=error(rho_gradients(device), rho_gradients(cpu)))


def noise_of_device(setup: Setup) -> Numbers:
    """The noise that a GPU computes, whole and by rows far apart, bit for bit that of the CPU; with tails."""
    key, shape = philox.key_of("a tensor"), (50, 33) if setup.tiny else (4096, 1023)
    whole = philox.normal(key, shape, torch.device("cpu"))
    words, first = philox.words_of(key, setup.device), torch.zeros(1, dtype=torch.int64, device=setup.device)
    assert torch.equal(philox.traced_rows(words, first, whole.numel()).cpu().view(shape), whole)
    assert torch.equal(philox.normal(key, shape, setup.device).cpu(), whole)
    rows = torch.tensor([0, 3, 2**20, 2**40])
    found = philox.traced_rows(words, rows.to(setup.device), 77).cpu()
    assert torch.equal(found, philox.normal_rows(key, rows, 77)), "rows"
    return {"elements": whole.numel(), "largest": float(whole.abs().max())}


def draws_repeat(setup: Setup) -> Numbers:
    """One draw is one network: again, for some rows of the batch alone, and whatever was drawn before."""
    _, device, inputs = twins(setup)
    moved = setup.moved(inputs)
    with fixed_draw(device, 5):
        first = logits(device, moved)
    with fixed_draw(device, 6):
        other = logits(device, moved)
    torch.randn(7, device=setup.device)
    with fixed_draw(device, 5):
        again = logits(device, moved)
        rows = logits(device, {name: value[:2] for name, value in moved.items()})
    assert torch.equal(first, again), "the same draw twice"
    assert not torch.equal(first, other), "two draws are equal"
    return below(1e-4, rows=error(rows, first[:2]))


def prediction(setup: Setup) -> Numbers:
    """Averaged probabilities are the CPU's, sum to one, and have an epistemic part."""
    cpu, device, inputs = twins(setup)
    found = predict(device, setup.moved(inputs), num_samples=8)
    assert bool((found.mutual_information > 0).all())
    total = float((found.mean_log_probs.exp().sum(-1) - 1).abs().max())
    return below(
        1e-3, sum=total, log_probs=error(found.mean_log_probs, predict(cpu, inputs, num_samples=8).mean_log_probs)
    )


def random_state(setup: Setup) -> Numbers:
    """Predictions leave the default generators of CPU and device as they were; what was read can be put back."""
    _, device, inputs = twins(setup)
    torch.randn(3, device=setup.device)
    before = rng_state()
    assert len(before) == 1 + (torch.cuda.device_count() if setup.is_cuda else 0)
    predict(device, setup.moved(inputs), num_samples=2)
    assert all_equal(before, rng_state()), "predict"
    with preserved():
        values = torch.randn(5, device=setup.device)
    assert all_equal(before, rng_state()), "preserved"
    assert torch.equal(values, torch.randn(5, device=setup.device))
    set_rng_state(before)
    assert torch.equal(values, torch.randn(5, device=setup.device)), "set_rng_state"
    return {"generators": len(before)}


# --- Precision -------------------------------------------------------------------------------------------------------
def bfloat16(setup: Setup) -> Numbers:
    """A bfloat16 model keeps its rho in float32, draws the same noise, and is near the float32 model."""
    model, inputs = bert(Setup(torch.device("cpu"), tiny=True))
    half = bayesian(copy.deepcopy(model).to(torch.bfloat16)).to(setup.device).eval()
    whole, moved = bayesian(model).to(setup.device).eval(), setup.moved(inputs)
    assert {tensor.rho.dtype for tensor in variational_tensors(half)} == {torch.float32}
    for name, value in noise(whole, 2).items():
        assert torch.equal(noise(half, 2)[name], value), f"noise of {name}"
    with fixed_draw(half, 2), fixed_draw(whole, 2):
        found = error(logits(half, moved), logits(whole, moved))
    half.train()(**moved).loss.backward()
    assert bool(torch.isfinite(rho_gradients(half)).all())
    return below(0.05, logits=found, kl=error(kl_divergence(half), kl_divergence(whole)))


def autocast(setup: Setup) -> Numbers:
    """Under autocast the KL and the gradients by rho stay float32 and near what they are without."""
    _, device, inputs = twins(setup)
    moved, found = setup.moved(inputs), []
    for enabled in (False, True):
        device.zero_grad()
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=enabled), fixed_draw(device, 1):
            loss, divergence = device(**moved).loss, kl_divergence(device)
        assert divergence.dtype == torch.float32
        loss.float().backward()
        found.append((loss.float(), divergence, rho_gradients(device)))
    (loss, divergence, gradient), (half_loss, half_divergence, half_gradient) = found
    below(1e-6, kl=error(half_divergence, divergence))
    return below(0.1, loss=error(half_loss, loss), gradient=error(half_gradient, gradient))


# --- Training --------------------------------------------------------------------------------------------------------
def trainer(setup: Setup) -> Numbers:
    """Three steps of the ELBO in bfloat16, an evaluation, and a folder whose model is the one that was saved."""
    model, inputs = bert(Setup(torch.device("cpu"), tiny=True))
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(len(inputs["labels"]))] * 4
    with tempfile.TemporaryDirectory() as folder:
        args = BayesianTrainingArguments(
            folder, use_cpu=not setup.is_cuda, bf16=True, max_steps=3, per_device_train_batch_size=4, report_to="none",
            disable_tqdm=True, save_strategy="no", num_eval_samples=2,
        )  # fmt: skip
        job = BayesianTrainer(model=bayesian(model), args=args, train_dataset=rows, eval_dataset=rows)
        loss = job.train().training_loss
        assert next(job.model.parameters()).device.type == setup.device.type
        nll = job.evaluate()["eval_nll"]
        job.save_model(folder)
        loaded = from_pretrained(folder)
    for saved, trained in zip(loaded.parameters(), job.model.parameters(), strict=True):
        assert torch.equal(saved, trained.detach().cpu())
    assert 0 < nll < 10 and loss > 0
    return {"loss": loss, "nll": nll}


def one_rank(setup: Setup) -> Numbers:
    """NCCL with one process: its sums, and the gradient of DistributedDataParallel (gloo on a CPU)."""
    if dist.is_initialized():
        raise Skipped("this process is in a launch")
    backend = "nccl" if setup.is_cuda else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        options = {"device_id": torch.device("cuda", 0)} if setup.is_cuda else {}
        dist.init_process_group(backend, store=store, rank=0, world_size=1, **options)
        try:
            return _one_rank(setup)
        finally:
            dist.destroy_process_group()


def _one_rank(setup: Setup) -> Numbers:
    total = torch.arange(3.0, device=setup.device)
    dist.all_reduce(total)
    assert total.tolist() == [0, 1, 2] and gathered("x") == ["x"] and torch.equal(summed(total), total)
    _, device, inputs = twins(setup)
    wrapped, found = DistributedDataParallel(copy.deepcopy(device)), []
    for model, whole in ((device, device), (wrapped.module, wrapped)):
        with fixed_draw(model, 4):
            (whole(**setup.moved(inputs)).loss + kl_divergence(model)).backward()
        found.append(rho_gradients(model))
    return below(1e-6, gradient=error(found[1], found[0]))


def compilation(setup: Setup) -> Numbers:
    """Without a graph break: a training step, the mean, and held draws equal to eager's."""
    model, moved = compilable(setup)
    compiled = setup.compiled(model)
    model.train()
    losses = [compiled(**moved).loss for _ in range(2)]
    assert not torch.equal(*losses), "two training forwards have the same noise"
    losses[0].backward()
    assert bool(torch.isfinite(rho_gradients(model)).all())
    model.eval()
    numbers = {"mean": error(logits(compiled, moved), logits(model, moved))}
    for index in range(1 if setup.tiny else 3):
        with fixed_draw(model, index):
            numbers[f"draw {index}"] = error(logits(compiled, moved), logits(model, moved))
    return below(1e-3, **numbers)


# --- Other posteriors ------------------------------------------------------------------------------------------------
def laplace_on_device(setup: Setup) -> Numbers:
    """Fits and linearised predictions of the CPU and the device, of factors, of a diagonal and of one dense head."""
    numbers: Numbers = {}
    for curvature, subset in (("kfac", "all"), ("diagonal", "all"), ("dense", "last_layer")):
        found = []
        for device in (torch.device("cpu"), setup.device):
            model, inputs = bert(Setup(torch.device("cpu"), tiny=True), initializer_range=0.3)
            inputs = {name: value.to(device) for name, value in inputs.items()}
            options: dict[str, Any] = {"curvature": curvature, "subset": subset, "fisher": "exact"}
            fitted = laplace.fit(model.to(device).eval(), [inputs], prior_precision=1.0, progress=False, **options)
            answer = fitted.predict(inputs, method="glm")
            assert answer.logit_covariance.device.type == device.type
            found.append((answer, torch.cat([eigen.eigenvalues.flatten() for eigen in fitted.layers.values()])))
        (cpu, spectrum), (gpu, other) = found
        numbers[f"{curvature}: spectrum"] = error(other.sort().values, spectrum.sort().values)
        numbers[f"{curvature}: covariance"] = error(gpu.logit_covariance, cpu.logit_covariance)
        numbers[f"{curvature}: mean"] = error(gpu.logit_mean, cpu.logit_mean)
    return below(1e-3, **numbers)


def generation(setup: Setup) -> Numbers:
    """Draws of an adapter as one batch write what each of them writes alone."""
    model, inputs = llama(Setup(torch.device("cpu"), tiny=True))
    model = bayesian(model, delta=1.0).to(setup.device).eval()
    prompt = {name: value.to(setup.device) for name, value in inputs.items() if name != "labels"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = generate(model, prompt, num_samples=3, **options)
    agree = []
    for index in range(3):
        with fixed_draw(model, index):
            alone = model.generate(**prompt, **options)
        agree.append(float((alone == together.sequences[index]).float().mean()))
    assert min(agree) == 1.0, agree
    return {"tokens that agree": min(agree)}


def memory_formula(setup: Setup) -> Numbers:
    """The closed formulas of benchmarks.device_memory beside the allocator's peak in a step of the 1B model."""
    from benchmarks.device_memory.formulas import Decoder, Lora, training

    if not setup.is_cuda:
        raise Skipped("a CPU has no allocator that counts")
    model, inputs = llama(setup)
    model, moved = bayesian(model, freeze=False).to(setup.device).train(), setup.moved(inputs)
    adamw = optimizer(model)

    def step() -> None:
        model(**moved).loss.backward()
        adamw.step()

    step()
    torch.cuda.reset_peak_memory_stats(setup.device)
    step()
    peak = torch.cuda.max_memory_allocated(setup.device)
    decoder = Decoder.from_config(model.config.to_dict())
    batch, length = inputs["input_ids"].shape
    formula = training(decoder, Lora(), "ddp", 1, batch=batch, length=length).total
    assert 0.7 < formula / peak < 1.3, (formula, peak)
    return {"formula / peak": formula / peak, "peak GiB": peak / 2**30}
