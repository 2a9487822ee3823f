"""Images are split as the model was split, whatever the seed, or refused."""

from pathlib import Path

import numpy as np
import pytest

from bayeformers.experiments import FRESH, History, TrainingRows, history_of
from bayeformers.experiments.image_classification import ImageArguments, ImageData, load_image_data
from bayeformers.tasks.images import load_images

UNKNOWN = History(unknown="`model_name_or_path` x")


def reloaded(rows: TrainingRows | None, folder: Path) -> History:
    """As a later run finds it beside the model."""
    assert rows is not None
    rows.save(folder)
    return history_of("model_name_or_path", [folder], must_know=True)


def pixels(data: ImageData) -> list[np.ndarray]:
    return [part.pixels.numpy() for part in (data.train, data.validation, data.test)]


def test_images_are_held_out_as_they_were(tmp_path: Path) -> None:
    """The digits' test images too, which the seed deals; and the pixels are normalised by the same training images."""
    first = load_image_data(ImageArguments(validation_share=0.5), 0)
    history = reloaded(first.rows, tmp_path)
    again = load_image_data(ImageArguments(validation_share=0.2), 1, history=history)
    for one, other in zip(pixels(first), pixels(again), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(first.train.preprocessing.mean, again.train.preprocessing.mean)
    with pytest.raises(ValueError, match=r"has no record .* --split_seed, .* --held_out_of test"):
        load_image_data(ImageArguments(), 1, history=UNKNOWN)


def test_images_can_be_held_out_of_the_test_images(tmp_path: Path) -> None:
    """Of a model that was trained on all training images elsewhere."""
    bunch = load_images(seed=0)
    data = load_image_data(ImageArguments(held_out_of="test", validation_share=0.25), 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (1438, 90, 269)
    both = np.concatenate([data.validation.pixels.numpy(), data.test.pixels.numpy()])
    assert sorted(map(bytes, both)) == sorted(map(bytes, bunch.test[0].numpy()))
    assert load_image_data(ImageArguments(), 0, history=FRESH).rows is not None
