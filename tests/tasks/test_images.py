"""Image data: every value from files made on the spot, splits, sizes, normalisation, rotation, and errors."""

import gzip
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import default_data_collator

from bayeformers.experiments.image_classification import ImageArguments, ImageData, load_image_data
from bayeformers.tasks.idx import read_idx
from bayeformers.tasks.images import load_images, resized, rotate


def idx(array: np.ndarray) -> bytes:
    """The format, by its description: 0, 0, type 8, axes; sizes, big-endian; values."""
    sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def images_of(count: int, start: int = 0, size: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Image i has the value start + i in its first pixel; labels 0, 1, 2, 0, ..."""
    rng = np.random.default_rng(start)
    images = rng.integers(0, 256, (count, size, size))
    images[:, 0, 0] = start + np.arange(count)
    return images, np.arange(count) % 3


def write(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray, compressed: bool = True) -> None:
    for kind, axes, array in (("images", 3, images), ("labels", 1, labels)):
        name = f"{prefix}-{kind}-idx{axes}-ubyte"
        data = idx(array)
        (folder / (f"{name}.gz" if compressed else name)).write_bytes(gzip.compress(data) if compressed else data)


def load(folder: Path, **changes: Any) -> ImageData:
    return load_image_data(ImageArguments(data_dir=str(folder), **changes), seed=0)


def first_pixels(part: Any) -> list[int]:
    return part.pixels[:, 0, 0, 0].tolist()


# --- Splits ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compressed", [True, False])
def test_of_t10k_alone_the_first_four_fifths_train(tmp_path: Path, compressed: bool) -> None:
    write(tmp_path, "t10k", *images_of(50), compressed)
    data = load(tmp_path, validation_share=0.25)
    assert first_pixels(data.test) == list(range(40, 50))
    assert sorted(first_pixels(data.train) + first_pixels(data.validation)) == list(range(40))
    assert (len(data.train), len(data.validation), data.shape) == (30, 10, (1, 4, 4))
    for part in (data.train, data.validation, data.test):
        assert part.labels.tolist() == [value % 3 for value in first_pixels(part)]


def test_the_official_split_where_it_is(tmp_path: Path) -> None:
    write(tmp_path, "t10k", *images_of(10, start=100))
    write(tmp_path, "train", *images_of(20))
    data = load(tmp_path, validation_share=0.5, max_train_samples=7, max_eval_samples=6)
    assert first_pixels(data.test) == list(range(100, 106))
    held = load(tmp_path, validation_share=0.5)
    assert first_pixels(data.train) == first_pixels(held.train)[:7]
    assert first_pixels(data.validation) == first_pixels(held.validation)[:6]
    assert sorted(first_pixels(held.train) + first_pixels(held.validation)) == list(range(20))


def test_the_seed_decides_what_is_held_out(tmp_path: Path) -> None:
    write(tmp_path, "t10k", *images_of(50))
    args = ImageArguments(data_dir=str(tmp_path))
    parts = [first_pixels(load_image_data(args, seed).validation) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


def test_digits_are_all_there_once_in_their_seventeen_greys() -> None:
    from sklearn.datasets import load_digits

    data = load_image_data(ImageArguments(), seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (1258, 180, 359)
    stored = torch.cat([part.pixels for part in (data.train, data.validation, data.test)])
    labels = torch.cat([part.labels for part in (data.train, data.validation, data.test)])
    ours = sorted(map(tuple, torch.cat([labels[:, None], stored.flatten(1)], 1).tolist()))
    bunch = load_digits()
    grey = np.rint(bunch.data * 255 / 16).astype(int)
    assert len(np.unique(grey)) == 17
    assert ours == sorted(map(tuple, np.concatenate([bunch.target[:, None], grey], 1).tolist()))
    tests = [set(map(tuple, load_images(seed=seed).test[0].flatten(1).tolist())) for seed in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]


# --- Values ----------------------------------------------------------------------------------------------------------
def test_items_are_normalised_by_the_training_images(tmp_path: Path) -> None:
    write(tmp_path, "t10k", *images_of(60))
    data = load(tmp_path)
    train = data.train.pixels.double() / 255
    for part in (data.train, data.validation, data.test):
        expected = (part.pixels.double() / 255 - train.mean()) / train.std(correction=0)
        torch.testing.assert_close(part.pixel_values.double(), expected, rtol=0, atol=1e-5)
    item = data.test[3]
    assert item["pixel_values"].dtype == torch.float32 and type(item["labels"]) is int
    torch.testing.assert_close(item["pixel_values"], data.test.pixel_values[3])
    black = data.train.preprocessing.normalize(torch.zeros(1, 1, 4, 4))
    torch.testing.assert_close(black.double().mean(), -train.mean() / train.std(correction=0), rtol=1e-4, atol=0)


def test_without_centring_black_is_zero(tmp_path: Path) -> None:
    write(tmp_path, "t10k", *images_of(60))
    data = load_image_data(ImageArguments(data_dir=str(tmp_path)), 0, centre=False)
    train = data.train.pixels.double() / 255
    torch.testing.assert_close(data.train.pixel_values.double(), train / train.std(correction=0), rtol=0, atol=1e-5)


def test_a_loader_makes_batches_of_the_items(tmp_path: Path) -> None:
    write(tmp_path, "t10k", *images_of(50))
    test = load(tmp_path).test
    batches = list(DataLoader(test, 4, collate_fn=default_data_collator))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), test.pixel_values)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), test.labels)


def test_sizes(tmp_path: Path) -> None:
    write(tmp_path, "t10k", *images_of(50))
    raw = load(tmp_path).test.images
    nearest = load(tmp_path, image_size=8, resize="nearest").test.images
    assert torch.equal(nearest, raw.repeat_interleave(2, 2).repeat_interleave(2, 3))
    framed = load(tmp_path, image_size=7, resize="pad").test.images
    assert torch.equal(framed[:, :, 1:5, 1:5], raw) and framed.sum() == pytest.approx(float(raw.sum()), rel=1e-5)
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)  # bilinear is exact on a ramp, between the outer pixels' centres
    torch.testing.assert_close(resized(ramp, 8, "bilinear")[0, 0, 0, 1:7], (torch.arange(1, 7) + 0.5) / 2 - 0.5)
    assert load_image_data(ImageArguments(data_dir=str(tmp_path)), 0, image_size=6).shape == (1, 6, 6)
    assert load_image_data(ImageArguments(data_dir=str(tmp_path), image_size=5), 0, image_size=6).shape == (1, 5, 5)
    with pytest.raises(ValueError, match="`resize` 'pad' cannot shrink images of 4 x 4 to 3"):
        load(tmp_path, image_size=3, resize="pad")


# --- Rotation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("quarter", range(-1, 5))
def test_quarter_turns_are_exact(quarter: int) -> None:
    images = torch.rand(2, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(rotate(images, 90 * quarter), torch.rot90(images, quarter, (2, 3)))


@pytest.mark.parametrize("shape", [(6, 6), (5, 8)])
def test_rotation_matches_bilinear_interpolation_pixel_by_pixel(shape: tuple[int, int]) -> None:
    image = torch.rand(shape, dtype=torch.float64)
    turned = rotate(image[None, None], 25)[0, 0]
    torch.testing.assert_close(turned, turned_by_hand(image, math.radians(25)))


def turned_by_hand(image: Tensor, angle: float) -> Tensor:
    """Each pixel's value is read where a counter-clockwise turn about the centre took it from; y points down."""
    height, width = image.shape
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x, y = column - (width - 1) / 2, row - (height - 1) / 2
            from_x = x * math.cos(angle) - y * math.sin(angle) + (width - 1) / 2
            from_y = x * math.sin(angle) + y * math.cos(angle) + (height - 1) / 2
            for j in (math.floor(from_x), math.floor(from_x) + 1):
                for i in (math.floor(from_y), math.floor(from_y) + 1):
                    if 0 <= i < height and 0 <= j < width:
                        out[row, column] += (1 - abs(from_x - j)) * (1 - abs(from_y - i)) * image[i, j]
    return out


# --- The hub ---------------------------------------------------------------------------------------------------------
def hub(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...] = (6,), splits: tuple[str, ...] = ("train", "test")):
    """A hub that has one data set of coloured cats and dogs."""
    features = datasets.Features({
        "img": datasets.Image(),
        "fine": datasets.ClassLabel(names=["cat", "dog"]),
        "n": datasets.Value("int64"),
    })

    def split(count: int) -> datasets.Dataset:
        pictures = [
            Image.fromarray(np.full((sizes[i % len(sizes)],) * 2 + (3,), (i, 0, 2 * i), np.uint8)) for i in range(count)
        ]
        columns = {"img": pictures, "fine": [i % 2 for i in range(count)], "n": list(range(count))}
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, config: datasets.DatasetDict({key: split(20) for key in splits})
    )


def test_coloured_images_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch)
    data = load_image_data(ImageArguments(dataset_name="pets"), seed=0)
    assert (data.shape, data.class_names, data.name) == ((3, 6, 6), ("cat", "dog"), "pets")
    assert data.test.pixels[7, :, 2, 3].tolist() == [7, 0, 14] and data.test.labels.tolist() == [0, 1] * 10
    assert torch.isfinite(data.train.pixel_values).all()  # the green channel is constant
    assert data.train.pixel_values[:, 0].std(correction=0) == pytest.approx(1, rel=1e-4)


def test_images_of_several_sizes_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, sizes=(6, 9))
    with pytest.raises(ValueError, match="several sizes: `image_size` must be given"):
        load_image_data(ImageArguments(dataset_name="pets"), seed=0)
    assert load_image_data(ImageArguments(dataset_name="pets", image_size=8), seed=0).shape == (3, 8, 8)


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, splits=("train", "extra"))
    with pytest.raises(ValueError, match=r"needs a split train and one test or validation, got \['train', 'extra'\]"):
        load_image_data(ImageArguments(dataset_name="pets"), seed=0)

    def offline(name: str, config: str | None) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(OSError, match=r"no network\nWithout network, give --data_dir a folder of MNIST's IDX files"):
        load_image_data(ImageArguments(dataset_name="pets"), seed=0)


# --- Damaged files ---------------------------------------------------------------------------------------------------
def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`data_dir` .*nowhere is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"lacks t10k-images-idx3-ubyte \(or t10k-images-idx3-ubyte.gz\)"):
        load(tmp_path)
    write(tmp_path, "t10k", *images_of(10))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images_of(10)[0]))
    with pytest.raises(FileNotFoundError, match="lacks train-labels-idx1-ubyte"):
        load(tmp_path)


def damaged() -> dict[str, tuple[bytes, str]]:
    good = idx(images_of(10)[0])
    return {
        "not IDX": (b"PK\x03\x04" + good[4:], "is not an IDX file of unsigned bytes: it starts with '50 4b 03 04'"),
        "floats": (b"\x00\x00\x0d\x03" + good[4:], "is not an IDX file of unsigned bytes"),
        "empty": (b"", "is not an IDX file"),
        "labels": (idx(images_of(10)[1]), "must have 3 axes, and sizes for them, got 01 axes"),
        "short header": (good[:9], "must have 3 axes"),
        "short": (good[:-1], r"is damaged: its header promises 10 x 4 x 4 = 160 values, it holds 159"),
        "long": (good + b"\x00", "it holds 161"),
        "short gzip": (gzip.compress(good)[:-12], "is damaged: gzip says"),
        "other count": (idx(images_of(9)[0]), "has 9 images, .* has 10 labels"),
        "none": (idx(np.zeros((0, 4, 4))), "has 0 images"),
    }


@pytest.mark.parametrize("kind", list(damaged()))
def test_damaged_files_are_refused(tmp_path: Path, kind: str) -> None:
    content, message = damaged()[kind]
    write(tmp_path, "t10k", *images_of(10), compressed=False)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    images, _ = images_of(3)
    (tmp_path / "a.gz").write_bytes(idx(images))
    (tmp_path / "b").write_bytes(gzip.compress(idx(images)))
    for name in ("a.gz", "b"):
        assert np.array_equal(read_idx(tmp_path / name, 3), images)


def test_training_and_test_images_of_different_sizes(tmp_path: Path) -> None:
    write(tmp_path, "t10k", *images_of(10))
    write(tmp_path, "train", *images_of(10, size=5))
    with pytest.raises(ValueError, match=r"training images of \(1, 5, 5\), test images of \(1, 4, 4\)"):
        load(tmp_path)


def test_a_share_that_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, "t10k", *images_of(10))
    with pytest.raises(ValueError, match="`validation_share` 0.01 of 8 training images leaves an empty set"):
        load(tmp_path, validation_share=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": "a", "dataset_name": "b"}, "`data_dir` 'a' and `dataset_name` 'b' each name the images"),
        ({"resize": "bicubic"}, "`resize` must be one of bilinear, nearest, pad, got 'bicubic'"),
        ({"validation_share": 0.0}, "`validation_share` must lie between 0 and 1, got 0.0"),
        ({"image_size": 0}, "`image_size` must be at least 1, got 0"),
        ({"max_train_samples": 1}, "`max_train_samples` must be at least 2, got 1"),
        ({"max_eval_samples": 1}, "`max_eval_samples` must be at least 2, got 1"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageArguments(**changes)
