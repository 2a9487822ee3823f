"""The flags of image data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Resize = Literal["bilinear", "nearest", "pad"]


@dataclass
class DataArguments:
    """Which images, and from where."""

    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of IDX files by MNIST's names (Fashion-MNIST's too), gzip or not; with t10k files alone "
            "the first four fifths train, the others test. Left out, with --dataset_name too: scikit-learn's digits."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Image classification data set of the hub: ylecun/mnist, uoft-cs/cifar10, ..."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images that the model sees; the model's own if not given."}
    )
    resize: Resize = field(
        default="bilinear",
        metadata={"help": "How images get that size: bilinear, nearest, or pad (a black frame; never smaller)."},
    )
    validation_share: float = field(
        default=0.125, metadata={"help": "Share of the training images held out, by the seed, for every choice."}
    )
    held_out_of: Literal["train", "test"] = field(
        default="train",
        metadata={
            "help": "Which images that share is taken of; test: of the test images, for a --model_name_or_path that "
            "was trained on all training images."
        },
    )
    split_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the held-out images, and of the digits' test images; if not given, that of the record of "
            "--model_name_or_path, else --seed."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many of each other set."})

    def __post_init__(self) -> None:
        if self.data_dir is not None and self.dataset_name is not None:
            raise ValueError(
                f"`data_dir` {self.data_dir!r} and `dataset_name` {self.dataset_name!r} each name the images: give one."
            )
        if self.resize not in get_args(Resize):
            raise ValueError(f"`resize` must be one of {', '.join(get_args(Resize))}, got {self.resize!r}.")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"`validation_share` must lie between 0 and 1, got {self.validation_share}.")
        for name, least in (("image_size", 1), ("max_train_samples", 2), ("max_eval_samples", 2)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
