"""The time of a step in closed form: what the hybrid execution graph estimates, without building it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .execution_graph import NodeKind
from .model_work import ModelWork

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .device_rates import DeviceRates
    from .model_work import ModelShape

# A row that gets logits passes these once more than one that stops after the last layer's attention.
_LOGITS = {NodeKind.LAYERNORM: 2, NodeKind.OUT_PROJ: 1, NodeKind.FFN: 1, NodeKind.LM_HEAD: 1, NodeKind.SAMPLE: 1}


class _RowSeconds:
    """Seconds of what follows the number of rows, each kind of node so many times. What was asked for is remembered."""

    def __init__(self, work: ModelWork, rates: DeviceRates, times: dict[NodeKind, int]) -> None:
        self._known = {0: 0.0}
        self._parts = [
            (
                count,
                work.rows[kind].flops,
                work.rows[kind].fixed_bytes,
                work.rows[kind].row_bytes,
                rates.operations[kind],
            )
            for kind, count in times.items()
        ]

    def at(self, rows: int) -> float:
        seconds = self._known.get(rows)
        if seconds is None:
            seconds = self._known[rows] = sum(
                count * rates.seconds(rows, flops * rows, fixed_bytes + row_bytes * rows)
                for count, flops, fixed_bytes, row_bytes, rates in self._parts
            )
        return seconds


class StepCost:
    """Seconds of steps, of prompts and of moving KV, for one model on one device.

    `decode_contexts` [D] are the tokens that each decoding row attends to, its new one included; a chunk is tokens
    [start, start + length) of a prompt, `chunk_starts` and `chunk_lengths` are [C]. A prompt by itself is computed
    `chunk_tokens` tokens a step.
    """

    def __init__(self, model: ModelShape, rates: DeviceRates, element_bytes: int = 2, chunk_tokens: int = 512) -> None:
        layers = model.num_layers
        self.rates = rates
        self._work = ModelWork(model, None, element_bytes)
        self._num_layers = layers
        self._chunk_tokens = chunk_tokens
        self.kv_bytes_per_token = self._work.kv_bytes_per_token
        self._token_seconds = _RowSeconds(
            self._work,
            rates,
            {
                NodeKind.EMBEDDING: 1,
                NodeKind.LAYERNORM: 2 * layers - 1,
                NodeKind.QKV_PROJ: layers,
                NodeKind.OUT_PROJ: layers - 1,
                NodeKind.FFN: layers - 1,
            },
        )
        self._logit_seconds = _RowSeconds(self._work, rates, _LOGITS)

    def step_seconds(
        self,
        decode_contexts: NDArray[np.int64] | Sequence[int],
        chunk_starts: NDArray[np.int64] | Sequence[int],
        chunk_lengths: NDArray[np.int64] | Sequence[int],
        logit_rows: int | None = None,
    ) -> float:
        """Seconds of one step; 0 if it computes nothing.

        `logit_rows` is how many of its tokens get logits; by default every decoding row and one for each chunk.
        """
        decodes, chunks = len(decode_contexts), len(chunk_starts)
        lengths = np.asarray(chunk_lengths, np.int64)
        rows = decodes + int(lengths.sum())
        if not rows:
            return 0.0
        seconds = self.rates.step_s + self._token_seconds.at(rows)
        seconds += self._logit_seconds.at(decodes + chunks if logit_rows is None else logit_rows)
        attention = 0.0
        if decodes:
            flops, num_bytes = self._work.decode_attention(decodes, float(np.sum(decode_contexts)))
            attention += self.rates.operations[NodeKind.DECODE_ATTN].seconds(decodes, flops, num_bytes)
        if chunks:
            rates = self.rates.operations[NodeKind.PREFILL_ATTN]
            for start, length in zip(np.asarray(chunk_starts).tolist(), lengths.tolist(), strict=True):
                attention += rates.seconds(length, *self._work.prefill_attention(start, length))
        return seconds + self._num_layers * attention

    def decode_seconds(self, rows: int, contexts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of steps that only decode as many rows; those of the n-th attend to `contexts[n]` tokens together. Equal, bit
        by bit, to what `step_seconds` says of each."""
        rates = self.rates.operations[NodeKind.DECODE_ATTN]
        seconds = self.rates.step_s + self._token_seconds.at(rows)
        seconds += self._logit_seconds.at(rows)
        flops, num_bytes = self._work.decode_attention(rows, contexts.astype(np.float64))
        return seconds + self._num_layers * rates.seconds_of_each(rows, flops, num_bytes)

    def prompt_seconds(self, start: int, end: int) -> float:
        """Seconds to compute tokens [start, end) of a prompt by itself."""
        chunk = self._chunk_tokens
        return sum(
            self.step_seconds((), (at,), (min(chunk, end - at),), logit_rows=int(at + chunk >= end))
            for at in range(start, end, chunk)
        )

    def transfer_seconds(self, num_bytes: int, path: str) -> float:
        """Seconds to move bytes: "ddr" and "nvme" are between the device and a lower tier, "handover" to a worker.

        Raises:
            KeyError: nothing is known of such a path.
        """
        return self.rates.links[path].seconds(num_bytes)
