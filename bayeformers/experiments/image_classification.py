"""An image data set as an experiment sees it: what trains, what is held out of it, and the record of what was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, default_data_collator

from ..models.catalogue import IMAGE_CLASSIFIERS
from ..nn import posterior_mean
from ..reports import ClassPredictions, classification_report
from ..tasks.images import ImageDataset, ImageSource, Resize, load_images
from ..training import BayesianTrainer
from .arguments import BestEpochArguments, HoldOutArguments, check_least, flag
from .evaluation import predict_sets
from .phases import Experiment, OneLineProgress
from .rows import FRESH, SPLIT_AGAIN, Hashes, History, Split, TrainingRows, row_hashes
from .splits import RowKind, hold_out

__all__ = [
    "ImageArguments", "ImageData", "ImageTrainingArguments", "further", "image_size_of", "learning_curve",
    "load_classifier", "load_image_data", "predict_by_mean", "predict_images", "predict_rotated",
]  # fmt: skip

SCORES = ("accuracy", "nll", "ece", "brier", "aurc", "entropy", "aleatoric", "epistemic")
REMEDIES = f"Give {SPLIT_AGAIN}, or take them of the official test images: --held_out_of test."


@dataclass
class ImageArguments(HoldOutArguments):
    """Which images, and from where."""

    data_dir: str | None = flag(
        None,
        "Folder of IDX files by MNIST's names (Fashion-MNIST's too), gzip or not; with t10k files alone "
        "the first four fifths train, the others test. Left out, with --dataset_name too: scikit-learn's digits.",
    )
    dataset_name: str | None = flag(
        None, "Image classification data set of the hub: ylecun/mnist, uoft-cs/cifar10, ..."
    )
    image_size: int | None = flag(None, "Side of the images that the model sees; the model's own if not given.")
    resize: Resize = flag(
        "bilinear", "How images get that size: bilinear, nearest, or pad (a black frame; never smaller)."
    )
    validation_share: float = flag(0.125, "Share of the training images held out, by the seed, for every choice.")
    held_out_of: Literal["train", "test"] = flag(
        "train",
        "Which images that share is taken of; test: of the test images, for a --model_name_or_path that "
        "was trained on all training images.",
    )

    def __post_init__(self) -> None:
        """Refuse two sources, and sizes that leave nothing to see."""
        if self.data_dir is not None and self.dataset_name is not None:
            raise ValueError(
                f"`data_dir` {self.data_dir!r} and `dataset_name` {self.dataset_name!r} each name the images: give one."
            )
        if self.resize not in get_args(Resize):
            raise ValueError(f"`resize` must be one of {', '.join(get_args(Resize))}, got {self.resize!r}.")
        check_least(self, image_size=1)
        super().__post_init__()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides, with the seed, which images are held out."""
        return {name: getattr(self, name) for name in ("validation_share", "held_out_of", "max_train_samples")}


@dataclass
class ImageTrainingArguments(BestEpochArguments):
    """Those of an image classifier's trainings, which keep the epoch of least validation NLL."""

    learning_rate: float = flag(1e-3, "Learning rate of the deterministic training.")
    per_device_eval_batch_size: int = flag(200, "Images per evaluation batch.")
    patience: int = flag(10, "Stop the deterministic training after so many epochs without a better NLL.")
    save_only_model: bool = flag(True, "Keep no optimizer state of the epochs.")
    metric_for_best_model: str | None = flag("eval_nll", "What is best: this alone.")
    bayesian_epochs: float = flag(4.0, "Epochs of every further training, the ELBO's too.")
    bayesian_learning_rate: float | None = flag(
        None, "Learning rate of trainable means in them; 0.3 times --learning_rate if not given."
    )

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        **BestEpochArguments.fixed,
        "metric_for_best_model": ("eval_nll", BestEpochArguments.fixed["metric_for_best_model"][1]),
    }

    def __post_init__(self) -> None:
        """Refuse a training without an epoch."""
        super().__post_init__()
        check_least(self, bayesian_epochs=1)


@dataclass(frozen=True)
class ImageData:
    """Three disjoint sets of images. Fitting sees `train`, every choice `validation`; `test` is only reported.

    ``class_names`` are by label. ``rows``: the record of a model that this run saves; None where it cannot be known.
    """

    name: str
    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset
    class_names: tuple[str, ...]
    rows: TrainingRows | None = None

    def described(self, model: str) -> str:
        """Model and test images, for the heading of a picture."""
        channels, height, width = self.shape
        size = f"{height} x {width}" if channels == 1 else f"{height} x {width} x {channels}"
        return f"{model} on {self.name}: {len(self.test):,} test images of {size}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pixel values."""
        channels, height, width = self.train[0]["pixel_values"].shape
        return channels, height, width

    @property
    def facts(self) -> dict[str, Any]:
        """Name and sizes, for results.json."""
        return {"name": self.name, **{part: len(getattr(self, part)) for part in ("train", "validation", "test")}}

    def scores(self, predictions: ClassPredictions, part: str = "test") -> dict[str, float | None]:
        """The columns of every table, of predictions on the ``part`` of that name."""
        images: ImageDataset = getattr(self, part)
        report = classification_report(predictions, images.labels.numpy())
        return {name: report[name] for name in SCORES}

    @property
    def model_fields(self) -> dict[str, Any]:
        """What the configuration of a model for these images says of them."""
        names = dict(enumerate(self.class_names))
        labels = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
        return {"num_channels": self.shape[0], "image_size": self.shape[1], **labels}


def load_image_data(
    args: ImageArguments,
    seed: int,
    image_size: int | None = None,
    *,
    centre: bool = True,
    history: History = FRESH,
) -> ImageData:
    """Return the images that the arguments name, split by `seed`, or as the model that the run starts from was.

    Held-out images that the model has seen, or may have, are an error.

    Args:
        args: the arguments.
        seed: the run's.
        image_size: the model's, where the arguments have none.
        centre: False divides pixels by their standard deviation alone, so that black stays 0.
        history: what is known of the images which that model was trained on.
    """
    is_digits = not (args.data_dir or args.dataset_name)
    size = image_size if args.image_size is None else args.image_size

    def stored(of_seed: int) -> ImageSource:
        return load_images(data_dir=args.data_dir, dataset_name=args.dataset_name, image_size=size, seed=of_seed)

    def make(split: Split) -> dict[str, Any]:
        images = stored(split.seed) if is_digits else source  # the digits' test images depend on the seed
        return vars(images.split(split.seed, **split.settings, size=size, resize=args.resize, centre=centre))

    source = stored(seed if args.split_seed is None else args.split_seed)
    sets, rows = hold_out(
        make, args, seed, history,
        RowKind(source.name, "Images", lambda images: hashes_of(images.pixels), remedies=REMEDIES),
        source=np.concatenate([hashes_of(source.train[0]), hashes_of(source.test[0])]), settings=args.settings,
        held_out=("validation", "test"),
        given=("validation", "test") if args.held_out_of == "test" and not is_digits else (),
    )  # fmt: skip
    return ImageData(source.name, **sets, class_names=source.class_names, rows=rows)


def image_size_of(model: str, name_or_path: str | None = None) -> int | None:
    """Side of the images that a model is for; None where a loaded model's configuration does not say."""
    if name_or_path is None:
        return IMAGE_CLASSIFIERS[model].image_size
    size = getattr(AutoConfig.from_pretrained(name_or_path), "image_size", None)
    return size if isinstance(size, int) else None


def load_classifier(model: str, name_or_path: str | None, width: float, data: ImageData) -> PreTrainedModel:
    """Return a new model for these images, or a trained one.

    Args:
        model: a name of `IMAGE_CLASSIFIERS`.
        name_or_path: the trained one's folder, or its name on the hub.
        width: factor of the new one's widths.
        data: the images.

    Raises:
        ValueError: the trained model is for another number of channels or of classes.
    """
    fields = data.model_fields
    if name_or_path is None:
        return IMAGE_CLASSIFIERS[model].make(width, fields)
    trained: PreTrainedModel = AutoModelForImageClassification.from_pretrained(name_or_path)
    needed = {name: fields[name] for name in ("num_channels", "num_labels")}
    own = {name: getattr(trained.config, name, value) for name, value in needed.items()}
    if own != needed:
        raise ValueError(f"`model_name_or_path` {name_or_path} has {own}; the images of {data.name} need {needed}.")
    return trained


def further(experiment: Experiment, model: nn.Module, name: str) -> BayesianTrainer:
    """Return a trainer of weights, or means, that are trained already: for ``--bayesian_epochs``, without an early end.

    Args:
        experiment: whose rows and flags it takes.
        model: the network with these weights, or means.
        name: of the phase, and of its folder of checkpoints.
    """
    args = experiment.args
    rate = 0.3 * args.learning_rate if args.bayesian_learning_rate is None else args.bayesian_learning_rate
    changes: dict[str, Any] = {"num_train_epochs": args.bayesian_epochs, "learning_rate": rate}
    return experiment.trainer(model, name, stop_early=False, **changes)


def learning_curve(trainer: BayesianTrainer) -> list[float]:
    """Validation NLL after each epoch of the trainer's training."""
    return [float(logs["eval_nll"]) for logs in trainer.state.log_history if "eval_nll" in logs and "epoch" in logs]


def predict_images(trainer: BayesianTrainer, images: ImageDataset) -> ClassPredictions:
    """Predictions of the trainer's posterior, or of its point estimate."""
    predictions: ClassPredictions = predict_sets(trainer, {"images": images})["images"]
    return predictions


def predict_rotated(
    trainers: Mapping[str, BayesianTrainer], images: ImageDataset, degrees: Sequence[float], *, progress: bool
) -> dict[str, list[ClassPredictions]]:
    """Return predictions on images turned by each angle, by the trainer's name.

    Args:
        trainers: by name; their own progress bars are taken away.
        images: what is turned.
        degrees: angles of the turns, counter-clockwise.
        progress: whether to show one bar, over the angles.
    """
    for trainer in trainers.values():
        trainer.pop_callback(OneLineProgress)
    angles = tqdm(degrees, desc="angles", disable=not progress)
    turned = [{name: predict_images(of, images.rotated(angle)) for name, of in trainers.items()} for angle in angles]
    return {name: [predictions[name] for predictions in turned] for name in trainers}


@torch.no_grad()
def predict_by_mean(trainer: BayesianTrainer, images: ImageDataset) -> ClassPredictions:
    """Predictions of the network at the posterior's mean, without noise."""
    loader = DataLoader(images, trainer.args.per_device_eval_batch_size, collate_fn=default_data_collator)
    model, device = trainer.model.to(trainer.args.device).eval(), trainer.args.device
    with posterior_mean(model):
        logits = [model(pixel_values=batch["pixel_values"].to(device)).logits for batch in loader]
    return ClassPredictions(torch.cat(logits).double().softmax(-1).cpu().numpy())


def hashes_of(pixels: Tensor) -> Hashes:
    """Of each stored image."""
    return row_hashes(image.tobytes() for image in pixels.numpy())
