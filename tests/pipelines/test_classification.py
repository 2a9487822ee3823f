"""Scores are averages over draws made by hand, and so are the uncertainties; batches and padding change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.pipelines.base import KeyDataset

from bayeformers import fixed_draw, laplace, pipeline, predict, to_bayesian
from bayeformers.guarantees import attach_policy
from bayeformers.posteriors import DropoutPosterior, EnsemblePosterior, Posterior, VariationalPosterior
from tests.pipelines.tiny import TEXTS, bert, policy, tokenizer

TOLERANCE = 1e-6
PAIR = {"text": "the cat sat", "text_pair": "a dog ran on the mat"}


def batch(texts: Any = TEXTS) -> dict[str, Tensor]:
    return dict(tokenizer()(texts, return_tensors="pt", padding=True))


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
    return to_bayesian(model, delta=0.5).eval()


def members() -> EnsemblePosterior:
    others = [copy.deepcopy(bert()) for _ in range(3)]
    for index, other in enumerate(others):
        with torch.no_grad():
            other.classifier.weight.mul_(1 + index)
    return EnsemblePosterior(bert(), others)


def fitted(**options: Any) -> Posterior:
    model = bert()
    return laplace.fit(model, [{**batch(), "labels": torch.tensor([0, 1, 2, 0])}], progress=False, **options)


POSTERIORS: dict[str, Callable[[], Any]] = {
    "converted": lambda: to_bayesian(bert(), delta=0.3),
    "last layer": lambda: to_bayesian(bert(), delta=0.3, target_modules=["classifier"]),
    "laplace": fitted,
    "laplace of the head": lambda: fitted(subset="last_layer"),
    "ensemble": members,
    "dropout": lambda: DropoutPosterior(bert(hidden_dropout_prob=0.3)),
    "point": bert,
    "adapter": adapted,
}


def by_hand(draws: Tensor) -> dict[str, Tensor]:
    """Of probabilities (S, ..., C) in float64: their mean, and the parts of its entropy."""
    draws = draws.double()
    mean = draws.mean(0)
    total = -(mean * mean.log()).sum(-1)
    aleatoric = -(draws * draws.log()).sum(-1).mean(0)
    return {"mean": mean, "total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}


def assert_doubt(found: dict[str, float], expected: dict[str, Tensor], at: Any, tolerance: float = TOLERANCE) -> None:
    assert list(found) == ["total", "aleatoric", "epistemic"]
    for name, value in found.items():
        assert value == pytest.approx(float(expected[name][at]), abs=tolerance)


def test_scores_and_uncertainties_are_those_of_draws_by_hand() -> None:
    """By forwards of the model under each held draw, in float64, text by text."""
    model, given = to_bayesian(bert(), delta=0.5).double(), tokenizer()
    pipe = pipeline(
        "text-classification", model=model, tokenizer=given, num_samples=5, seed=3, top_k=None, device="cpu"
    )
    for text, found in zip(TEXTS, pipe(TEXTS, batch_size=3), strict=True):
        inputs, draws = given(text, return_tensors="pt"), []
        for index in range(5):
            with torch.no_grad(), fixed_draw(model, index, seed=3):
                draws.append(model(**inputs).logits.softmax(-1)[0])
        expected = by_hand(torch.stack(draws))
        assert expected["epistemic"] > 1e-3
        for entry in found:
            assert entry["score"] == pytest.approx(float(expected["mean"]["ABC".index(entry["label"])]), abs=TOLERANCE)
            assert_doubt(entry["uncertainty"], expected, ())


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_posterior(name: str) -> None:
    """Equal to `predict` of the text alone, whatever stands beside it in the batch, from a model in either mode."""
    asked, given = POSTERIORS[name](), tokenizer()
    model = getattr(asked, "model", asked)
    model.train()
    posterior = VariationalPosterior(asked) if name in ("converted", "last layer", "adapter") else asked
    pipe = pipeline("text-classification", model=asked, tokenizer=given, num_samples=4, top_k=None, device="cpu")
    alone, together = pipe(TEXTS), pipe(TEXTS, batch_size=3)
    assert model.training
    for text, one, other in zip(TEXTS, alone, together, strict=True):
        inputs = dict(given(text, return_tensors="pt"))
        predictive = predict(posterior, inputs, num_samples=4)
        expected = {
            "total": predictive.predictive_entropy,
            "aleatoric": predictive.expected_entropy,
            "epistemic": predictive.mutual_information,
        }
        for entry in (*one, *other):
            label = "ABC".index(entry["label"])
            assert entry["score"] == pytest.approx(float(predictive.probs[0, label]), abs=TOLERANCE)
            assert_doubt(entry["uncertainty"], expected, 0)
    assert [e["label"] for e in alone[0]] == [e["label"] for e in together[0]]
    assert (alone[0][0]["uncertainty"]["epistemic"] == 0) == (name == "point")


def test_results_have_transformers_own_form() -> None:
    """Of every kind of input and argument, only with more in each result."""
    model, given = to_bayesian(bert(), delta=1e-6), tokenizer()
    plain = hf.pipeline("text-classification", model=bert(), tokenizer=given, device="cpu")
    ours = pipeline("sentiment-analysis", model=model, tokenizer=given, num_samples=2, device="cpu")
    assert isinstance(ours, type(plain)) and ours.task == "sentiment-analysis"

    def less(found: Any) -> Any:
        if isinstance(found, list):
            return [less(entry) for entry in found]
        assert set(found) == {"label", "score", "uncertainty"}
        return {"label": found["label"], "score": pytest.approx(found["score"], abs=1e-4)}

    calls: list[Callable[[Any], Any]] = [
        lambda pipe: pipe(TEXTS[0]),
        lambda pipe: pipe(TEXTS),
        lambda pipe: pipe(TEXTS, top_k=2, batch_size=2),
        lambda pipe: pipe(TEXTS[0], top_k=None),
        lambda pipe: pipe(PAIR),
        lambda pipe: pipe([PAIR, PAIR], truncation=True, max_length=6),
        lambda pipe: list(pipe(text for text in TEXTS)),
        lambda pipe: list(pipe(KeyDataset([{"x": text} for text in TEXTS], "x"), batch_size=2)),
    ]
    for call in calls:
        assert less(call(ours)) == call(plain)


def test_a_call_may_have_draws_of_its_own() -> None:
    model = to_bayesian(bert(), delta=0.5)
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer(), num_samples=2, seed=1, device="cpu")
    other = pipeline("text-classification", model=model, tokenizer=tokenizer(), num_samples=3, seed=2, device="cpu")
    assert pipe(TEXTS, num_samples=3, seed=2) == other(TEXTS)
    assert pipe(TEXTS) != other(TEXTS) and pipe(TEXTS) == pipe(TEXTS)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_policy_refuses_those_of_whom_it_is_unsure(batch_size: int) -> None:
    """In every entry of a result; from the model that carries it, as fitted, without a word in the call."""
    model, given = to_bayesian(bert(), delta=0.5), tokenizer()
    unasked = pipeline("text-classification", model=model, tokenizer=given, device="cpu", num_samples=3)(TEXTS)
    threshold = sorted(entry["score"] for entry in unasked)[1]
    attach_policy(model, policy(threshold=threshold, num_samples=3))
    pipe = pipeline("text-classification", model=model, tokenizer=given, device="cpu")
    assert pipe.num_samples == 3
    found = pipe(TEXTS, batch_size=batch_size, top_k=None)
    assert [{entry["abstain"] for entry in entries} for entries in found] == [
        {entries[0]["score"] < threshold} for entries in found
    ]
    assert sum(entries[0]["abstain"] for entries in found) == 1


@pytest.mark.parametrize("function", [None, "sigmoid", "softmax", "none"])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_functions_are_applied_to_each_draw(problem: str, function: str | None) -> None:
    """And then averaged; not the function of the averaged logits, nor of the averaged probabilities."""
    model, given = to_bayesian(bert(problem_type=problem), delta=0.5), tokenizer()
    pipe = pipeline(
        "text-classification", model=model, tokenizer=given, num_samples=4, device="cpu", function_to_apply=function,
        top_k=None,
    )  # fmt: skip
    inputs, logits = given(TEXTS[0], return_tensors="pt"), []
    for index in range(4):
        with torch.no_grad(), fixed_draw(model, index):
            logits.append(model(**inputs).logits[0].double())
    draws = torch.stack(logits)
    default = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}.get(problem, "none")
    apply: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda f: f.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda f: f,
    }  # fmt: skip
    expected = apply[function or default](draws).mean(0)
    found = pipe(TEXTS[0], top_k=None)
    for entry in found:
        assert entry["score"] == pytest.approx(float(expected["ABC".index(entry["label"])]), abs=2e-6)
    if (function or default) == "sigmoid":  # each label's own
        parts = by_hand(torch.stack([1 - draws.sigmoid(), draws.sigmoid()], -1))
        for entry in found:
            assert_doubt(entry["uncertainty"], parts, "ABC".index(entry["label"]), 2e-6)


def test_a_regression_has_variances() -> None:
    """Of the outputs over the draws, and of the noise where it is known."""
    model = to_bayesian(bert(labels=["value"], problem_type="regression"), delta=0.5)
    given, inputs = tokenizer(), batch(TEXTS[0])
    pipe = pipeline("text-classification", model=model, tokenizer=given, num_samples=4, device="cpu")
    values = []
    for index in range(4):
        with torch.no_grad(), fixed_draw(model, index):
            values.append(model(**inputs).logits.double().item())
    (found,) = pipe(TEXTS[0])
    assert found["score"] == pytest.approx(np.mean(values), abs=TOLERANCE)
    assert found["uncertainty"]["epistemic"] == pytest.approx(np.var(values), rel=1e-4)
    assert found["uncertainty"]["aleatoric"] is None and found["uncertainty"]["total"] is None
    model.config.bayesian["noise_std"] = 0.5
    (found,) = pipe(TEXTS[0])
    assert found["uncertainty"]["aleatoric"] == pytest.approx(0.25)
    assert found["uncertainty"]["total"] == pytest.approx(0.25 + np.var(values), rel=1e-4)


def test_a_head_of_one_output_without_a_problem_type_is_a_regression() -> None:
    """As transformers' own loss says; its pipeline would squash the number."""
    model = bert(labels=["value"])
    (found,) = pipeline("text-classification", model=model, tokenizer=tokenizer(), device="cpu")(TEXTS[0])
    with torch.no_grad():
        assert found["score"] == pytest.approx(model(**batch(TEXTS[0])).logits.item(), abs=TOLERANCE)


def test_autocast_and_low_precision_give_float32_probabilities() -> None:
    model = to_bayesian(bert(), delta=0.3)
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer(), top_k=None, num_samples=3, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        found = pipe(TEXTS[0], top_k=None)
    half = pipeline(
        "text-classification", model=copy.deepcopy(model).bfloat16(), tokenizer=tokenizer(), top_k=None, num_samples=3,
        device="cpu",
    )(TEXTS[0], top_k=None)  # fmt: skip
    for entries in (found, half):
        assert sum(entry["score"] for entry in entries) == pytest.approx(1, abs=1e-6)
        for entry in entries:
            parts = entry["uncertainty"]
            assert parts["total"] == pytest.approx(parts["aleatoric"] + parts["epistemic"], abs=1e-6)


@pytest.fixture
def images() -> tuple[Any, list[Any]]:
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    return hf.ViTImageProcessor(size={"height": 8, "width": 8}), [image.fromarray(pixels) for pixels in noise]


def test_images(images: tuple[Any, list[Any]]) -> None:
    processor, pictures = images
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    bayesian = to_bayesian(model, delta=0.5)
    pipe = pipeline("image-classification", model=bayesian, image_processor=processor, num_samples=4, device="cpu")
    predictive = predict(bayesian, dict(processor(pictures, return_tensors="pt")), num_samples=4)
    for batch_size in (1, 2):
        for index, entries in enumerate(pipe(pictures, batch_size=batch_size)):
            for entry in entries:
                label = bayesian.config.label2id[entry["label"]]
                assert entry["score"] == pytest.approx(float(predictive.probs[index, label]), abs=TOLERANCE)
                assert entry["uncertainty"]["epistemic"] == pytest.approx(
                    float(predictive.mutual_information[index]), abs=TOLERANCE
                )


def test_sounds() -> None:
    """Of one length: the extractor pads, and wav2vec's convolutions see what is padded in the plain pipeline too."""
    torch.manual_seed(0)
    model = hf.Wav2Vec2ForSequenceClassification(
        hf.Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
            conv_kernel=(8, 3), conv_stride=(4, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, vocab_size=8, classifier_proj_size=8, num_labels=3,
        )
    ).eval()  # fmt: skip
    bayesian, extractor = to_bayesian(model, delta=0.5), hf.Wav2Vec2FeatureExtractor()
    sounds = list(np.random.default_rng(0).standard_normal((3, 160)).astype(np.float32))
    pipe = pipeline("audio-classification", model=bayesian, feature_extractor=extractor, num_samples=4, device="cpu")
    inputs = extractor(sounds, sampling_rate=16_000, return_tensors="pt")
    predictive = predict(bayesian, dict(inputs), num_samples=4)
    for batch_size in (1, 2):
        for index, entries in enumerate(pipe(sounds, batch_size=batch_size)):
            assert len(entries) == 3
            for entry in entries:
                label = bayesian.config.label2id[entry["label"]]
                assert entry["score"] == pytest.approx(float(predictive.probs[index, label]), abs=TOLERANCE)
                assert entry["uncertainty"]["total"] == pytest.approx(
                    float(predictive.predictive_entropy[index]), abs=TOLERANCE
                )


def test_labels_that_share_a_name_have_their_own_uncertainty() -> None:
    model = to_bayesian(bert(problem_type="multi_label_classification"), delta=0.5)
    named = pipeline("text-classification", model=model, tokenizer=tokenizer(), top_k=None)(TEXTS)
    model.config.id2label = {0: "A", 1: "A", 2: "C"}
    shared = pipeline("text-classification", model=model, tokenizer=tokenizer(), top_k=None)(TEXTS)
    for one, other in zip(named, shared, strict=True):
        assert [entry["uncertainty"] for entry in one] == [entry["uncertainty"] for entry in other]
