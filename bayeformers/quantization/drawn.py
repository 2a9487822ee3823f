"""One INT8 weight under one draw, made when a layer first asks for it and kept as INT8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .codes import Codes


class Drawn:
    """W = mean + D, with D the draw's step away from the mean.

    Kept as codes of D beside those of the mean (``is_merged`` False): rounding then costs at most half of
    max |D| / 127, whatever the mean. Or as codes of W itself, so that one INT8 product does the layer: rounding costs
    half of max |W| / 127, which is small against D only where the draw is wide.

    Args:
        mean: the posterior mean.
        deviation: makes D.
        axis: of the channels.
        is_merged: keep W itself.
        deviation_rows: makes rows of D, where they can be made without the rest.
    """

    def __init__(
        self,
        mean: Codes,
        deviation: Callable[[], Tensor],
        axis: int = 0,
        *,
        is_merged: bool = False,
        deviation_rows: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._mean, self._deviation, self._axis = mean, deviation, axis
        self._rows, self.is_merged = deviation_rows, is_merged
        self._made: Codes | None = None

    def codes(self) -> Codes:
        """Of D, or of W where it is merged."""
        if self._made is None:
            value = self._deviation().to(self._mean.codes.device)
            self._made = Codes.of(self._mean.dequantize() + value if self.is_merged else value, self._axis)
        return self._made

    def value(self) -> Tensor:
        """W in float32."""
        coded = self.codes()
        return coded.dequantize() if self.is_merged else self._mean.dequantize().add_(coded.dequantize())

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, bit for bit, at the cost of those rows where that can be: (*,) -> (*, width)."""
        if self._rows is None or self._made is not None or self.is_merged:
            rows = self.codes().rows(ids)
            return rows if self.is_merged else self._mean.rows(ids).add_(rows)
        wanted, places = torch.unique(ids, return_inverse=True)
        rows = Codes.of(self._rows(wanted).to(ids.device)).dequantize()
        return self._mean.rows(wanted).add_(rows)[places]

    @property
    def nbytes(self) -> int:
        """Bytes of the draw, once it has been made."""
        return 0 if self._made is None else self._made.nbytes
