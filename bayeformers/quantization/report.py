"""What became of each layer, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One layer with a weight.

    Attributes:
        name: in the model.
        kind: its class.
        held: "int8" or "float": how the weight is kept.
        arithmetic: "int8" or "float": how it multiplies.
        float_bytes, bytes: of its weight, with the scales of its posterior, before and after.
        error: |y - y'| / |y| of its outputs at the mean on the calibration inputs, from rounding the weight; None: not
            called.
        noise: |y' - y| / |y - y_mean| under one draw, from INT8 arithmetic; of a layer without noise |y' - y| / |y|;
            None: not measured.
        reason: for what is not INT8.
    """

    name: str
    kind: str
    held: str
    arithmetic: str
    float_bytes: int
    bytes: int
    error: float | None = None
    noise: float | None = None
    reason: str = ""


class Report(tuple[LayerReport, ...]):
    """One row per layer; ``print`` shows a table."""

    def __new__(cls, rows: Sequence[LayerReport]) -> Report:
        """Make the tuple of rows."""
        return super().__new__(cls, rows)

    @property
    def float_bytes(self) -> int:
        """Of all weights and scales before."""
        return sum(row.float_bytes for row in self)

    @property
    def bytes(self) -> int:
        """Of all weights and scales after."""
        return sum(row.bytes for row in self)

    def __str__(self) -> str:
        names, kinds = ([getattr(row, key) for row in self] or [""] for key in ("name", "kind"))
        name, kind = (max(len(value) for value in (*column, "layer")) for column in (names, kinds))
        lines = [f"{'layer':<{name}}  {'class':<{kind}}  held   product      bytes   error   noise"]
        for row in self:
            numbers = f"{row.bytes:>10,}  {_shown(row.error)}  {_shown(row.noise)}  {row.reason}"
            lines.append(
                f"{row.name:<{name}}  {row.kind:<{kind}}  {row.held:<5}  {row.arithmetic:<5}  {numbers}".rstrip()
            )
        share = self.bytes / max(self.float_bytes, 1)
        lines.append(f"{self.bytes:,} of {self.float_bytes:,} bytes in weights and scales ({share:.1%})")
        return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.4f}"
