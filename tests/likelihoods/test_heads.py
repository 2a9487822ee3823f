"""Every head of transformers' auto tables: a problem type that is right, or one error that names `problem_type`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForMaskedImageModeling, ViTModel
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto import modeling_auto as auto

from bayeformers import BayesianTrainer, BayesianTrainingArguments, VariationalPosterior, predict, to_bayesian
from bayeformers.likelihoods import PROBLEM_TYPES, ProblemType, check_problem_type, resolve_problem_type

TABLES = {
    name.removesuffix("_MAPPING_NAMES"): table for name, table in vars(auto).items() if name.endswith("_MAPPING_NAMES")
}
REFUSED = (
    "MODEL", "MODEL_FOR_IMAGE", "MODEL_FOR_MASKED_IMAGE_MODELING", "MODEL_FOR_IMAGE_SEGMENTATION",
    "MODEL_FOR_INSTANCE_SEGMENTATION", "MODEL_FOR_UNIVERSAL_SEGMENTATION", "MODEL_FOR_OBJECT_DETECTION",
    "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION", "MODEL_FOR_DEPTH_ESTIMATION", "MODEL_FOR_CTC", "MODEL_FOR_RNNT",
    "MODEL_FOR_TDT", "MODEL_FOR_AUDIO_XVECTOR", "MODEL_FOR_TEXT_TO_SPECTROGRAM", "MODEL_FOR_BACKBONE",
    "MODEL_FOR_MASK_GENERATION", "MODEL_FOR_KEYPOINT_DETECTION", "MODEL_FOR_KEYPOINT_MATCHING",
    "MODEL_FOR_TIME_SERIES_CLASSIFICATION", "MODEL_FOR_TIME_SERIES_REGRESSION", "MODEL_FOR_TIME_SERIES_PREDICTION",
    "MODEL_FOR_IMAGE_TO_IMAGE", "MODEL_FOR_TABLE_QUESTION_ANSWERING", "MODEL_FOR_DECISION",
)  # fmt: skip
KNOWN: dict[str, ProblemType] = {
    "MODEL_FOR_SEMANTIC_SEGMENTATION": "semantic_segmentation",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": "single_label_classification",
    "MODEL_FOR_IMAGE_CLASSIFICATION": "single_label_classification",
    "MODEL_FOR_VIDEO_CLASSIFICATION": "single_label_classification",
    "MODEL_FOR_AUDIO_CLASSIFICATION": "single_label_classification",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION": "single_label_classification",
    "MODEL_FOR_MULTIPLE_CHOICE": "single_label_classification",
    "MODEL_FOR_NEXT_SENTENCE_PREDICTION": "single_label_classification",
    "MODEL_FOR_TOKEN_CLASSIFICATION": "token_classification",
    "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION": "token_classification",
    "MODEL_FOR_QUESTION_ANSWERING": "question_answering",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM": "seq2seq_lm",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ": "seq2seq_lm",
}


class PreTrainedModel(nn.Module):
    """Stands in for a class of transformers, of which the tables say the name: importing 1,500 takes minutes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(problem_type=None, num_labels=3, is_encoder_decoder=False)
        found = re.findall(f"({'|'.join(LOSS_MAPPING)})", type(self).__name__)
        self.loss_type = found[0] if found else None


def stand_in(name: str) -> nn.Module:
    made: nn.Module = type(name, (PreTrainedModel,), {"__module__": "transformers.models.any"})()
    return made


def names_of(table: Mapping[str, Any]) -> set[str]:
    values = [value if isinstance(value, (list, tuple)) else (value,) for value in table.values()]
    return {name for names in values for name in names}


def type_or_error(model: nn.Module) -> str:
    try:
        return resolve_problem_type(model)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("table", sorted(set(TABLES) - {"CONFIG"}))
def test_every_table(table: str) -> None:
    """A type that we have, or the error; of the tables that are known, the same for every class."""
    for name in sorted(names_of(TABLES[table])):
        found = type_or_error(stand_in(name))
        if found not in PROBLEM_TYPES:
            assert f"`problem_type` of {name} is not known" in found and "semantic_segmentation" in found
            assert table not in KNOWN, name
            assert resolve_problem_type(stand_in(name), or_unknown=True) == "unknown"
            continue
        assert found == KNOWN.get(table, found), name
        is_known = any(name in names_of(TABLES[known]) for known in KNOWN) or found == "causal_lm"
        assert table not in REFUSED or is_known, (name, found)


def tiny(cls: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = cls(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
            encoder_stride=4,
        )
    ).eval()  # fmt: skip
    return model


def test_a_head_that_is_not_known_is_refused_before_anything(tmp_path: Path) -> None:
    """In training and in prediction; raw passes and a training on a plain model's own loss go on working."""
    model, pixels = to_bayesian(tiny(ViTForMaskedImageModeling), delta=0.1), torch.randn(2, 3, 8, 8)
    data = [{"pixel_values": image, "bool_masked_pos": torch.tensor([True, False, True, False])} for image in pixels]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused = pytest.raises(ValueError, match="`problem_type` of ViTForMaskedImageModeling is not known")
    with refused:
        predict(model, {"pixel_values": pixels})
    args = BayesianTrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1, save_strategy="no"
    )
    trainer = BayesianTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    for call in (trainer.train, trainer.evaluate):
        with refused:
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(list(VariationalPosterior(model).passes({"pixel_values": pixels}, num_samples=2))) == 2
    plain = BayesianTrainer(model=tiny(ViTForMaskedImageModeling), args=args, train_dataset=data, eval_dataset=data)
    assert plain.train().training_loss > 0


def test_a_head_of_ones_own_on_a_body() -> None:
    """It is not transformers': unknown, as a plain network is."""

    class Mine(ViTModel):
        pass

    assert resolve_problem_type(tiny(Mine)) == "unknown"
    with pytest.raises(ValueError, match="`problem_type` of ViTModel is not known"):
        resolve_problem_type(tiny(ViTModel))


@pytest.mark.parametrize("problem_type", ["multilabel", "classification", "unknown", "", 1, ["regression"]])
def test_a_typo_is_no_softmax(problem_type: Any) -> None:
    with pytest.raises(ValueError, match="`problem_type` must be one of .* got"):
        predict(nn.Linear(4, 3), torch.ones(1, 4), problem_type=problem_type)
    with pytest.raises(ValueError, match="`problem_type` must be one of .* got"):
        check_problem_type(problem_type)


def test_one_logit_has_no_softmax() -> None:
    with pytest.raises(ValueError, match="a softmax over one class is 1"):
        predict(nn.Linear(4, 1), torch.ones(2, 4))
    assert predict(nn.Linear(4, 1), torch.ones(2, 4), problem_type="multi_label_classification").probs.shape == (
        2,
        1,
        2,
    )


@pytest.mark.parametrize("labels", [torch.tensor([0.7, 1.0]), torch.tensor([0.0, 1.0]), [0, 1], None])
def test_float_labels_are_not_truncated(labels: Any) -> None:
    predictive = predict(nn.Linear(4, 3), torch.ones(2, 4))
    with pytest.raises((TypeError, ValueError), match="`labels` must be"):
        predictive.log_prob(labels)


def test_indicators_may_be_floats() -> None:
    predictive = predict(nn.Linear(4, 3), torch.ones(2, 4), problem_type="multi_label_classification")
    whole = torch.tensor([[0, 1, 1], [1, 0, 1]])
    assert torch.equal(predictive.log_prob(whole), predictive.log_prob(whole.float()))
    with pytest.raises(ValueError, match="`labels` must be integer classes"):
        predictive.log_prob(0.5 * whole)


def test_a_compiled_model_is_seen_through() -> None:
    assert resolve_problem_type(torch.compile(stand_in("BertForTokenClassification"))) == "token_classification"
