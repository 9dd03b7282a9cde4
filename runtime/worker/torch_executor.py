"""Runs plans with torch: one device thread, on which every device operation happens in launch order."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...backends.base import StepLayout
from ...config import KVGranularity
from ..scheduler.plan import StepResult
from .guided_rows import GuidedRows
from .kv_sender import KVSender
from .logprobs import prompt_logprobs, to_records
from .pooling import StepPooling
from .sampling import SamplingState
from .torch_block_io import TorchBlockIO

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from numpy.typing import NDArray
    from torch import Tensor

    from ...backends.base import Backend
    from ...models.decoder import DecoderModel
    from ...models.guide_compiler import GuideCompiler
    from ...records import Sequence, TokenLogprobs
    from ..scheduler.plan import StepPlan
    from .guided_rows import GuideOutcome
    from .sampling import SampledTokens

    AllocateKV = Callable[[Backend, tuple[int, ...], torch.dtype], Tensor]


class _DeviceStep:
    """A step on the device thread; its arrays are copied to the host only when they are asked for."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[Callable[[], StepResult]]) -> None:
        self._future = future

    def result(self) -> StepResult:
        return self._future.result()()


class TorchExecutor:
    """Owns the KV tensor [N, L, 2, K, P, D], the newest token of every slot [S], and the sampling state.

    `launch` hands the step to the device thread and returns; sampled tokens stay on the device as the next inputs.
    Rows outside a step that fails lose nothing by it: their copies and admissions come before the next one.
    """

    def __init__(
        self,
        model: DecoderModel,
        backend: Backend,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        handover_unit: KVGranularity = KVGranularity.LAYER,
        transfer_timeout_s: float = 0.0,
        tier_unit: KVGranularity = KVGranularity.BLOCK,
        allocate_kv: AllocateKV | None = None,
        guides: GuideCompiler | None = None,
    ) -> None:
        """Allocate everything, the pool with `allocate_kv` if that is given. KV is handed over in `handover_unit`s; a
        step's may take `transfer_timeout_s`, 0 is any time. Tiers copy it in `tier_unit`s. Without `guides` no
        sequence may have one."""
        self.before_step: Callable[[], None] = lambda: None
        self._model = model
        self._backend = backend
        self._block_size = block_size
        shape = model.kv_shape(num_blocks, block_size)
        allocate = backend.allocate_kv if allocate_kv is None else partial(allocate_kv, backend)
        self._kv = allocate(shape, model.kv_dtype)
        self._sampling = SamplingState(num_slots, model.vocab_size, backend.device)
        self._guided = None if guides is None else GuidedRows(guides, num_slots, backend.device.type == "cpu")
        self._newest = torch.zeros(num_slots, dtype=torch.int64, device=backend.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sagellm-device")
        self._rows: dict[int, tuple[Sequence, int]] = {}
        self._changed: dict[int, Callable[[], None] | None] = {}  # slots since the last launch: how to admit them
        self._copies: list[list[tuple[int, int]]] = []  # of the plans that no launch has taken
        self._to_admit: dict[int, Callable[[], None]] = {}  # on the device thread: slots that have not been sampled
        self._to_copy: deque[list[tuple[int, int]]] = deque()  # on the device thread
        self._handover = (handover_unit, transfer_timeout_s)
        self._sender: KVSender | None = None
        self.block_io = TorchBlockIO(self._kv, tier_unit, self._wait_for_launched)

    @property
    def pool(self) -> Tensor:
        """The KV pool [N, L, 2, K, P, D]."""
        return self._kv

    def connect(self, peers: list[Tensor]) -> None:
        if self._sender is None:
            self._sender = KVSender(self._kv, peers, *self._handover)
        else:
            self._sender.peers = peers

    def admit(self, slot: int, sequence: Sequence, choice: int) -> None:
        self._rows[slot] = (sequence, choice)
        self._change(slot, ())

    def readmit(self, slot: int, outputs: NDArray[np.int32]) -> None:
        self._change(slot, tuple(outputs.tolist()))

    def _change(self, slot: int, outputs: tuple[int, ...]) -> None:
        sequence, choice = self._rows[slot]
        self._changed[slot] = partial(self._admit, slot, sequence, choice, outputs)

    def release(self, slot: int) -> None:
        self._rows.pop(slot, None)
        self._changed[slot] = None

    def ready(self) -> bool:
        return True

    def launch(self, plan: StepPlan) -> _DeviceStep:
        if plan.copies:
            self._copies.append(plan.copies)
        step = _DeviceStep(self._thread.submit(self._run, plan, self._changed, self._copies))
        self._changed, self._copies = {}, []
        return step

    def _wait_for_launched(self) -> None:
        """Until the steps launched so far are done, as far as the host can tell, and no copy of theirs is left."""
        self._thread.submit(self._copy_blocks).result()

    def close(self) -> None:
        """Wait for what was launched and end the threads."""
        self._thread.shutdown()
        if self._guided is not None:
            self._guided.close()
        if self._sender is not None:
            self._sender.close()

    # -- on the device thread ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(
        self, plan: StepPlan, changed: dict[int, Callable[[], None] | None], copies: list[list[tuple[int, int]]]
    ) -> Callable[[], StepResult]:
        if not plan.exports:
            return self._compute(plan, changed, copies, None)
        assert self._sender is not None
        sending, computed = self._sender.begin(plan.exports), False
        try:
            read = self._compute(plan, changed, copies, sending.send_layer)
            computed = True
        finally:
            sending.end(computed)
        return lambda: replace(read(), failed_exports=sending.failed())

    def _compute(
        self,
        plan: StepPlan,
        changed: dict[int, Callable[[], None] | None],
        copies: list[list[tuple[int, int]]],
        on_layer: Callable[[int], None] | None,
    ) -> Callable[[], StepResult]:
        self._note(changed, copies)
        self.before_step()
        self._copy_blocks()
        self._admit_rows(plan)
        device = self._backend.device
        coming = None if self._guided is None else self._guided.mask(plan.sample_slots)
        layout = self._lay_out(plan)
        input_ids = self._input_ids(plan)
        logit_rows, sample_at = self._logit_rows(plan)
        hidden, pooled = self._forward(input_ids, layout, logit_rows, StepPooling(plan), on_layer)
        logits = self._model.compute_logits(hidden)
        told = self._prompt_logprobs(plan, logits) if logit_rows is None else None
        if not len(plan.sample_slots):
            return lambda: StepResult(
                np.empty(0, np.int64), prompt_logprobs=_read_prompt_logprobs(told), pooled=_read_pooled(pooled)
            )
        if sample_at is not None:
            logits = logits[sample_at.to(device)]
        mask = None if coming is None else coming.result()
        sampled = self._sampling.sample(logits, plan.sample_slots, plan.sample_steps, mask)
        self._newest[torch.from_numpy(plan.sample_slots).to(device)] = sampled.tokens
        if self._guided is None or mask is None:
            return lambda: _read(sampled, told, pooled)
        outcome = self._guided.advance(mask, plan.sample_slots, sampled.tokens)
        return lambda: _add_outcome(_read(sampled, told, pooled), outcome.result())

    def _forward(
        self,
        input_ids: Tensor,
        layout: StepLayout,
        logit_rows: Tensor | None,
        pooling: StepPooling,
        on_layer: Callable[[int], None] | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states of the rows that need logits, and by chunk the sums of those that are pooled."""
        rows = logit_rows
        if rows is not None and pooling.rows is not None:
            rows = torch.cat([rows, pooling.rows.to(rows.device)])
        hidden = self._model.forward(input_ids, layout, self._kv, rows, on_layer)
        if pooling.rows is None:
            return hidden, {}
        if logit_rows is None:
            return hidden, pooling.add(hidden[pooling.rows.to(hidden.device)])
        return hidden[: len(logit_rows)], pooling.add(hidden[len(logit_rows) :])

    def _note(self, changed: dict[int, Callable[[], None] | None], copies: list[list[tuple[int, int]]]) -> None:
        self._to_copy += copies
        for slot, admit in changed.items():
            if admit is None:
                self._to_admit.pop(slot, None)
                self._sampling.release(slot)
                if self._guided is not None:
                    self._guided.release(slot)
            else:
                self._to_admit[slot] = admit

    def _copy_blocks(self) -> None:
        """What fails is copied before the next step: nothing has written to the sources until then."""
        while self._to_copy:
            sources, targets = zip(*self._to_copy[0], strict=True)
            self._backend.copy_blocks(self._kv, list(sources), list(targets))
            self._to_copy.popleft()

    def _admit_rows(self, plan: StepPlan) -> None:
        """Only those that the step samples: one that cannot be admitted fails no step without it."""
        if self._to_admit:
            for slot in self._to_admit.keys() & plan.sample_slots.tolist():
                self._to_admit[slot]()
                del self._to_admit[slot]

    def _admit(self, slot: int, sequence: Sequence, choice: int, outputs: tuple[int, ...]) -> None:
        self._sampling.admit(
            slot,
            sequence.sampling,
            sequence.prompt_tokens,
            sequence.eos_token_ids,
            output_tokens=outputs,
            choice=choice,
        )
        if outputs:
            self._newest[slot] = outputs[-1]
        if sequence.guide is not None:
            assert self._guided is not None
            self._guided.admit(slot, sequence.guide, bool(sequence.eos_token_ids), outputs)
        elif self._guided is not None:
            self._guided.release(slot)

    def _input_ids(self, plan: StepPlan) -> Tensor:
        device = self._backend.device
        parts = []
        if len(plan.decode_slots):
            parts.append(self._newest[torch.from_numpy(plan.decode_slots).to(device)])
        if plan.chunks:
            prompt = np.concatenate([chunk.tokens for chunk in plan.chunks]).astype(np.int64)
            parts.append(torch.from_numpy(prompt).to(device))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _lay_out(self, plan: StepPlan) -> StepLayout:
        decodes, size = len(plan.decode_slots), self._block_size
        lengths = [1] * decodes + [len(chunk.tokens) for chunk in plan.chunks]
        starts = np.concatenate([plan.decode_positions, np.array([chunk.start for chunk in plan.chunks], np.int64)])
        if plan.chunks:
            ends = np.cumsum(lengths)
            rows = np.repeat(np.arange(len(lengths)), lengths)
            positions = np.arange(ends[-1]) - (ends - lengths)[rows] + starts[rows]
        else:
            rows, positions = np.arange(decodes), starts
        slots = plan.block_tables[rows, positions // size].astype(np.int64) * size + positions % size
        return StepLayout(
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            block_tables=torch.from_numpy(plan.block_tables.astype(np.int64)),
            context_lens=torch.from_numpy(starts + np.array(lengths)),
            query_lens=lengths,
            num_decodes=decodes,
        )

    def _logit_rows(self, plan: StepPlan) -> tuple[Tensor | None, Tensor | None]:
        """Which token rows need logits, and which of those are sampled (None: all, in order)."""
        device = self._backend.device
        if any(chunk.next_tokens is not None for chunk in plan.chunks):
            return None, torch.from_numpy(plan.sample_rows)
        rows, first_of = np.unique(plan.sample_rows, return_inverse=True)
        if len(rows) == len(plan.sample_rows):
            return torch.from_numpy(plan.sample_rows).to(device), None
        return torch.from_numpy(rows).to(device), torch.from_numpy(first_of)

    def _prompt_logprobs(self, plan: StepPlan, logits: Tensor) -> dict[int, tuple[Tensor, Any]]:
        told = {}
        start = len(plan.decode_slots)
        for index, chunk in enumerate(plan.chunks):
            if chunk.next_tokens is not None and len(chunk.next_tokens):
                following = torch.from_numpy(chunk.next_tokens.astype(np.int64)).to(self._backend.device)
                rows = logits[start : start + len(following)]
                told[index] = (following, prompt_logprobs(rows, following, chunk.top_logprobs))
            start += len(chunk.tokens)
        return told


def _read(sampled: SampledTokens, told: dict[int, tuple[Tensor, Any]] | None, pooled: dict[int, Tensor]) -> StepResult:
    return StepResult(
        tokens=sampled.tokens.cpu().numpy(),
        logprobs=None if sampled.logprobs is None else sampled.logprobs.cpu().numpy(),
        top_ids=None if sampled.top_ids is None else sampled.top_ids.cpu().numpy(),
        top_logprobs=None if sampled.top_logprobs is None else sampled.top_logprobs.cpu().numpy(),
        prompt_logprobs=_read_prompt_logprobs(told),
        pooled=_read_pooled(pooled),
    )


def _read_pooled(pooled: dict[int, Tensor]) -> dict[int, NDArray[np.float32]]:
    return {index: total.cpu().numpy() for index, total in pooled.items()}


def _add_outcome(result: StepResult, outcome: GuideOutcome) -> StepResult:
    result.conforming, result.failed_rows = outcome.conforming, outcome.failed
    return result


def _read_prompt_logprobs(told: dict[int, tuple[Tensor, Any]] | None) -> dict[int, list[TokenLogprobs]]:
    read: dict[int, list[TokenLogprobs]] = {}
    for index, (tokens, (chosen, top_ids, top_logprobs)) in (told or {}).items():
        read[index] = to_records(
            tokens.tolist(), chosen.tolist(), top_ids.tolist(), top_logprobs.tolist(), top_ids.shape[1]
        )
    return read
