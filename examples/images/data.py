"""From the arguments to normalised images: scikit-learn's digits, IDX files, or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

from examples.held_out import (
    FRESH,
    SPLIT_AGAIN,
    Hashes,
    History,
    Split,
    TrainingRows,
    check_known,
    check_split_seed,
    fingerprint,
    row_hashes,
    say_split,
    unseen_sets,
)
from examples.images.arguments import DataArguments, Resize
from examples.images.idx import find_idx, read_idx_pair

DIGITS_TEST_SHARE = 0.2  # of scikit-learn's digits, which have no official split
T10K_TRAIN_SHARE = 0.8  # of a folder that has MNIST's t10k files only: the first 8,000
CHUNK = 1024  # images that are resized at once


@dataclass(frozen=True)
class Preprocessing:
    """From stored to seen pixels: resized to ``size``, then (image - mean) / std by channel.

    Attributes:
        size: side of the result; None leaves the images as they are.
        resize: how.
        mean, std: of the training images in [0, 1], after resizing; (C,). A mean of 0 leaves black at 0.
    """

    size: int | None
    resize: Resize
    mean: Tensor
    std: Tensor

    def images(self, pixels: Tensor) -> Tensor:
        """Stored bytes (N, C, h, w) as images in [0, 1], (N, C, H, W)."""
        return resized(pixels.float() / 255, self.size, self.resize)

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model sees them. Shape: (..., C, H, W) -> the same."""
        return (images - self.mean[:, None, None]) / self.std[:, None, None]


@dataclass(frozen=True)
class Images(Dataset[dict[str, Any]]):
    """Labelled images: items {"pixel_values": (C, H, W) float32, "labels": int}, resized when asked for.

    Attributes:
        pixels: as stored, unsigned bytes (N, C, h, w).
        labels: (N,), int64.
        preprocessing: what makes pixel values of them.
    """

    pixels: Tensor
    labels: Tensor
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items of a batch: torch's DataLoader asks for them together."""
        batch = self.select(indices)
        labels = batch.labels.tolist()
        return [{"pixel_values": x, "labels": y} for x, y in zip(batch.pixel_values, labels, strict=True)]

    @property
    def images(self) -> Tensor:
        """All images in [0, 1], resized: (N, C, H, W). To look at, or to rotate."""
        return self.preprocessing.images(self.pixels)

    @property
    def pixel_values(self) -> Tensor:
        """All images as the model sees them: (N, C, H, W)."""
        return self.preprocessing.normalize(self.images)

    def select(self, indices: Sequence[int] | Tensor) -> Images:
        """Some of them, in that order."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])


@dataclass(frozen=True)
class ImageData:
    """Three disjoint sets of images. Fitting sees `train`, every choice `validation`; `test` is only reported.

    ``rows``: the record of a model that this run saves; None where it cannot be known.
    """

    name: str
    train: Images
    validation: Images
    test: Images
    class_names: tuple[str, ...]
    rows: TrainingRows | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pixel values."""
        channels, height, width = self.train[0]["pixel_values"].shape
        return channels, height, width


@dataclass(frozen=True)
class Stored:
    """Images as stored: a part to train on and to hold out from, a part to test on."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    class_names: tuple[str, ...]


def load_images(
    args: DataArguments,
    seed: int,
    image_size: int | None = None,
    *,
    centre: bool = True,
    history: History = FRESH,
) -> ImageData:
    """The images that the arguments name, split by `seed`, or as the model that the run starts from was.

    ``image_size`` is the model's, where the arguments have none. Without ``centre`` the pixels are only divided by
    their standard deviation, so that black stays 0.

    Raises:
        FileNotFoundError, ValueError: missing or malformed files, images that cannot have that size, or held-out images
            that the model has seen, or may have.
        OSError: the hub cannot be reached; the message says how to use local files.
    """
    size = image_size if args.image_size is None else args.image_size
    own = Split(seed if args.split_seed is None else args.split_seed, _settings(args))
    history = replace(history, unknown="") if args.split_seed is not None else history
    if args.held_out_of == "train" or not (args.data_dir or args.dataset_name):
        check_known(history, REMEDIES)
    stored = _stored_images(args, own.seed, size)
    source = fingerprint(np.concatenate([hashes_of(stored.train[0]), hashes_of(stored.test[0])]))
    split = history.split(own, source)
    check_split_seed(args.split_seed, split)
    say_split("Images", own, split)
    stored = _stored_images(args, split.seed, size) if split.seed != own.seed else stored
    return split_images(stored, args, split, size, centre, history=history, source=source)


REMEDIES = f"Give {SPLIT_AGAIN}, or take them of the official test images: --held_out_of test."


def _settings(args: DataArguments) -> dict[str, Any]:
    """What decides, with the seed, which images are held out."""
    return {name: getattr(args, name) for name in ("validation_share", "held_out_of", "max_train_samples")}


def _stored_images(args: DataArguments, seed: int, size: int | None) -> Stored:
    if args.data_dir is not None:
        return idx_images(args.data_dir)
    return digits(seed) if args.dataset_name is None else hub_images(args.dataset_name, size)


def hashes_of(pixels: Tensor) -> Hashes:
    """Of each stored image."""
    return row_hashes(image.tobytes() for image in pixels.numpy())


def split_images(
    stored: Stored,
    args: DataArguments,
    split: Split,
    size: int | None,
    centre: bool = True,
    *,
    history: History = FRESH,
    source: str = "",
) -> ImageData:
    """Holds the validation images out, by the seed; mean and standard deviation are of the other training images."""
    if stored.train[0].shape[1:] != stored.test[0].shape[1:]:
        shapes = [tuple(part[0].shape[1:]) for part in (stored.train, stored.test)]
        raise ValueError(f"{stored.name}: training images of {shapes[0]}, test images of {shapes[1]} (C, H, W).")
    fitting, validation, test = _held_out(stored, split)
    pool = stored.train if split.settings["held_out_of"] == "train" else stored.test
    train = hashes_of(stored.train[0][fitting])
    found = {"validation": hashes_of(pool[0][validation]), "test": hashes_of(stored.test[0][test])}
    kept = unseen_sets(history, train, found, REMEDIES)
    validation, test = (rows[kept[name]][: args.max_eval_samples] for name, rows in
                        (("validation", validation), ("test", test)))  # fmt: skip
    preprocessing = fitted_preprocessing(stored.train[0][fitting], size, args.resize)
    if not centre:
        preprocessing = replace(preprocessing, mean=torch.zeros_like(preprocessing.mean))

    def images(part: tuple[Tensor, Tensor], rows: Tensor) -> Images:
        return Images(part[0][rows], part[1][rows], preprocessing)

    sets = images(stored.train, fitting), images(pool, validation), images(stored.test, test)
    rows = history.after(stored.name, source, split, train)
    return ImageData(stored.name, *sets, stored.class_names, rows)


def _held_out(stored: Stored, split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the training images, of the held-out ones where they are taken of, and of the test images."""
    of_train, share = split.settings["held_out_of"] == "train", split.settings["validation_share"]
    count = len((stored.train if of_train else stored.test)[1])
    held = round(share * count)
    if not 0 < held < count:
        kind = "training" if of_train else "test"
        raise ValueError(f"`validation_share` {share} of {count} {kind} images leaves an empty set.")
    order = torch.from_numpy(np.random.default_rng(split.seed).permutation(count))
    most = split.settings["max_train_samples"]
    if of_train:
        return order[held:][:most], order[:held], torch.arange(len(stored.test[1]))
    return torch.arange(len(stored.train[1]))[:most], order[:held], order[held:].sort().values


def fitted_preprocessing(pixels: Tensor, size: int | None, resize: Resize) -> Preprocessing:
    """Mean and standard deviation by channel of all resized training pixels; a constant channel is only centred."""
    channels = pixels.shape[1]
    total, squares, count = torch.zeros(2, channels, dtype=torch.float64), torch.zeros(channels).double(), 0
    plain = Preprocessing(size, resize, torch.zeros(channels), torch.ones(channels))
    for chunk in pixels.split(CHUNK):
        values = plain.images(chunk).double().transpose(0, 1).flatten(1)
        total[0] += values.sum(1)
        squares += values.square().sum(1)
        count += values.shape[1]
    mean = total[0] / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return replace(plain, mean=mean.float(), std=torch.where(std > 1e-6, std, 1.0).float())


def resized(images: Tensor, size: int | None, resize: Resize) -> Tensor:
    """Images at another size. Shape: (N, C, h, w) -> (N, C, size, size), or the same without ``size``.

    Raises:
        ValueError: "pad" to a size that is smaller than the image.
    """
    height, width = images.shape[2:]
    if size is None or (height, width) == (size, size):
        return images
    if resize == "nearest":
        return F.interpolate(images, (size, size), mode="nearest-exact")
    if resize == "bilinear":
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    if size < max(height, width):
        raise ValueError(f"`resize` 'pad' cannot shrink images of {height} x {width} to {size}: use 'bilinear'.")
    left, top = (size - width) // 2, (size - height) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


# ------------------------------------------------------------------------------------------------------------- sources


def digits(seed: int) -> Stored:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels with 17 grey levels; a fifth, by the seed, tests."""
    bunch = load_digits()
    pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(labels)))
    test, train = order.tensor_split([round(DIGITS_TEST_SHARE * len(order))])
    return Stored("digits", (pixels[train], labels[train]), (pixels[test], labels[test]), names(10))


def idx_images(folder: str) -> Stored:
    """MNIST's files: the official split; with the t10k files alone, their first four fifths train.

    Raises:
        FileNotFoundError, ValueError: the folder or a file is missing or damaged.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"`data_dir` {folder} is not a folder.")
    test = _tensors(*read_idx_pair(folder, "t10k"))
    if _has_training_files(folder):
        train = _tensors(*read_idx_pair(folder, "train"))
    else:
        cut = int(T10K_TRAIN_SHARE * len(test[1]))
        train, test = (test[0][:cut], test[1][:cut]), (test[0][cut:], test[1][cut:])
    classes = int(max(labels.max() for _, labels in (train, test))) + 1
    return Stored(Path(folder).resolve().name, train, test, names(classes))


def _has_training_files(folder: str) -> bool:
    """One of the two is enough: the other's absence is then an error."""
    for kind in ("images", "labels"):
        try:
            find_idx(folder, "train", kind)
        except FileNotFoundError:
            continue
        return True
    return False


def _tensors(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64))


def hub_images(name: str, size: int | None) -> Stored:
    """A data set of the hub with an image column and a column of class labels.

    Raises:
        OSError: it cannot be loaded.
        ValueError: it has no such columns or splits, or images of several sizes where no ``size`` is given.
    """
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client each have their own kinds
        raise OSError(
            f"{name} could not be loaded from the Hugging Face hub: {type(error).__name__}: {error}\n"
            "Without network, give --data_dir a folder of MNIST's IDX files, or neither flag for scikit-learn's digits."
        ) from error
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"`dataset_name` {name!r} needs a split train and one test or validation, got {list(splits)}.")
    features = splits["train"].features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"`dataset_name` {name!r} needs an image and a class label column, got {features}.")
    parts = [_of_hub(splits[split], image, label, size) for split in ("train", test)]
    return Stored(name, parts[0], parts[1], tuple(features[label].names))


def _of_hub(split: Any, image: str, label: str, size: int | None) -> tuple[Tensor, Tensor]:
    """Grey or RGB as the first image is; at their own size where all have one, else at ``size``."""
    mode = "L" if split[0][image].mode in ("1", "L") else "RGB"
    pictures = [picture.convert(mode) for picture in split[image]]
    if len({picture.size for picture in pictures}) > 1:
        if size is None:
            raise ValueError("The images have several sizes: `image_size` must be given.")
        pictures = [picture.resize((size, size)) for picture in pictures]
    pixels = np.stack([np.atleast_3d(np.asarray(picture)) for picture in pictures])
    return torch.from_numpy(pixels).movedim(-1, 1).contiguous(), torch.tensor(split[label], dtype=torch.long)


def names(count: int) -> tuple[str, ...]:
    """Class names that are their numbers."""
    return tuple(map(str, range(count)))
