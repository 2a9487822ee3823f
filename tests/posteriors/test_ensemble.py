"""Members as draws: bit by bit, from wherever they lie, and back again; none that is not of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bayeformers
from bayeformers.posteriors import EnsemblePosterior
from bayeformers.posteriors.lent import LentPosterior
from bayeformers.posteriors.streamed import InFiles, InMemory, same_bits, whole
from tests.training import tiny


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def networks(number: int = 3) -> list[nn.Module]:
    return [tiny.plain(seed=seed).eval() for seed in range(number)]


def inputs() -> dict[str, Tensor]:
    return dict(tiny.tokens(3))


def log_probs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs()).logits.log_softmax(-1)


class BatchNormNet(nn.Sequential):
    """Members differ in statistics alone, of a layer without any Parameter."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        self[1].running_mean.add_(shift)
        self.eval()


@pytest.fixture(params=["modules", "state dicts", "folders", "shards"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> list[Any]:
    models = networks()
    if request.param == "modules":
        return models
    if request.param == "state dicts":
        return [model.state_dict() for model in models]
    size = "5KB" if request.param == "shards" else "5GB"
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number), max_shard_size=size)
    assert len(list((tmp_path / "0").glob("*.safetensors"))) == 1 or size == "5KB"
    return [tmp_path / str(number) for number in range(3)]


@pytest.mark.parametrize("standing", [0, 2, 9])
def test_draws_are_the_members(given: list[Any], standing: int) -> None:
    """Whether the model is one of them or another network."""
    models, model = networks(), tiny.plain(seed=standing).eval()
    posterior, before = EnsemblePosterior(model, given), state(model)
    assert posterior.num_draws == 3
    for index, member in enumerate(models):
        for seed in (0, 5):
            with posterior.draw(index, seed):
                assert equal(state(model), state(member))
                assert torch.equal(log_probs(model), log_probs(member))
            assert equal(state(model), before)
    with pytest.raises(ZeroDivisionError), posterior.draw(1):
        raise ZeroDivisionError
    with posterior.mean():
        for name, value in model.state_dict().items():
            average = torch.stack([m.state_dict()[name].double() for m in models]).mean(0)
            torch.testing.assert_close(value.double(), average, rtol=0, atol=1e-7 * float(average.abs().max()))
    assert equal(state(model), before)
    with pytest.raises(ValueError, match=r"`index` must be in 0\.\.2, got 3"), posterior.draw(3):
        pass


def test_mixture(given: list[Any]) -> None:
    """Entropies of the mixture in float64 from the members' own probabilities; `num_draws` is honoured."""
    posterior = EnsemblePosterior(tiny.plain(seed=7), given)
    found = posterior.predict(inputs(), num_samples=16, seed=3)
    each = torch.stack([log_probs(model) for model in networks()]).double()
    assert found.log_probs.shape[0] == 3
    torch.testing.assert_close(found.log_probs.double(), each, rtol=0, atol=1e-6)
    mean = each.exp().mean(0)
    total, expected = -(mean * mean.log()).sum(-1), -(each.exp() * each).sum(-1).mean(0)
    torch.testing.assert_close(found.predictive_entropy.double(), total, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.mutual_information.double(), total - expected, rtol=0, atol=1e-6)
    assert posterior.predict(inputs(), num_samples=2).log_probs.shape[0] == 2


def test_trainer_evaluates_with_it(tmp_path: Path) -> None:
    model, data = tiny.plain(seed=7), tiny.dataset("single", 9, seed=5)
    trainer = tiny.trainer(tmp_path, model, eval_dataset=data, num_eval_samples=16)
    trainer.posterior = EnsemblePosterior(model, networks())
    metrics = trainer.evaluate()
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    with torch.no_grad():
        each = torch.stack([m(**{k: v for k, v in batch.items() if k != "labels"}).logits for m in networks()])
    expected = each.double().log_softmax(-1).logsumexp(0) - torch.tensor(3.0).double().log()
    nll = torch.nn.functional.nll_loss(expected, batch["labels"])
    assert metrics["eval_loss"] == pytest.approx(nll.item(), abs=1e-5)


# -- what members share ------------------------------------------------------------------------------------------------


def heads(model: nn.Module, number: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    names = ("classifier.weight", "classifier.bias")
    shapes = {name: model.get_parameter(name).shape for name in names}
    return [{n: torch.randn(shape, generator=generator) for n, shape in shapes.items()} for _ in range(number)]


def test_heads_share_the_base(tmp_path: Path) -> None:
    model = tiny.plain().eval()
    model.posterior = EnsemblePosterior(model, heads(model))
    assert {id(p) for p in model.posterior.random_parameters()} == {id(p) for p in model.classifier.parameters()}
    model.save_pretrained(tmp_path)
    files = sorted((tmp_path / "members").iterdir())
    assert [set(InFiles([file]).shapes) for file in files] == [{"classifier.weight", "classifier.bias"}] * 3
    loaded = bayeformers.from_pretrained(tmp_path)
    one, other = (m.posterior.predict(inputs()).log_probs for m in (model, loaded))
    assert torch.equal(one, other)
    with torch.no_grad():
        model.bert.pooler.dense.bias.add_(1)
    assert not model.posterior.is_of_present_weights()
    with pytest.raises(ValueError, match="share have changed"):
        model.posterior.save(tmp_path)
    with pytest.raises(ValueError, match=r"goes with another model.*bert\.pooler\.dense\.bias"):
        EnsemblePosterior.load(tmp_path, model)


def test_statistics_are_members_too() -> None:
    """And the outputs of a layer whose buffers differ are not shared between draws."""
    model, members = BatchNormNet(), [BatchNormNet(0.0), BatchNormNet(3.0)]
    posterior, x = EnsemblePosterior(model, members), torch.ones(4, 2)
    expected = torch.stack([member(x).log_softmax(-1) for member in members]).detach()
    assert not torch.equal(expected[0], expected[1])
    for _ in range(3):
        torch.testing.assert_close(posterior.predict(x).log_probs, expected)
    assert posterior.random_parameters() == []


def test_tied_weights(tmp_path: Path) -> None:
    models = [tiny.plain("masked", seed=seed).eval() for seed in range(2)]
    posterior = EnsemblePosterior(tiny.plain("masked", seed=5), models)
    with posterior.draw(1):
        assert equal(state(posterior.model), state(models[1]))
        decoder = posterior.model.cls.predictions.decoder.weight
        assert decoder is posterior.model.bert.embeddings.word_embeddings.weight
    untied = models[0].state_dict()
    untied["cls.predictions.decoder.weight"] = untied["cls.predictions.decoder.weight"] + 1
    with pytest.raises(ValueError, match="has two tensors for .* which share one"):
        EnsemblePosterior(models[1], [untied])


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int) -> Any:
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
        return peft.get_peft_model(tiny.plain(), config).eval()

    models = [adapted(seed) for seed in range(3)]
    with torch.no_grad():
        for number, model in enumerate(models):
            model.base_model.model.classifier.modules_to_save["default"].weight.add_(number)
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    expected = torch.stack([log_probs(model) for model in models])
    assert not torch.equal(expected[0], expected[1])
    for given in ([tmp_path / str(number) for number in range(3)], models):
        model = adapted(9)
        found = EnsemblePosterior(model, given)
        torch.testing.assert_close(found.predict(inputs()).log_probs, expected, rtol=0, atol=1e-6)
        assert len(list(found.random_parameters())) in (3, 4)  # A, B, the head's weight, and its bias if that differs


# -- files -------------------------------------------------------------------------------------------------------------


def test_reload(given: list[Any], tmp_path: Path) -> None:
    model = tiny.plain(seed=1).eval()
    model.posterior = EnsemblePosterior(model, given)
    model.save_pretrained(tmp_path / "saved")
    loaded = bayeformers.from_pretrained(tmp_path / "saved")
    assert type(loaded.posterior) is EnsemblePosterior and equal(state(loaded), state(model))
    for index, member in enumerate(networks()):
        with loaded.posterior.draw(index):
            assert equal(state(loaded), state(member))
    trainer = tiny.trainer(tmp_path, loaded)
    assert trainer.posterior is loaded.posterior
    loaded.posterior.save(tmp_path / "saved")  # over the files that it reads
    with loaded.posterior.draw(2):
        assert equal(state(loaded), state(networks()[2]))
    EnsemblePosterior(model, given[:2]).save(tmp_path / "saved")
    assert len(list((tmp_path / "saved" / "members").iterdir())) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "ensemble.json").unlink(), "missing or damaged"),
        (lambda path: (path / "ensemble.json").write_text("{"), "missing or damaged"),
        (lambda path: (path / "ensemble.json").write_text('{"version": 9}'), "has version 9"),
        (lambda path: (path / "ensemble.json").write_text('{"version": 1}'), "is damaged: it has"),
        (lambda path: (path / "members" / "001.safetensors").unlink(), "There is no file"),
        (lambda path: (path / "members" / "001.safetensors").write_bytes(b"abc"), "damaged or no safetensors"),
        (lambda path: save_file({"x": torch.ones(1)}, path / "members" / "001.safetensors"), "no bayeformers data"),
        (lambda path: _flip(path / "members" / "001.safetensors"), "is damaged"),
    ],
)
def test_damaged_files(damage: Any, message: str, tmp_path: Path) -> None:
    model = tiny.plain()
    EnsemblePosterior(model, heads(model)).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        EnsemblePosterior.load(tmp_path, model)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# -- no members --------------------------------------------------------------------------------------------------------


def _other(**config: Any) -> nn.Module:
    return tiny.plain(**config)


def _without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tiny.plain().state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        (lambda: [], ValueError, "must have one member at least"),
        (lambda: "folder", TypeError, "`members` must be a list"),
        (lambda: tiny.plain(), TypeError, "`members` must be a list"),
        (lambda: 3, TypeError, "`members` must be a list"),
        (lambda: [3], TypeError, r"`members\[0\]` must be a folder"),
        (lambda: ["/no/such/folder"], ValueError, "there is no folder"),
        (lambda: [tiny.plain(), tiny.plain("token")], ValueError, r"`members\[1\]` is a BertForTokenClassification"),
        (lambda: [_other(hidden_size=8)], ValueError, r"of shape .* `model`"),
        (lambda: [_other(num_labels=4)], ValueError, "has the labels"),
        (lambda: [_other(id2label={0: "b", 1: "a", 2: "c"})], ValueError, "has the labels .* members share them"),
        (lambda: [_other(num_hidden_layers=2)], ValueError, "lacks .* besides"),
        (lambda: [{"wrong": torch.ones(1)}], ValueError, "is no BertForSequenceClassification"),
        (lambda: [{}], ValueError, "must be a state dict"),
        (lambda: [{"classifier.bias": 3}], ValueError, "must be a state dict"),
        (lambda: [{"classifier.bias": torch.tensor([1.0, float("nan"), 0.0])}], ValueError, "NaN or infinite"),
        (lambda: [tiny.plain().state_dict(), _without("classifier.bias")], ValueError, "number 1 lacks"),
        (lambda: [tiny.bayesian()], ValueError, "is a Bayesian|is no|besides"),
    ],
)
def test_wrong_members(members: Any, error: type[Exception], message: str) -> None:
    model = tiny.plain()
    before = state(model)
    with pytest.raises(error, match=message):
        EnsemblePosterior(model, members())
    assert equal(state(model), before)


def test_wrong_models(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got str"):
        EnsemblePosterior("bert", [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`model` is converted"):
        EnsemblePosterior(tiny.bayesian(), [tiny.plain()])
    with pytest.raises(ValueError, match="plain tensors in memory"):
        EnsemblePosterior(nn.Linear(2, 2, device="meta"), [nn.Linear(2, 2)])
    tiny.plain("token").save_pretrained(tmp_path / "token")
    with pytest.raises(ValueError, match="is a BertForTokenClassification"):
        EnsemblePosterior(tiny.plain(), [tmp_path / "token"])
    tiny.bayesian().save_pretrained(tmp_path / "converted")
    with pytest.raises(ValueError, match="is converted"):
        EnsemblePosterior(tiny.plain(), [tmp_path / "converted"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no weights"):
        EnsemblePosterior(tiny.plain(), [tmp_path / "empty"])
    assert json.loads((tmp_path / "token" / "config.json").read_text())  # read, not changed


# -- in pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_pieces(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(30).reshape(5, 6).to(dtype), "scalar": torch.tensor(3).to(dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    for source in (InFiles([tmp_path / "x.safetensors"]), InMemory(tensors)):
        for size in (1, 7, 100):
            pieces = [chunk.clone() for chunk in source.chunks("a", size)]
            assert torch.equal(torch.cat(pieces).reshape(5, 6), tensors["a"]) and len(pieces[0]) == min(size, 30)
        assert all(map(torch.equal, whole(source, ["a", "scalar"]).values(), tensors.values()))


def test_bits() -> None:
    assert not same_bits(torch.tensor([0.0]), [torch.tensor([-0.0])])
    assert same_bits(torch.tensor([float("nan"), 1.0]), [torch.tensor([float("nan")]), torch.tensor([1.0])])
    assert same_bits(torch.tensor([1.0], dtype=torch.bfloat16), [torch.tensor([1.0])])


def test_a_draw_makes_no_second_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the model is a member, what stands in it is read again and never copied; pieces are small."""
    for number, model in enumerate(networks()):
        model.save_pretrained(tmp_path / str(number))
    model = networks()[1]
    posterior = EnsemblePosterior(model, [tmp_path / str(number) for number in range(3)])
    kept = LentPosterior._kept
    found: list[Any] = []
    monkeypatch.setattr(LentPosterior, "_kept", lambda *args: found.append(kept(*args)) or found[-1])
    with posterior.draw(0):
        pass
    assert found and all(hasattr(again, "func") and again.func.__self__ is not None for again in found)
