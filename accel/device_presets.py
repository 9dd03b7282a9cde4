"""Rates of devices that are not here, for simulations: what a well-tuned engine reaches in bfloat16.

The H200's rates are fitted to one card and one model, qwen2.5-7b: it reads 4.19 TB/s and does 787 TFLOP/s at best, and
vLLM 0.25 takes 4.80 ms for a token of one stream, 1.468 s for 16 prompts of 4,096 tokens and 5.48 s for 256 requests of
512 tokens in and 256 out; the rates below give 4.79 ms, 1.47 s and 5.24 s. Other cards are the H200 scaled by their
data sheets' dense bfloat16 FLOP/s and memory bandwidth, and were not measured. KV is handed over by NVLink at four
fifths of one direction, host memory is reached over PCIe at as much, and an NVMe drive reads 6 GB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from .device_rates import DeviceRates, LinkRates, OperationRates
from .execution_graph import NodeKind

_PRODUCTS = (NodeKind.QKV_PROJ, NodeKind.OUT_PROJ, NodeKind.FFN, NodeKind.LM_HEAD)


@dataclass(frozen=True, slots=True)
class DevicePreset:
    """A device with so many bytes of memory."""

    rates: DeviceRates
    memory_bytes: int


def _preset(
    memory_bytes: int, flops_per_s: float, bytes_per_s: float, nvlink_bytes_per_s: float, pcie_bytes_per_s: float
) -> DevicePreset:
    """From a data sheet: dense bfloat16, memory, one direction of NVLink and of PCIe."""
    launch_s = 4e-6

    def rates(flops_share: float, bytes_share: float) -> OperationRates:
        return OperationRates((1,), (flops_per_s * flops_share,), bytes_per_s * bytes_share, launch_s)

    operations = {kind: rates(0.1, 0.7) for kind in NodeKind if not kind.is_transfer}
    operations |= {kind: rates(0.65, 0.83) for kind in _PRODUCTS}
    operations[NodeKind.PREFILL_ATTN] = rates(0.40, 0.7)
    operations[NodeKind.DECODE_ATTN] = rates(0.40, 0.7)
    links = {
        "ddr": LinkRates(20e-6, 0.8 * pcie_bytes_per_s),
        "nvme": LinkRates(100e-6, 6e9),
        "handover": LinkRates(20e-6, 0.8 * nvlink_bytes_per_s),
        "interconnect": LinkRates(10e-6, 0.8 * nvlink_bytes_per_s),
    }
    return DevicePreset(DeviceRates(operations, links, step_s=550e-6), memory_bytes)


DEVICES = {
    "h200": _preset(141_000_000_000, 989e12, 4.8e12, 450e9, 63e9),
    "h100": _preset(80_000_000_000, 989e12, 3.35e12, 450e9, 63e9),
    "a100": _preset(80_000_000_000, 312e12, 2.039e12, 300e9, 31e9),
}
