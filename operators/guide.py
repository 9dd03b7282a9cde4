"""guide: what an output must conform to is compiled before the request waits for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
from pydantic import model_validator

from ..errors import ConfigError, RequestError
from ..records import DeadLetter
from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from .sources.guide_fields import ResponseFormat, Source, guide_from_fields

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..records import Guide, Sequence

_SEQUENCE = frozenset({RecordKind.SEQUENCE})
_COMPILED_AT_ONCE = 4


class GuideConfig(OperatorConfig):
    """At most one of the three, with the meaning that it has in a request: for requests that ask for none of them."""

    response_format: ResponseFormat | None = None
    guided_regex: Source | None = None
    guided_grammar: Source | None = None

    @model_validator(mode="after")
    def _check_guide(self) -> GuideConfig:
        try:
            self.guide  # noqa: B018
        except RequestError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def guide(self) -> Guide | None:
        return guide_from_fields(self.response_format, self.guided_regex, self.guided_grammar)


@operator("guide")
class GuideOutputs(Operator[GuideConfig]):
    """Compiles the JSON schema, regular expression or grammar that a request's outputs must conform to, by llguidance.

    From then on only tokens that conform are chosen for it. Grammars are compiled on threads, four at a time, each once
    while it is in use; requests without one pass by, until `buffer` others wait for theirs. Without this stage
    `schedule` rejects requests that have one.

    Guarantee: each sequence leaves exactly once, on `out`, or on `error` if its grammar is wrong or too large, or the
    model cannot be guided. In order, except that those whose grammar is being compiled are overtaken.
    """

    config_model = GuideConfig
    inputs = (Port("in", _SEQUENCE),)
    outputs = (Port("out", _SEQUENCE), ERROR_PORT)
    requires = frozenset({"tokenized"})
    provides = frozenset({"guided"})
    precedes = frozenset({"leased"})
    guarantee = "each sequence leaves exactly once, on `out` or `error`; overtaken while its grammar is compiled"
    example = 'guide: {guided_regex: "(yes|no)"}'

    async def open(self) -> None:
        """Compile the pipeline's own grammar, if it has one.

        Raises:
            ConfigError: it is wrong, or the model cannot be guided.
        """
        self._guides = self.context.engine.guides
        self._default = self.config.guide
        self._waiting: dict[Guide, list[Sequence]] = {}  # for what is being compiled
        self._threads = anyio.CapacityLimiter(_COMPILED_AT_ONCE)
        self._room = anyio.Event()
        if self._default is not None:
            try:
                await anyio.to_thread.run_sync(self._guides.check, self._default)
            except RequestError as error:
                raise ConfigError(f"operator {self.context.name!r}: {error}") from error

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        async with anyio.create_task_group() as tasks:
            async for records in inlet:
                if self._default is None and all(record.request.guide is None for record in records):
                    await out.send(records)
                    continue
                known = set(self._waiting)
                ready = [record for record in records if self._is_ready(record)]
                for guide in self._waiting.keys() - known:
                    tasks.start_soon(self._compile, guide, out)
                if ready:
                    await out.send(ready)
                while self._is_full:
                    self._room = anyio.Event()
                    await self._room.wait()

    def _is_ready(self, sequence: Sequence) -> bool:
        guide = sequence.request.guide
        if guide is None and sequence.request.pooling is None:
            guide = self._default
        if guide is not None and not self._guides.knows(guide):
            self._waiting.setdefault(guide, []).append(sequence)
            return False
        sequence.guide = guide
        return True

    @property
    def _is_full(self) -> bool:
        return sum(map(len, self._waiting.values())) >= self.config.buffer

    async def _compile(self, guide: Guide, out: Outlet) -> None:
        error: RequestError | None = None
        try:
            await anyio.to_thread.run_sync(self._guides.check, guide, limiter=self._threads)
        except RequestError as wrong:
            error = wrong
        sequences = self._waiting.pop(guide)
        self._room.set()
        if error is not None:
            await out.reject([DeadLetter.refusing(sequence.request, error) for sequence in sequences])
            return
        for sequence in sequences:
            sequence.guide = guide
        await out.send(sequences)
