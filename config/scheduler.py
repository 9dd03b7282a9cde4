"""The section `scheduler`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from .base import Config, Positive
from .choices import Isolated, Isolation, Mode, Policy, SchedulerMode, SchedulerPolicy
from .problems import Contradiction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HEEDED_BY = {
    "tenant_weights": (SchedulerPolicy.FAIR_SHARE,),
    "max_overtakes": (SchedulerPolicy.LONGEST_PREFIX, SchedulerPolicy.SHORTEST_JOB),
}


def _most(rows: int) -> Callable[[dict[str, Any]], int]:
    """A default that `max_batch_size`, where it is smaller, takes with it."""
    return lambda values: min(rows, values.get("max_batch_size", rows))


class SchedulerConfig(Config):
    """What may run at once, and how long a request may wait. Batch sizes are in sequences, budgets in tokens.

    `max_batch_size` bounds the sequences that hold a lease, `max_decode_batch` those that get a token in one step,
    `max_prefill_batch` those whose prompt is computed in one step (in a pipeline, `max_batch` of the stage `decode` or
    `prefill` comes before them); `max_step_tokens` bounds the tokens of one step and so the size of a prompt chunk
    (None: 4096 on a GPU, 512 on a CPU and more there for a small model).
    `mode` `hybrid` mixes decoding rows and prompt chunks in one step; `time_share` takes turns: `prefill_steps` steps
    of prompts (by default 1), then `decode_steps` of decoding rows (4). `strict` computes prompts on `prefill_workers`
    and decodes on `decode_workers`, each with a KV pool and `max_batch_size` slots of its own; KV that is not handed
    over within `transfer_timeout_s` (0 is no limit), or cannot be, is computed again by the decode worker, or the
    request fails, as `on_transfer_failure` says.
    `launch_ahead` plans and launches a step before the previous one's tokens are read.
    `tpot_slo_ms` is the longest that a step with decoding rows is to take: it gets the most prompt, in whole KV blocks,
    with which that holds by an estimate that follows the measured steps (`time_share`: the mean over a turn; without
    decoding rows, `max_step_tokens`). Where no block fits, one step in four takes one all the same.
    `preemption` says what becomes of the KV of a sequence that gives way when blocks run out: `recompute` drops it,
    `swap` keeps it in DDR until its turn comes again.

    `isolation` `process` runs the model of each worker in a process of its own: if it dies, or a step takes more than
    `step_timeout_s` (None: 120; 0: any time), another one is started and computes again what was under way.

    `queue_timeout_s` is the longest wait for a lease, `first_token_timeout_s` the longest time from arrival to the
    first token, `request_timeout_s` to the last; 0 is no limit. They hold for requests that somebody waits for (library
    calls, sockets), and each is a finish reason of its own. Lines of a file wait as long as it takes.

    `policy` orders what waits. `tenant_weights`, for FAIR_SHARE, are the tenants' shares, 1 where none is given. There
    who holds none, or less than its share of `max_batch_size`, gets a lease even if others hold all, so up to twice
    as many may; no step decodes more than `max_batch_size`.
    `max_overtakes`, for LONGEST_PREFIX and SHORTEST_JOB, is by how many later ones a sequence may be overtaken at most
    (None: 64).
    """

    mode: Mode = SchedulerMode.HYBRID
    policy: Policy = SchedulerPolicy.FCFS
    tenant_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    max_overtakes: Positive | None = None
    prefill_workers: Positive = 1
    decode_workers: Positive = 1
    preemption: Literal["recompute", "swap"] = "recompute"
    isolation: Isolated = Isolation.THREAD
    step_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_batch_size: Positive = 64
    max_prefill_batch: Positive = Field(default_factory=_most(8))
    max_decode_batch: Positive = Field(default_factory=_most(64))
    max_step_tokens: Positive | None = None
    prefill_steps: Positive | None = None
    decode_steps: Positive | None = None
    on_transfer_failure: Literal["recompute", "fail"] = "recompute"
    transfer_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    launch_ahead: bool = True
    tpot_slo_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    request_timeout_s: Annotated[float, Field(ge=0)] = 60.0
    queue_timeout_s: Annotated[float, Field(ge=0)] = 30.0
    first_token_timeout_s: Annotated[float, Field(ge=0)] = 0.0

    def contradictions(self) -> Iterator[Contradiction]:
        for wanted, names in (
            (SchedulerMode.TIME_SHARE, ("prefill_steps", "decode_steps")),
            (SchedulerMode.STRICT, ("prefill_workers", "decode_workers", "transfer_timeout_s")),
        ):
            for name in self.changed(*names) if self.mode is not wanted else ():
                text = f"{name} is for mode: {wanted}: write that, or leave {name} out"
                yield Contradiction(text, (name, "mode"))
        if self.step_timeout_s is not None and self.isolation is Isolation.THREAD:
            text = "step_timeout_s is for isolation: process, since a thread that hangs cannot be ended: write that"
            yield Contradiction(f"{text}, or leave it out", ("step_timeout_s", "isolation"))
        for name, policies in _HEEDED_BY.items():
            if self.policy not in policies:
                for given in self.changed(name):
                    text = f"policy {self.policy} ignores {given}: leave it out, or write policy: "
                    yield Contradiction(text + " or ".join(policies), (given, "policy"))
        for name, most in (("max_prefill_batch", self.num_slots), ("max_decode_batch", self.max_batch_size)):
            if getattr(self, name) > most:
                text = f"{name} is {getattr(self, name)}, but {most} run at once: write at most that, or raise "
                yield Contradiction(f"{text}max_batch_size", (name, "max_batch_size"))

    @property
    def num_workers(self) -> int:
        """Step loops, each with a KV pool of its own."""
        return self.prefill_workers + self.decode_workers if self.mode is SchedulerMode.STRICT else 1

    @property
    def num_slots(self) -> int:
        """Sequences that may hold a lease on one worker."""
        return self.max_batch_size * (2 if self.policy is SchedulerPolicy.FAIR_SHARE else 1)

    @property
    def time_shares(self) -> tuple[int, int] | None:
        """Steps of prompts and of decoding rows that take turns; None where they share each step."""
        if self.mode is not SchedulerMode.TIME_SHARE:
            return None
        return self.prefill_steps or 1, self.decode_steps or 4
