"""How fast a device does each kind of work: a roofline whose rates depend on how many rows are computed at once.

Roofline: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", CACM 52 (2009).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .execution_graph import NodeKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from .execution_graph import Node


@dataclass(frozen=True, slots=True)
class OperationRates:
    """Of one kind of node: FLOP/s at so many rows (ascending), bytes/s, seconds whatever the size, and seconds a row.

    Between two numbers of rows the time is linear; fewer rows take as long as the first number, more go at the last
    one's rate.
    """

    rows: tuple[int, ...]
    flops_per_s: tuple[float, ...]
    bytes_per_s: float
    launch_s: float = 0.0
    row_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.rows or len(self.rows) != len(self.flops_per_s):
            raise ValueError(f"{len(self.rows)} numbers of rows, but {len(self.flops_per_s)} rates")
        if list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ValueError(f"rows must be positive and ascend: {self.rows}")
        if min(self.flops_per_s) <= 0 or self.bytes_per_s <= 0 or min(self.launch_s, self.row_s) < 0:
            raise ValueError("rates must be positive, launch_s and row_s at least 0")

    def row_seconds(self, rows: int) -> float:
        """Seconds for `rows` rows of 1 FLOP each."""
        knots, rates = self.rows, self.flops_per_s
        at = bisect_left(knots, rows)
        if at == 0:
            return knots[0] / rates[0]
        if at == len(knots):
            return rows / rates[-1]
        low, high = knots[at - 1] / rates[at - 1], knots[at] / rates[at]
        return low + (high - low) * (rows - knots[at - 1]) / (knots[at] - knots[at - 1])

    def seconds(self, rows: int, flops: float, num_bytes: float) -> float:
        """Seconds of a node that computes `flops` in `rows` rows and reads and writes `num_bytes`."""
        work = flops / rows * self.row_seconds(rows) if flops else 0.0
        return max(work, num_bytes / self.bytes_per_s) + self.launch_s + self.row_s * rows

    def seconds_of_each(
        self, rows: int, flops: NDArray[np.float64], num_bytes: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The same of many nodes with as many rows; equal bit by bit."""
        work = flops / rows * self.row_seconds(rows)
        return np.maximum(work, num_bytes / self.bytes_per_s) + self.launch_s + self.row_s * rows


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Of one path that bytes take."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """A device: rates of what it computes, of the paths that bytes take from and to it ("ddr", "nvme", "handover",
    "interconnect"), and the seconds of a step that no node accounts for."""

    operations: Mapping[NodeKind, OperationRates]
    links: Mapping[str, LinkRates] = field(default_factory=dict)
    step_s: float = 0.0

    def node_seconds(self, node: Node) -> float:
        """Seconds of a node, alone on the device. A receive takes none of its own: it waits for what is sent.

        Raises:
            KeyError: nothing is known of its kind or link.
        """
        if node.kind is NodeKind.COMM_RECV:
            return 0.0
        if node.kind.is_transfer:
            return self.links[node.link].seconds(node.num_bytes)
        return self.operations[node.kind].seconds(node.rows, node.flops, node.num_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them."""
        return {
            "operations": {str(kind): asdict(rates) for kind, rates in self.operations.items()},
            "links": {name: asdict(link) for name, link in self.links.items()},
            "step_s": self.step_s,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DeviceRates:
        """Read what `to_dict` made.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is something else.
        """
        operations = {
            NodeKind(kind): OperationRates(
                tuple(map(int, rates["rows"])),
                tuple(map(float, rates["flops_per_s"])),
                float(rates["bytes_per_s"]),
                float(rates["launch_s"]),
                float(rates["row_s"]),
            )
            for kind, rates in data["operations"].items()
        }
        links = {
            name: LinkRates(float(link["latency_s"]), float(link["bytes_per_s"]))
            for name, link in data["links"].items()
        }
        return cls(operations, links, float(data["step_s"]))

    @classmethod
    def from_specification(
        cls,
        flops_per_s: float,
        bytes_per_s: float,
        launch_s: float = 5e-6,
        compute_efficiency: float = 0.6,
        memory_efficiency: float = 0.8,
        host_bytes_per_s: float = 25e9,
        nvme_bytes_per_s: float = 5e9,
        peer_bytes_per_s: float = 50e9,
    ) -> DeviceRates:
        """What a data sheet promises, times the share of it that real kernels reach: for devices that are not here.

        An NVIDIA H200, for example: 989e12 FLOP/s in bfloat16, 4.8e12 bytes/s.
        """
        rates = OperationRates((1,), (flops_per_s * compute_efficiency,), bytes_per_s * memory_efficiency, launch_s)
        links = {
            "ddr": LinkRates(20e-6, host_bytes_per_s),
            "nvme": LinkRates(200e-6, nvme_bytes_per_s),
            "handover": LinkRates(20e-6, peer_bytes_per_s),
            "interconnect": LinkRates(10e-6, peer_bytes_per_s),
        }
        return cls({kind: rates for kind in NodeKind if not kind.is_transfer}, links, step_s=100e-6)
