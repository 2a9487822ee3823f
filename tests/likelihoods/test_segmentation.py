"""Classes of pixels: the models' own losses, uncertainties and metrics at the labels' resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import Dataset

from bayeformers import BayesianTrainer, BayesianTrainingArguments, fixed_draw, predict, to_bayesian
from bayeformers.laplace import fit
from bayeformers.likelihoods import resolve_problem_type, without_ignored
from bayeformers.metrics import aurc, brier_score, expected_calibration_error
from bayeformers.training.items import item_nll

CLASSES = 3


def segformer() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"depths": [1] * 4, "hidden_sizes": [4, 8, 8, 8], "num_attention_heads": [1] * 4}
    return hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(**sizes, decoder_hidden_size=8, num_labels=CLASSES)
    ).eval()


def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    config = hf.MobileNetV2Config(depth_multiplier=0.1, min_depth=4, num_labels=CLASSES, finegrained_output=True)
    return hf.MobileNetV2ForSemanticSegmentation(config).eval()


def mobilevit() -> nn.Module:
    torch.manual_seed(0)
    config = hf.MobileViTConfig(
        hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 4, 4, 4, 4, 8], num_attention_heads=2, aspp_out_channels=8,
        num_labels=CLASSES, expand_ratio=1.0,
    )  # fmt: skip
    return hf.MobileViTForSemanticSegmentation(config).eval()


MODELS = (segformer, mobilenet, mobilevit)


class Images(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 4) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.randn(count, 3, 64, 64, generator=generator)
        self.labels = torch.randint(CLASSES, (count, 48, 40), generator=generator)
        self.labels[:, :7] = 255

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}

    def batch(self) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels, "labels": self.labels}


def trainer_of(model: nn.Module, path: Path, **options: Any) -> BayesianTrainer:
    args = BayesianTrainingArguments(
        str(path), report_to=[], use_cpu=True, disable_tqdm=True, num_eval_samples=3, max_steps=2, seed=0,
        per_device_train_batch_size=2, per_device_eval_batch_size=3, save_strategy="no", **options,
    )  # fmt: skip
    return BayesianTrainer(model=model, args=args, train_dataset=Images(), eval_dataset=Images())


@pytest.mark.parametrize("build", MODELS)
def test_the_training_nll_is_the_models_own_loss(build: Any) -> None:
    """Bilinear to the labels' resolution, pixels of 255 left out; times the number of pixels that count."""
    model, batch = build(), Images().batch()
    assert resolve_problem_type(model) == "semantic_segmentation"
    with torch.no_grad():
        output = model(**batch)
    found = item_nll(output, without_ignored(batch, model, "semantic_segmentation"), "semantic_segmentation")
    assert int(found.mask.sum()) == 4 * 41 * 40
    assert float(found.sum()) == pytest.approx(float(output.loss) * 4 * 41 * 40, rel=1e-6)


def test_prediction_is_per_pixel() -> None:
    """Against the network at every drawn weight: class axis last, at the logits' resolution and at the labels'."""
    model, batch = to_bayesian(segformer(), delta=0.3), Images().batch()
    found = predict(model, batch, num_samples=3)
    with torch.no_grad():
        logits = []
        for index in range(3):
            with fixed_draw(model, index):
                logits.append(model(batch["pixel_values"]).logits)
    assert found.log_probs is not None and found.log_probs.shape == (3, 4, 16, 16, CLASSES)
    torch.testing.assert_close(found.log_probs, torch.stack(logits).movedim(2, -1).log_softmax(-1))
    assert found.mutual_information.shape == (4, 16, 16) and bool((found.mutual_information > 0).any())
    fine = torch.stack([nn.functional.interpolate(part, (48, 40), mode="bilinear").softmax(1) for part in logits])
    mean = fine.mean(0).movedim(1, -1)
    torch.testing.assert_close(found.resized((48, 40)).probs, mean, rtol=1e-5, atol=1e-6)
    score = found.log_prob(batch["labels"])
    assert bool(score[:, :7].isnan().all())
    classes = batch["labels"].masked_fill(batch["labels"] == 255, 0)
    expected = mean.log().gather(-1, classes[..., None]).squeeze(-1)
    torch.testing.assert_close(score[:, 7:], expected[:, 7:], rtol=1e-5, atol=1e-5)


def test_training_and_evaluation(tmp_path: Path) -> None:
    """N is the number of labelled pixels; metrics are those of the averaged prediction at the labels' resolution."""
    model = to_bayesian(segformer(), delta=0.3)
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    assert model.config.bayesian["num_training_items"] == 4 * 41 * 40
    output, data = trainer.predict(Images()), Images()
    assert output.predictions.shape == (4, CLASSES, 16, 16)  # channel first: stock recipes interpolate them
    assert output.label_ids.shape == output.uncertainty["mutual_information"].shape == (4, 48, 40)
    predictive = predict(model, data.batch(), num_samples=3, seed=trainer.args.eval_seed)
    np.testing.assert_allclose(output.predictions, predictive.mean_log_probs.movedim(-1, 1).numpy(), atol=1e-5)
    kept = data.labels != 255
    probs, labels = predictive.resized((48, 40)).probs[kept].double().numpy(), data.labels[kept].numpy()
    probs = probs / probs.sum(1, keepdims=True)
    expected = {
        "test_nll": float(-predictive.log_prob(data.labels).nanmean()),
        "test_ece": expected_calibration_error(probs, labels),
        "test_brier": brier_score(probs, labels),
        "test_aurc": aurc(probs.max(1), (probs.argmax(1) != labels).astype(float)),
        "test_mutual_information": float(predictive.resized((48, 40)).mutual_information[kept].mean()),
    }
    for name, value in expected.items():
        assert output.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert output.metrics["test_loss"] == output.metrics["test_nll"]


def test_pixels_by_hand() -> None:
    """A network that transformers does not know has to say it: its softmax would run over the width."""
    net, x = to_bayesian(nn.Conv2d(3, 4, 3), delta=0.1), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match='say `problem_type="semantic_segmentation"`'):
        predict(net, x)
    assert predict(net, x, problem_type="semantic_segmentation", num_samples=2).probs.shape == (2, 6, 6, 4)
    with pytest.raises(ValueError, match="over positions"):
        predict(net, x, problem_type="semantic_segmentation", method="glm")


def test_no_laplace_posterior_of_pixels() -> None:
    """Refused at once; also where the likelihood is given, for it would run over the width."""
    with pytest.raises(ValueError, match="There is no Laplace posterior for a 'semantic_segmentation' head"):
        fit(segformer(), [Images().batch()], progress=False)
    with pytest.raises(ValueError, match=r"got \(4, 3, 16, 16\)"):
        fit(segformer(), [Images().batch()], likelihood="classification", progress=False)
