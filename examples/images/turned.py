"""``--task uncert``: test images rotated by growing angles; does the uncertainty rise with the error?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from bayeformers.reports import ClassPredictions, format_table
from examples.glue.training import OneLineProgress
from examples.images.classifier_evaluation import predicted
from examples.images.data import ImageData, Images
from examples.images.pictures import rotation_figure
from examples.images.rotation import RotationCurve, rotate, rotation_curve
from examples.images.setting import DETERMINISTIC, Outcome, Setting

CAPTION = (
    "epistemic: mutual information of label and weights, the draws disagree.  aleatoric: mean entropy of a draw.  "
    "A deterministic network has one entropy only."
)


@dataclass(frozen=True)
class Turned(Dataset[dict[str, Any]]):
    """Images rotated by an angle, as the model sees them. `pixel_values` (N, C, H, W), `labels` (N,)."""

    pixel_values: Tensor
    labels: Tensor

    @classmethod
    def by(cls, split: Images, degrees: float) -> Turned:
        """Rotated before they are normalised, so that what comes in from outside is black."""
        return cls(split.preprocessing.normalize(rotate(split.images, degrees)), split.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": int(self.labels[index])}


def angles(step: float) -> list[float]:
    """From 0 to at most 180 degrees.

    >>> angles(60)
    [0, 60, 120, 180]
    """
    return [step * index for index in range(int(180 / step + 1e-9) + 1)]


def check_position(position: int, data: ImageData) -> None:
    """Before anything is trained: ValueError for a position beyond the test images."""
    if position >= len(data.test):
        raise ValueError(f"`strip_image` must be below {len(data.test)}, the number of test images, got {position}.")


def turn(setting: Setting) -> Outcome:
    """Error and uncertainties of every method at every angle, and their rank correlations."""
    data = setting.data
    trainers = {DETERMINISTIC: setting.trained, **setting.posteriors()}
    degrees = angles(setting.model_args.angle_step)
    found: dict[str, list[ClassPredictions]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.pop_callback(OneLineProgress)  # one bar for all predictions, not one for each
    for angle in tqdm(degrees, desc="angles", disable=setting.args.disable_tqdm):
        split = Turned.by(data.test, angle)
        for name, trainer in trainers.items():
            found[name].append(predicted(trainer, split))
    setting.clock.lap("prediction")
    labels = data.test.labels.numpy()
    curves = {name: rotation_curve(predictions, labels) for name, predictions in found.items()}
    return _outcome(setting, degrees, curves, found)


def _outcome(
    setting: Setting,
    degrees: list[float],
    curves: dict[str, RotationCurve],
    found: dict[str, list[ClassPredictions]],
) -> Outcome:
    rows = {
        f"{name}: {score}": correlations
        for name, curve in curves.items()
        for score, correlations in curve.agreement.items()
    }
    by_angle = {name: _by_angle(curve, degrees) for name, curve in curves.items()}
    text = "\n\n".join(
        [format_table(table, corner=f"{name}: degrees") for name, table in by_angle.items()]
        + [format_table(rows, corner="rank correlation with the error, between")]
    )
    shown = next(name for name in found if name != DETERMINISTIC)
    strip = np.stack([one.probs[setting.model_args.strip_image] for one in found[shown]])
    results = {
        "degrees": degrees,
        "methods": {name: asdict(curve) for name, curve in curves.items()},
        "strip": {"method": shown, "image": setting.model_args.strip_image, "probabilities": strip},
    }
    return Outcome(results, text, picture(setting, results["strip"], degrees, curves))


def _by_angle(curve: RotationCurve, degrees: list[float]) -> dict[str, dict[str, float | None]]:
    """A table's rows; a point estimate has no epistemic part."""
    columns = {"error": curve.error, "entropy": curve.entropy}
    if curve.epistemic.any():
        columns |= {"epistemic": curve.epistemic, "aleatoric": curve.aleatoric}
    return {f"{angle:g}": {name: float(of[row]) for name, of in columns.items()} for row, angle in enumerate(degrees)}


def picture(
    setting: Setting, strip: Mapping[str, Any], degrees: list[float], curves: dict[str, RotationCurve]
) -> Figure:
    """The curves of every method, and `strip`: one image at every angle with the probabilities of a posterior."""
    chosen = setting.data.test.select([strip["image"]])
    turned = torch.cat([rotate(chosen.images, angle) for angle in degrees]).movedim(1, -1).squeeze(-1).clamp(0, 1)
    label = setting.data.class_names[int(chosen.labels)]
    return rotation_figure(
        degrees,
        curves,
        turned.numpy(),
        strip["probabilities"],
        setting.data.class_names,
        title=f"Does it know that it errs? {setting.description}, rotated",
        strip_title=f"{strip['method']}: one test image (label {label}) at each angle",
        caption=CAPTION,
    )
