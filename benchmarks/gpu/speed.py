"""What the Bayesian model costs on the device, as ratios to the plain one in the same rounds; on CUDA memory too."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayeformers import VariationalPosterior, fixed_draw, generate, kl_divergence, laplace, posterior_mean

from .checks import Numbers, noise
from .setup import Inputs, Setup, Skipped, bayesian, bert, compilable, llama, optimizer

ITEMS = 10_000  # the number of training examples, by which the KL is divided
Build = Callable[..., tuple[nn.Module, Inputs]]


def training_step(model: nn.Module, inputs: Inputs, called: Callable[..., Any]) -> Callable[[], None]:
    """Forward, loss with the KL of a Bayesian model, backward, AdamW."""
    adamw, divergence = optimizer(model), kl_divergence if is_bayesian(model) else None

    def step() -> None:
        loss = called(**inputs).loss
        if divergence is not None:
            loss = loss + divergence(model) / ITEMS
        loss.backward()
        adamw.step()
        adamw.zero_grad()

    return step


def is_bayesian(model: nn.Module) -> bool:
    return any("rho" in name for name, _ in model.named_parameters())


def variants(setup: Setup, build: Build) -> tuple[dict[str, nn.Module], Inputs]:
    """The model as it is fine-tuned, without dropout, which conversion ends, and Bayesian: means frozen, or trained."""
    plain, inputs = build(setup)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    models = {"plain": plain}
    for freeze, name in ((True, "means frozen"), (False, "means trained")):
        models[name] = bayesian(copy.deepcopy(plain), freeze=freeze)
    return {name: model.to(setup.device).train() for name, model in models.items()}, setup.moved(inputs)


def steps(setup: Setup, limit: float, build: Build) -> Numbers:
    """A training step ÷ that of fine-tuning, and on CUDA the peak of memory ÷ its peak."""
    models, inputs = variants(setup, build)
    runs = {name: training_step(model, inputs, model) for name, model in models.items()}
    times = setup.medians(runs, limit)
    numbers = {f"step, {name}": times[name] / times["plain"] for name in models if name != "plain"}
    numbers["plain step, ms"] = 1000 * times["plain"]
    return numbers | (memory(setup, build) if setup.is_cuda else {})


def memory(setup: Setup, build: Build) -> Numbers:
    """Peak of a step ÷ that of fine-tuning, each model alone on the device."""
    peaks = {}
    for name in ("plain", "means frozen", "means trained"):
        free()
        models, inputs = variants(setup, build)
        model = models.pop(name)
        models.clear()
        step = training_step(model, inputs, model)
        step()
        free()
        torch.cuda.reset_peak_memory_stats(setup.device)
        step()
        peaks[name] = torch.cuda.max_memory_allocated(setup.device)
        del model, step
    return {f"memory, {name}": peak / peaks["plain"] for name, peak in peaks.items() if name != "plain"}


def compiled_step(setup: Setup, limit: float, build: Build) -> Numbers:
    """A compiled training step ÷ the eager one, of the plain and of the Bayesian model, without a graph break."""
    if setup.tiny and build is not bert:
        raise Skipped("at tiny size one model is compiled, for each takes seconds")
    if setup.tiny:
        model, inputs = compilable(setup)
        models = {"means frozen": model.train()}
    else:
        models, inputs = variants(setup, build)
        models.pop("means trained")
    runs = {name: training_step(model, inputs, model) for name, model in models.items()}
    for name, model in models.items():
        runs[f"{name}, compiled"] = training_step(model, inputs, setup.compiled(model))
    times = setup.medians(runs, limit)
    return {f"compiled step, {name}": times[f"{name}, compiled"] / times[name] for name in models}


def draws(setup: Setup, limit: float, build: Build) -> Numbers:
    """Ten held draws ÷ one pass, and the first pass in a new draw ÷ a pass of the mean."""
    model, inputs = build(setup)
    model, new = bayesian(model).to(setup.device).eval(), itertools.count()
    inputs = {name: value for name, value in setup.moved(inputs).items() if name != "labels"}

    @torch.no_grad()
    def mean() -> None:
        with posterior_mean(model):
            model(**inputs)

    @torch.no_grad()
    def first_pass() -> None:
        with fixed_draw(model, next(new)):
            model(**inputs)

    posterior = VariationalPosterior(model)
    number = 2 if setup.tiny else 10
    # the probabilities of a vocabulary at every token are too many for a prediction: its draws are passes
    whole = model.config.model_type == "llama"

    def several() -> None:
        if not whole:
            posterior.predict(inputs, num_samples=number)
        for _ in range(number if whole else 0):
            first_pass()

    times = setup.medians({"mean": mean, "first pass": first_pass, "several": several}, limit)
    return {f"{number} draws": times["several"] / times["mean"], "new draw": times["first pass"] / times["mean"]}


def noise_of_draws(setup: Setup, limit: float) -> Numbers:
    """The noise of all weights of a new draw ÷ `torch.randn` of them."""
    model, _ = bert(setup)
    model, new = bayesian(model).to(setup.device), itertools.count()
    shapes = [value.shape for value in noise(model, 0).values()]

    def plain() -> list[Tensor]:
        return [torch.randn(shape, device=setup.device) for shape in shapes]

    times = setup.medians({"randn": plain, "noise": lambda: noise(model, next(new))}, limit)
    return {"noise / randn": times["noise"] / times["randn"]}


def laplace_fit(setup: Setup, limit: float, build: Build) -> Numbers:
    """One KFAC fit of all Linear layers ÷ a training step on the same batch; a linearised prediction ÷ a forward."""
    model, inputs = build(setup)
    model, inputs = model.to(setup.device).eval(), setup.moved(inputs)
    fits: list[laplace.LaplacePosterior] = []

    def fit() -> None:
        fits.append(laplace.fit(model, [inputs], curvature="kfac", prior_precision=1.0, progress=False))

    seconds = setup.seconds(fit)  # with its eigendecompositions too long for several rounds
    trained = copy.deepcopy(model).train()
    asked = {name: value for name, value in inputs.items() if name != "labels"}

    @torch.no_grad()
    def forward() -> None:
        model(**asked)

    runs = {
        "step": training_step(trained, inputs, trained),
        "forward": forward,
        "glm": lambda: fits[0].predict(asked, method="glm"),
    }
    times = setup.medians(runs, limit / 3)
    return {"fit / step": seconds / times["step"], "glm / forward": times["glm"] / times["forward"]}


def generation_of_draws(setup: Setup, limit: float) -> Numbers:
    """Eight answers by eight draws as one batch ÷ one answer of the plain model, 24 tokens each."""
    plain, inputs = llama(setup)
    converted = bayesian(copy.deepcopy(plain)).to(setup.device).eval()
    plain = plain.to(setup.device).eval()
    prompt = {name: value[:1, :8] for name, value in setup.moved(inputs).items() if name != "labels"}
    new, number = (2, 2) if setup.tiny else (24, 8)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    runs = {
        "plain": lambda: plain.generate(**prompt, **options),
        "draws": lambda: generate(converted, prompt, num_samples=number, **options),
    }
    times = setup.medians(runs, limit)
    return {f"{number} draws": times["draws"] / times["plain"]}


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
