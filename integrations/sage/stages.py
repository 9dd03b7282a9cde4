"""Single stages of the engine as maps, for what a flow does besides generating."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
from sage.foundation import MapFunction

from ...errors import RequestError
from ...operators import detokenize, tokenize
from ...operators.sage_items import PROMPTS, failed_item, has_failed, parse_item
from ...records import Choice, DeadLetter, Request, SamplingParams, Sequence
from ...runtime.flow.ledger import Ledger
from ...runtime.flow.operator import OperatorConfig, OperatorContext
from ...runtime.scheduler.lease import namespace_of
from ...runtime.services import EngineServices
from .function import EngineUser

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from ...records import Record
    from ...runtime.flow.operator import Operator


class _Collector:
    """An outlet that keeps the one record that comes out."""

    record: Any = None

    async def send(self, records: Seq[Record], port: str = "out") -> None:
        (self.record,) = records

    async def reject(self, letters: Seq[DeadLetter]) -> None:
        (self.record,) = letters

    def drop(self, records: Seq[Record]) -> None:
        """No stage here drops any."""

    async def end(self) -> None:
        """Nor ends early."""


class _Stage(EngineUser, MapFunction):
    """A map of items that runs one operator of the engine on each."""

    def execute(self, data: Any) -> dict[str, Any]:
        if has_failed(data):
            return dict(data)
        try:
            return self._map(data)
        except Exception as error:
            return failed_item(error, data)

    def _map(self, item: Any) -> dict[str, Any]:
        raise NotImplementedError

    @cached_property
    def _services(self) -> EngineServices:
        """Tokenizer and configuration of the model; its weights are not loaded."""
        return EngineServices(self._handle.config)

    def _run(self, kind: type[Operator[OperatorConfig]], record: Record) -> Any:
        async def run() -> Any:
            context = OperatorContext(kind.__name__, self._services, Ledger(), Path(), lambda reason: None)
            operator, collector = kind(OperatorConfig(), context), _Collector()
            await operator.open()
            await operator.process([record], collector)
            return collector.record

        result = anyio.run(run)
        if isinstance(result, DeadLetter):
            raise RequestError(result.error)
        return result

    def _tokenize(self, item: Any) -> Sequence:
        sequence: Sequence = self._run(tokenize.Tokenize, parse_item(item, self._options))
        return sequence


class Tokenize(_Stage):
    """Puts `prompt_tokens` in the place of an item's prompt or messages, as the engine would make them of it.

    Guarantee: one item out for each item in, in order; one that fails has an `error`, and nothing is raised.
    """

    def _map(self, item: Any) -> dict[str, Any]:
        tokens = self._tokenize(item).prompt_tokens.tolist()
        rest = item if isinstance(item, dict) else {}
        return {**{name: value for name, value in rest.items() if name not in PROMPTS}, "prompt_tokens": tokens}


class KVLookup(_Stage):
    """Adds `cached_tokens`: how much of the prompt's beginning the engine has in its KV cache now.

    Guarantee: as Tokenize's.
    """

    def _map(self, item: Any) -> dict[str, Any]:
        sequence = self._tokenize(item)
        leases = self._handle.engine_for(self).services.leases
        (cached,) = leases.count_cached([(sequence.prompt_tokens, namespace_of(sequence))])
        return {**(item if isinstance(item, dict) else {"prompt": item}), "cached_tokens": cached}


class Detokenize(_Stage):
    """Puts `text` in the place of an item's `output_tokens`; a plain list of ids will do.

    Guarantee: as Tokenize's.
    """

    def _map(self, item: Any) -> dict[str, Any]:
        item = {"output_tokens": item} if isinstance(item, list) else item
        tokens = item.get("output_tokens") if isinstance(item, dict) else None
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
            raise RequestError(f'found {item!r:.60}: write {{"output_tokens": [...]}} with ids, or a list of them')
        sequence = Sequence(Request(""), np.empty(0, np.int32), SamplingParams(), choices=[Choice(0, tokens)])
        completion = self._run(detokenize.Detokenize, sequence)
        return {**{name: value for name, value in item.items() if name != "output_tokens"}, "text": completion.text}
