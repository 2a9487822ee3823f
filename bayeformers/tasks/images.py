"""Labelled images: MNIST's IDX files, scikit-learn's digits or a data set of the hub; held out, resized, normalised.

>>> source = load_images()                            # scikit-learn's digits
>>> splits = source.split(seed=0, validation_share=0.125)
>>> len(splits.train), len(splits.validation), len(splits.test), splits.train[0]["pixel_values"].shape
(1258, 180, 359, torch.Size([1, 8, 8]))
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .idx import read_idx_pair
from .loading import load_hub

__all__ = ["ImageDataset", "ImageSource", "ImageSplits", "Preprocessing", "Resize", "load_images", "resized", "rotate"]

Resize = Literal["bilinear", "nearest", "pad"]

_DIGITS_TEST_SHARE = 0.2  # of scikit-learn's digits, which have no official split
_T10K_TRAIN_SHARE = 0.8  # of a folder that has MNIST's t10k files only: the first 8,000
_CHUNK = 1024  # images that are resized at once


@dataclass(frozen=True)
class Preprocessing:
    """From stored to seen pixels: resized to ``size``, then (image - mean) / std by channel.

    Attributes:
        size: side of the result; None leaves the images as they are.
        resize: how.
        mean: of the training images in [0, 1], after resizing; (C,). A mean of 0 leaves black at 0.
        std: their standard deviation; (C,).
    """

    size: int | None
    resize: Resize
    mean: Tensor
    std: Tensor

    @classmethod
    def fit(
        cls, pixels: Tensor, size: int | None = None, resize: Resize = "bilinear", *, centre: bool = True
    ) -> "Preprocessing":
        """Return the preprocessing of these and of other images, by mean and standard deviation of each channel.

        A constant channel is only centred.

        Args:
            pixels: stored bytes, (N, C, h, w).
            size: side of the result.
            resize: how.
            centre: False leaves the mean at 0, so that black stays 0.
        """
        channels = pixels.shape[1]
        total, squares, count = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
        plain = cls(size, resize, torch.zeros(channels), torch.ones(channels))
        for chunk in torch.split(pixels, _CHUNK):
            values = plain.images(chunk).double().transpose(0, 1).flatten(1)
            total += values.sum(1)
            squares += values.square().sum(1)
            count += values.shape[1]
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        std = torch.where(std > 1e-6, std, 1.0).float()
        return replace(plain, mean=mean.float() if centre else plain.mean, std=std)

    def images(self, pixels: Tensor) -> Tensor:
        """Stored bytes (N, C, h, w) as images in [0, 1], (N, C, H, W)."""
        return resized(pixels.float() / 255, self.size, self.resize)

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model sees them. Shape: (..., C, H, W) -> the same."""
        return (images - self.mean[:, None, None]) / self.std[:, None, None]


@dataclass(frozen=True)
class ImageDataset(Dataset[dict[str, Any]]):
    """Labelled images: items {"pixel_values": (C, H, W) float32, "labels": int}, made when asked for.

    ``pixels`` are stored unsigned bytes (N, C, h, w), ``labels`` int64 (N,). Images are turned by ``degrees`` before
    they are normalised; what comes in from outside is black.
    """

    pixels: Tensor
    labels: Tensor
    preprocessing: Preprocessing
    degrees: float = 0.0

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
        """All images in [0, 1], resized and turned: (N, C, H, W)."""
        images = self.preprocessing.images(self.pixels)
        return rotate(images, self.degrees) if self.degrees else images

    @property
    def pixel_values(self) -> Tensor:
        """All images as the model sees them: (N, C, H, W)."""
        return self.preprocessing.normalize(self.images)

    def select(self, indices: Sequence[int] | Tensor) -> "ImageDataset":
        """The images at some positions, in that order."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])

    def rotated(self, degrees: float) -> "ImageDataset":
        """The same images, turned counter-clockwise by so many degrees."""
        return replace(self, degrees=degrees)


@dataclass(frozen=True)
class ImageSplits:
    """Three disjoint sets of images. Fitting sees `train`, every choice `validation`; `test` is only reported."""

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset


@dataclass(frozen=True)
class ImageSource:
    """Images as stored, unsigned bytes (N, C, h, w), with labels (N,): a part to train on, and a part to test on."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    class_names: tuple[str, ...]

    def split(
        self,
        seed: int,
        validation_share: float = 0.125,
        *,
        held_out_of: Literal["train", "test"] = "train",
        max_train_samples: int | None = None,
        size: int | None = None,
        resize: Resize = "bilinear",
        centre: bool = True,
    ) -> ImageSplits:
        """Hold the validation images out, and normalise all three sets by the other training images.

        Args:
            seed: draws the images that are held out.
            validation_share: how many of them, in (0, 1).
            held_out_of: which images the share is taken of; "test" for a model that has seen all training images.
            max_train_samples: keep the first so many of the training images.
            size: side of the images that the model sees; None leaves them as they are.
            resize: how they get that size.
            centre: False divides pixels by their standard deviation alone, so that black stays 0.

        Returns:
            The three sets.

        Raises:
            ValueError: images of different sizes, a share that leaves an empty set, or images that cannot be resized.
        """
        shapes = [tuple(part[0].shape[1:]) for part in (self.train, self.test)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{self.name}: training images of {shapes[0]}, test images of {shapes[1]} (C, H, W).")
        of_train = held_out_of == "train"
        pool, kind = (self.train, "training") if of_train else (self.test, "test")
        count = len(pool[1])
        held = round(validation_share * count)
        if not 0 < held < count:
            raise ValueError(f"`validation_share` {validation_share} of {count} {kind} images leaves an empty set.")
        order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
        rest = order[held:] if of_train else order[held:].sort().values
        fitting = (rest if of_train else torch.arange(len(self.train[1])))[:max_train_samples]
        testing = torch.arange(len(self.test[1])) if of_train else rest
        preprocessing = Preprocessing.fit(self.train[0][fitting], size, resize, centre=centre)
        parts = ((self.train, fitting), (pool, order[:held]), (self.test, testing))
        return ImageSplits(*(ImageDataset(part[0][rows], part[1][rows], preprocessing) for part, rows in parts))


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Return images (B, C, H, W) turned counter-clockwise about their centre, by bilinear interpolation.

    What is turned in from outside is 0: black, of images in [0, 1].

    >>> rotate(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 90)
    tensor([[[[2.0000, 4.0000],
              [1.0000, 3.0000]]]])

    Raises:
        ValueError: `images` have not four axes, or `degrees` is not finite.
    """
    if images.dim() != 4:
        raise ValueError(f"`images` must be (B, C, H, W), got {tuple(images.shape)}.")
    if not math.isfinite(degrees):
        raise ValueError(f"`degrees` must be finite, got {degrees}.")
    height, width = images.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # affine_grid's coordinates run from -1 to 1 along each axis: the ratio keeps the angle in an image not square
    where = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    theta = torch.tensor(where, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def resized(images: Tensor, size: int | None, resize: Resize) -> Tensor:
    """Return images (N, C, h, w) at another size, (N, C, size, size).

    Args:
        images: as they are.
        size: side of the result; None leaves them as they are.
        resize: how.

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


def load_images(
    *,
    data_dir: str | PathLike[str] | None = None,
    dataset_name: str | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> ImageSource:
    """Return the images, as they are stored, of a folder, of the hub, or scikit-learn's digits where neither is named.

    Args:
        data_dir: folder of IDX files by MNIST's names: the official split; with the t10k files alone, their first
            four fifths train.
        dataset_name: image classification data set of the hub, such as "ylecun/mnist".
        image_size: side to which the hub's images are brought where they have several sizes.
        seed: draws the digits' test images, a fifth: they have no official split.
    """
    if data_dir is not None:
        return _idx_images(data_dir)
    return _digits(seed) if dataset_name is None else _hub_images(dataset_name, image_size)


def _digits(seed: int) -> ImageSource:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels with 17 grey levels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(labels)))
    test, train = order.tensor_split([round(_DIGITS_TEST_SHARE * len(order))])
    return ImageSource("digits", (pixels[train], labels[train]), (pixels[test], labels[test]), _numbers(10))


def _idx_images(folder: str | PathLike[str]) -> ImageSource:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"`data_dir` {folder} is not a folder.")
    test = _tensors(*read_idx_pair(folder, "t10k"))
    if any(Path(folder).glob("train-*-ubyte*")):  # one of the two is enough: the other's absence is then an error
        train = _tensors(*read_idx_pair(folder, "train"))
    else:
        cut = int(_T10K_TRAIN_SHARE * len(test[1]))
        train, test = (test[0][:cut], test[1][:cut]), (test[0][cut:], test[1][cut:])
    classes = int(max(labels.max() for _, labels in (train, test))) + 1
    return ImageSource(Path(folder).resolve().name, train, test, _numbers(classes))


def _tensors(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64))


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _hub_images(name: str, size: int | None) -> ImageSource:
    import datasets

    local = "Without network, give --data_dir a folder of MNIST's IDX files, or neither flag for scikit-learn's digits."
    splits = load_hub(name, remedy=local)
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"`dataset_name` {name!r} needs a split train and one test or validation, got {list(splits)}.")
    features = splits["train"].features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"`dataset_name` {name!r} needs an image and a class label column, got {features}.")
    train, held = (_of_hub(splits[split], image, label, size) for split in ("train", test))
    return ImageSource(name, train, held, tuple(features[label].names))


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
