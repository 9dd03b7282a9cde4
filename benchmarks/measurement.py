"""What one engine reached on one workload, and the table that sets engines side by side."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Measurement:
    """`ttft_ms` is the median over requests, `tpot_ms` the mean; None where the engine does not tell."""

    engine: str
    workload: str
    seconds: float
    output_tokens: int
    requests: int
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns wide enough for their cells; the first is left-aligned, the others right-aligned."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "  ".join(
            [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
