"""What each entry goes through; a step raises `AssertionError` with the number that is wrong."""

from __future__ import annotations

import contextlib
import copy
import inspect
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback

import bayeformers
from bayeformers import nn as bnn

from .configs import tiny
from .inputs import Inputs, inputs_for, labels_for, tensors_of

MAX_WEIGHTS = 6_000_000


class Refused(Exception):
    """The conversion says that it cannot, with one of the errors that it documents."""


class Entry:
    """One model of one table, and what its steps share."""

    def __init__(self, model_type: str, class_name: str) -> None:
        self.model_type, self.class_name = model_type, class_name
        self.notes: list[str] = []

    def build(self) -> None:
        """A model whose weights are all away from 0 and 1, and its inputs."""
        torch.manual_seed(zlib.crc32(self.class_name.encode()))
        model = getattr(transformers, self.class_name)(tiny(self.model_type, self.class_name))
        size = sum(p.numel() for p in model.parameters())
        assert size <= MAX_WEIGHTS, f"{size / 1e6:.1f} million weights are not tiny"
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
            for module in model.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0  # as trained; Funnel's loader sets it to 0 in any case
        self.plain = model.eval()
        self.inputs = inputs_for(model)
        self.labels = labels_for(model, self.inputs)

    def convert(self) -> None:
        """In place, on a copy."""
        self.model = self.converted()

    def converted(self) -> nn.Module:
        """A fresh conversion of the same model."""
        model = copy.deepcopy(self.plain)
        self.before = state_of(model)
        try:
            return bayeformers.to_bayesian(model, delta=0.1)
        except (TypeError, ValueError, NotImplementedError) as error:
            assert_same_state(state_of(model), self.before)
            raise Refused(f"{type(error).__name__}: {error}") from error

    def run(self, model: nn.Module) -> list[Tensor]:
        """Outputs without gradient; a model's own random numbers are the same at each call."""
        torch.manual_seed(0)
        with torch.no_grad():
            return tensors_of(model(**copy.deepcopy(self.inputs)))

    def mean(self) -> None:
        """`eval()` and `posterior_mean` give the plain model's outputs, bit for bit."""
        with no_flags(self.plain), no_flags(self.model):  # some kernels round otherwise where a gradient is asked for
            expected = self.run(self.plain)
            assert_equal(self.run(self.model), expected, "eval()")
            with bayeformers.posterior_mean(self.model):
                assert_equal(self.run(self.model), expected, "posterior_mean")

    def draw(self) -> None:
        """A draw is the plain model at the drawn weights."""
        self.drawn, self.weights = copy.deepcopy(self.plain), weights_of(self.model, 0)
        self.drawn.requires_grad_(True)  # a fixed table of positions has a scale that trains
        with torch.no_grad():
            for name, value in self.weights.items():
                self.drawn.get_parameter(name).copy_(value)
        with bayeformers.fixed_draw(self.model, 0):
            found = self.run(self.model)
        mean, expected = self.run(self.plain), self.run(self.drawn)
        assert_close(found, expected, "draw 0", mean)
        assert not all(map(torch.equal, found, mean)), "draw 0 is the mean"

    def gradients(self) -> None:
        """d/d rho is d/d w of the plain model at the drawn weights, times noise, times the slope of sigma."""
        expected = gradients_of(self.drawn, self.inputs)
        with bayeformers.fixed_draw(self.model, 0):
            gradients_of(self.model, self.inputs)
        silent, total = [], 0
        largest = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
        for tensor in bnn.variational_tensors(self.model):
            total += 1
            found, slope = tensor.rho.grad, torch.sigmoid(tensor.rho.detach())
            wanted = expected.get(tensor.name)
            if wanted is None:
                silent.append(tensor.name)
                assert found is None or not found.any(), f"{tensor.name}: a gradient where the plain model has none"
                continue
            eps = (self.weights[tensor.name] - tensor.loc.detach()) / tensor.scale().detach()
            assert found is not None, f"{tensor.name}: rho has no gradient, the plain model's weight has"
            assert torch.isfinite(found).all() or not torch.isfinite(wanted).all(), f"{tensor.name}: not finite"
            difference = float((found - wanted * eps * slope).abs().max()) if found.numel() else 0.0
            assert difference <= 2e-3 * largest, f"{tensor.name}: rho's gradient differs by {difference:.1e}"
        if silent:
            self.notes.append(f"{len(silent)} of {total} tensors get no gradient: {', '.join(silent[:3])}")
        self.model.zero_grad()

    def reload(self) -> None:
        """`from_pretrained` gives the same draws and KL, bit for bit."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            other = bayeformers.from_pretrained(folder)
        assert type(other) is type(self.model), f"reloads as {type(other).__name__}"
        found, expected = dict(other.state_dict()), dict(self.model.state_dict())
        if differing(found, expected) and (lost := self.lost_by_transformers()):
            self.notes.append(f"transformers itself reloads other values of {', '.join(sorted(lost)[:3])}")
            found, expected = ({n: v for n, v in state.items() if n not in lost} for state in (found, expected))
            assert_same_tensors(found, expected)
            return
        assert_same_tensors(found, expected)
        mine, theirs = weights_of(self.model, 3), weights_of(other, 3)
        assert mine.keys() == theirs.keys(), f"other tensors: {sorted(mine.keys() ^ theirs.keys())[:3]}"
        assert_same_tensors(theirs, mine)
        kl = [float(bayeformers.kl_divergence(model)) for model in (self.model, other)]
        assert kl[0] == kl[1], f"KL {kl[0]} became {kl[1]}"
        with bayeformers.fixed_draw(self.model, 3):
            expected = self.run(self.model)
        with bayeformers.fixed_draw(other, 3):
            assert_close(self.run(other), expected, "draw 3")

    def lost_by_transformers(self) -> set[str]:
        """Names of tensors that the plain model, saved and loaded by transformers alone, has other values of."""
        with tempfile.TemporaryDirectory() as folder:
            self.plain.save_pretrained(folder)
            other = type(self.plain).from_pretrained(folder)
        return set(differing(dict(other.state_dict()), dict(self.plain.state_dict())))

    def resume(self) -> None:
        """A resumed run ends as the whole one did, and the best model is its checkpoint's, every tensor."""
        if self.labels is None:
            self.notes.append("not trained: no labels for this head")
            return
        if "labels" not in inspect.signature(self.plain.forward).parameters and "labels" in self.labels:
            self.notes.append("not trained: its forward takes no labels")
            return
        if self.class_name == "XLNetLMHeadModel":
            self.notes.append("not trained: predictions of a permutation are refused, see `resolve_problem_type`")
            return
        with tempfile.TemporaryDirectory() as folder:
            whole = _Recorder(best=1)
            model = self.train(folder, whole)
            assert_same_tensors(tensors(model), whole.states[1], "best model")
            again = _Recorder()
            model = self.train(folder, again, resume_from_checkpoint=str(Path(folder, "checkpoint-1")))
        assert_same_tensors(again.states[2], whole.states[2], "resumed run")
        assert any(not torch.equal(whole.states[1][k], v) for k, v in whole.states[2].items()), "training moves nothing"

    def train(self, folder: str, recorder: _Recorder, **options: Any) -> nn.Module:
        """Two steps of `BayesianTrainer` with a checkpoint after each."""
        inputs = {**self.inputs, **(self.labels or {})}
        if "decoder_input_ids" in inputs:  # made from the labels
            inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
        shared = {key: value for key, value in inputs.items() if not isinstance(value, Tensor)}
        rows = [{k: v[i] for k, v in inputs.items() if k not in shared} for i in range(2)]
        arguments = bayeformers.BayesianTrainingArguments(
            output_dir=folder, max_steps=2, save_strategy="steps", save_steps=1, use_cpu=True, report_to="none",
            disable_tqdm=True, per_device_train_batch_size=2, learning_rate=1e-2, logging_strategy="no", seed=3,
        )  # fmt: skip
        model = self.converted()
        trainer = bayeformers.BayesianTrainer(model, arguments, train_dataset=rows * 2, callbacks=[recorder])
        arguments.load_best_model_at_end = recorder.best is not None
        trainer.train(**options)
        return model

    def undo(self) -> None:
        """`to_deterministic` leaves tensors, classes, flags, hooks and configuration as they were."""
        model = self.converted()
        with bayeformers.fixed_draw(model, 0):
            self.run(model)
        bayeformers.to_deterministic(model)
        assert_same_state(state_of(model), self.before)

    def laplace(self) -> None:
        """The same posterior whatever the batch size, for heads of classes."""
        if self.labels is None or not self.class_name.endswith(_CLASSIFIERS):
            return
        if not hasattr(self.plain(**self.inputs), "logits"):
            self.notes.append("no Laplace: its outputs have no logits")
            return
        batch = {**self.inputs, **self.labels}
        single = [{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in batch.items()} for i in range(2)]
        found = []
        for batches in (single, [batch]):
            posterior = bayeformers.laplace.fit(
                self.plain, batches, curvature="kfac", fisher="exact", prior_precision=1.0, num_data=2, progress=False
            )
            found.append((float(posterior.log_marginal_likelihood), posterior))
        (one, first), (all_at_once, second) = found
        assert abs(one - all_at_once) <= 1e-3 * abs(all_at_once), f"log evidence {one:.4f} / {all_at_once:.4f}"
        for name, layer in first.layers.items():
            traces = [_trace(item) for item in (layer, second.layers[name])]
            close = abs(traces[0] - traces[1]) <= 1e-3 * max(*traces, 1e-6)
            assert close, f"{name}: tr F {traces[0]:.5g} at batch size 1, {traces[1]:.5g} at 2"


_CLASSIFIERS = ("SequenceClassification", "ImageClassification", "VideoClassification", "MultipleChoice")
STEPS: dict[str, Callable[[Entry], None]] = {
    name: getattr(Entry, name)
    for name in ("convert", "mean", "draw", "gradients", "reload", "resume", "undo", "laplace")
}


class _Recorder(TrainerCallback):
    """Copies of all tensors at each save; ``best``: the step to be taken for the best."""

    def __init__(self, best: int | None = None) -> None:
        self.best, self.states = best, {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.states[state.global_step] = tensors(model)
        if state.global_step == self.best:
            state.best_model_checkpoint = str(Path(args.output_dir, f"checkpoint-{self.best}"))
            state.best_global_step = self.best


def _trace(layer: Any) -> float:
    return float(layer.eigenvalues.sum())


# ------------------------------------------------------------------------------------------------------ ground truth


def weights_of(model: nn.Module, index: int) -> dict[str, Tensor]:
    """The weights of a draw by first name, tensor by tensor, never by a forward of the model."""
    with torch.no_grad(), bayeformers.fixed_draw(model, index):
        return {
            tensor.name: tensor.module.variational(tensor.parameter_name).sample().clone()
            for tensor in bnn.variational_tensors(model)
        }


def gradients_of(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Of a scalar that depends on every output, by Parameter name; only those that get one."""
    torch.manual_seed(0)
    model.zero_grad()
    outputs = [t for t in tensors_of(model(**copy.deepcopy(inputs))) if t.requires_grad]
    parts = [torch.tanh(t).mul(torch.linspace(-1, 2, t.numel()).reshape(t.shape)).nansum() for t in outputs]
    assert parts, "no output depends on a weight"
    torch.stack(parts).sum().backward()
    named = model.named_parameters(remove_duplicate=False)  # a tied tensor under each of its names
    return {name: p.grad for name, p in named if p.grad is not None}


@contextlib.contextmanager
def no_flags(model: nn.Module) -> Iterator[None]:
    """No Parameter requires a gradient inside."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all Parameters and buffers."""
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a conversion may change."""
    modules = dict(model.named_modules())
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "Parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "classes": {name: type(module) for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "attributes": {name: set(vars(module)) for name, module in modules.items()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "ties": dict(getattr(model, "all_tied_weights_keys", None) or {}),
    }


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal bit for bit."""
    assert_same_tensors(found["tensors"], expected["tensors"])
    for key in expected.keys() - {"tensors"}:
        assert found[key] == expected[key], f"other {key} than before"


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str = "state") -> None:
    """Same names, and equal bit for bit."""
    assert found.keys() == expected.keys(), f"{what}: other names: {sorted(found.keys() ^ expected.keys())[:3]}"
    wrong = differing(found, expected)
    assert not wrong, f"{what}: {len(wrong)} of {len(expected)} tensors differ: {', '.join(wrong[:3])}"


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of both whose tensors are not equal bit for bit."""
    common = [name for name in expected if name in found]
    return [n for n in common if expected[n].dtype != found[n].dtype or not same(expected[n], found[n])]


def assert_equal(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Bit for bit."""
    assert len(found) == len(expected) > 0, f"{what}: {len(found)} outputs, not {len(expected)}"
    worst = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True) if not same(a, b)]
    assert not worst, f"{what}: {len(worst)} of {len(expected)} outputs differ, by {max(worst):.1e}"


def assert_close(found: list[Tensor], expected: list[Tensor], what: str, mean: list[Tensor] | None = None) -> None:
    """To the rounding of float32 in a few layers, and to a thousandth of what the draw moves ``mean`` by."""
    assert len(found) == len(expected) > 0, f"{what}: {len(found)} outputs, not {len(expected)}"
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, f"{what}: output {number} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        finite = torch.isfinite(b)
        assert torch.equal(finite, torch.isfinite(a)), f"{what}: output {number} is not finite in other places"
        scale = max(1.0, float(b[finite].abs().max())) if finite.any() else 1.0
        difference = float((a - b)[finite].abs().max()) if finite.any() else 0.0
        limit = 2e-4 * scale
        if mean is not None and finite.any() and mean[number].shape == b.shape:  # a draw may speak for longer
            limit = min(limit, 1e-3 * float((mean[number] - b)[finite].abs().nan_to_num().max()) + 1e-5 * scale)
        assert difference <= limit, f"{what}: output {number} differs by {difference:.1e}"


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, not-a-number too."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
