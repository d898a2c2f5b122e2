"""The table that a run prints, and build/bench.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line. `bar`: what the ratio (or, without a peer, the number) must not exceed, or must reach."""

    row: str
    ours_s: float
    peer_s: float | None = None
    ratio: float | None = None
    bar: float | None = None
    bytes: int = 0
    rss_mib: float | None = None
    unit: str = "s"
    at_least: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether it is within its bar; None where there is none."""
        value = self.ours_s if self.ratio is None else self.ratio
        if self.bar is None:
            return None
        return value >= self.bar if self.at_least else value <= self.bar


def compared(
    row: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    bar: float | None = None,
    allowance_s: float = 0,
    moved: int = 0,
    rss_mib: float | None = None,
) -> Row:
    """A row of medians; `allowance_s` is taken off ours before the ratio is formed."""
    mine, theirs = median(ours), median(peer)
    return Row(
        row=row,
        ours_s=round(mine, 3),
        peer_s=round(theirs, 3),
        ratio=round(max(mine - allowance_s, 0) / theirs, 2),
        bar=bar,
        bytes=moved,
        rss_mib=None if rss_mib is None else round(rss_mib, 1),
    )


def publish(rows: Sequence[Row], path: Path, title: str) -> None:
    """Print the rows and write them as JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    table = Table(title=title)
    table.add_column("work")
    for column in ("ours", "peer", "ratio", "bar", "MiB", "peak MiB", ""):
        table.add_column(column, justify="right")
    for row in rows:
        verdict = {True: "[green]✓[/]", False: "[red]✗[/]", None: ""}[row.holds]
        table.add_row(
            row.row,
            f"{row.ours_s:.2f} {row.unit}",
            "" if row.peer_s is None else f"{row.peer_s:.2f} s",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.bar is None else f"{row.bar:g}",
            f"{row.bytes >> 20}" if row.bytes else "",
            "" if row.rss_mib is None else f"{row.rss_mib:.0f}",
            verdict,
        )
    Console(width=120).print(table)
