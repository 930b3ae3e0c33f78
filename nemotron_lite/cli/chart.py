"""A chart of curves in characters, for a terminal and for a log.

    chart = Chart(width=60, height=12, x=(0, 75), y=(2.5, 8.5))
    lines = chart.draw([Curve(seconds, losses, style="bold", mark="*"), reference])

On a terminal each character is a Braille pattern of 2 x 4 dots, so that 60 x 12 characters have
120 x 48 dots. In a log a character is one mark, in ASCII. Where two curves meet, the first is
shown. Several values in one column of dots are replaced by their mean, which also smooths a noisy
loss.

Left out: lines between points that are columns apart; a training has more points than columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.text import Text

# The dot of column 0 or 1 and row 0 to 3 in the Unicode block of Braille patterns.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BRAILLE = 0x2800


@dataclass(frozen=True)
class Curve:
    """Points, and how they look: a style of rich on a terminal, a character in ASCII."""

    x: Sequence[float | int]
    y: Sequence[float | int]
    style: str = ""
    mark: str = "*"


@dataclass(frozen=True)
class Chart:
    """The frame of a chart: its size in characters, and the range of both axes.

    Raises:
        ValueError: an empty range or size.
    """

    x: tuple[float | int, float | int]
    y: tuple[float | int, float | int]
    width: int = 60
    height: int = 12
    x_name: str = field(default="seconds")

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 2 or self.x[0] >= self.x[1] or self.y[0] >= self.y[1]:
            raise ValueError(
                f"x={self.x}, y={self.y}, {self.width} x {self.height} characters: expected ranges "
                "from a smaller to a larger number, and at least 2 x 2 characters."
            )

    def draw(self, curves: Sequence[Curve], *, ascii_only: bool = False) -> list[Text]:
        """The lines of the chart, with its axes."""
        across, down = (1, 1) if ascii_only else (2, 4)
        shown: list[list[tuple[int, Curve] | None]] = [
            [None] * self.width for _ in range(self.height)
        ]
        for curve in curves:
            for column, row in self._dots(curve, self.width * across, self.height * down):
                dot = 0 if ascii_only else _DOTS[column % across][row % down]
                cell = shown[row // down][column // across]
                bits, owner = cell or (0, curve)
                shown[row // down][column // across] = bits | dot, owner
        labels = {0: self.y[1], (self.height - 1) // 2: sum(self.y) / 2, self.height - 1: self.y[0]}
        bar, corner, line = ("|", "+", "-") if ascii_only else ("│", "└", "─")
        lines = []
        for row, cells in enumerate(shown):
            label = f"{labels[row]:.1f}" if row in labels else ""
            text = Text(f"{label:>5} {bar}", style="dim" if not ascii_only else "")
            for cell in cells:
                if cell is None:
                    text.append(" ")
                else:
                    bits, owner = cell
                    text.append(
                        owner.mark if ascii_only else chr(_BRAILLE + bits),
                        style="" if ascii_only else f"not dim {owner.style}",
                    )
            text.rstrip()
            lines.append(text)
        left, right = f"{self.x[0]:.0f}", f"{self.x[1]:.0f} {self.x_name}"
        axis = f"{'':>5} {corner}{line * self.width}"
        scale = f"{'':>7}{left}{right:>{max(1, self.width - len(left))}}"
        return [*lines, *(Text(each, style="" if ascii_only else "dim") for each in (axis, scale))]

    def _dots(self, curve: Curve, columns: int, rows: int) -> list[tuple[int, int]]:
        """Column and row of each dot; values above or below are drawn at the edge."""
        (x0, x1), (y0, y1) = self.x, self.y
        found: dict[int, list[float]] = {}
        for x, y in zip(curve.x, curve.y, strict=True):
            if x0 <= x <= x1:
                column = min(columns - 1, int((x - x0) / (x1 - x0) * columns))
                found.setdefault(column, []).append(y)
        dots = []
        for column, values in found.items():
            share = (sum(values) / len(values) - y0) / (y1 - y0)
            dots.append((column, min(rows - 1, max(0, int((1 - share) * rows)))))
        return dots
