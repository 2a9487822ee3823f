"""What the image classifiers of this folder share: their configuration's checks, initialization, forward and loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from ..checks import is_real, is_whole

__all__ = ["ImageClassifier", "ImageClassifierConfig", "check_positive", "check_rate", "check_sizes"]

_PROBLEM = "single_label_classification"


def check_positive(name: str, value: object) -> int:
    """An integer >= 1; otherwise TypeError or ValueError naming the argument."""
    if not is_whole(value):
        raise TypeError(f"`{name}` must be an integer >= 1, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be >= 1, got {value}.")
    return int(value)


def check_sizes(name: str, values: object, count: int | None = None) -> list[int]:
    """Return a sequence of integers >= 1 as a list, which JSON has.

    Args:
        name: the argument's name, for the message.
        values: what the caller gave for it.
        count: how many integers there must be; None: any number of them.

    Raises:
        TypeError: it is no sequence, or holds something other than integers.
        ValueError: an integer is below 1, or their number is not ``count``.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"`{name}` must be a list of integers >= 1, got {values!r}.")
    if count is not None and len(values) != count:
        raise ValueError(f"`{name}` must have {count} numbers, got {list(values)}.")
    return [check_positive(f"{name}[{i}]", value) for i, value in enumerate(values)]


def check_rate(name: str, value: object) -> float:
    """A dropout rate in [0, 1)."""
    if not is_real(value):
        raise TypeError(f"`{name}` must be a number in [0, 1), got {value!r}.")
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must lie in [0, 1), got {value}.")
    return float(value)


def _num_labels(value: object) -> int:
    if check_positive("num_labels", value) == 1:
        raise ValueError("`num_labels` must be >= 2, got 1: the model tells classes apart.")
    return cast(int, value)


class ImageClassifierConfig(PreTrainedConfig):
    """Square images (``num_channels``, ``image_size``, ``image_size``) of one label each, of ``num_labels`` >= 2.

    Subclasses set ``model_type`` and ``default_num_labels``; their attributes before this `__init__`, which calls
    ``check``.
    """

    default_num_labels: ClassVar[int] = 10

    def __init_subclass__(cls, **kwargs: Any) -> None:
        inherits = "__init__" not in vars(cls)
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]
        if inherits and "__init__" in vars(cls):
            del cls.__init__  # which transformers makes of dataclass fields, and there are none here

    def __init__(self, *, num_channels: int, image_size: int, **kwargs: Any) -> None:
        self.num_channels = num_channels
        self.image_size = image_size
        if kwargs.get("id2label") is None:  # what a saved configuration has
            kwargs["num_labels"] = _num_labels(kwargs.get("num_labels", self.default_num_labels))
        # said at once: heads that transformers' tables do not know have no likelihood otherwise
        kwargs["problem_type"] = kwargs.get("problem_type") or _PROBLEM
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the argument; the model calls it too, since attributes may be set."""
        check_positive("num_channels", self.num_channels)
        check_positive("image_size", self.image_size)
        _num_labels(self.num_labels)
        if self.problem_type != _PROBLEM:
            raise ValueError(f"`problem_type` must be {_PROBLEM!r}, got {self.problem_type!r}.")

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: the labels always, for transformers leaves out two, its own default."""
        return {**super().to_diff_dict(), "id2label": self.id2label, "label2id": self.label2id}


class ImageClassifier(PreTrainedModel):
    """logits = classifier(features(pixel_values)); the loss is their mean cross-entropy.

    Subclasses build both in `__init__` and call ``assemble``.
    """

    config: ImageClassifierConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: ImageClassifierConfig) -> None:
        if not isinstance(config, ImageClassifierConfig):
            raise TypeError(f"`config` must be a configuration of such a model, got {type(config).__name__}.")
        config.check()
        super().__init__(config)
        self.num_labels = _num_labels(config.num_labels)

    def assemble(self, features: nn.Module, classifier: nn.Module) -> None:
        """``features``: (B, C, H, W) -> (B, ...); ``classifier``: (B, F) -> (B, K). Initializes both."""
        self.features = features
        self.classifier = classifier
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights N(0, 2 / fan_in), biases 0: He et al. 2015 (arXiv 1502.01852), equation 10."""
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor, ...]:
        """Return ``logits`` (B, K), with labels also the scalar ``loss``.

        Images of another shape than the configuration's raise ValueError.

        Args:
            pixel_values: images (B, C, H, W).
            labels: classes (B,).
            return_dict: False for a tuple; None: as the configuration has it.
            kwargs: of the loss; ``num_items_in_batch`` of the Trainer.
        """
        self._check_images(pixel_values)
        logits = self.classifier(self.features(pixel_values).flatten(1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        if return_dict if return_dict is not None else self.config.return_dict:
            return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
        return (logits,) if loss is None else (loss, logits)

    def _check_images(self, pixel_values: Tensor) -> None:
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must have shape (B, {', '.join(map(str, expected))}), as `config.num_channels` and "
                f"`config.image_size` say, got {tuple(pixel_values.shape)}."
            )
