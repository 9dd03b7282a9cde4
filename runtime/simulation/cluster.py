"""Several engines that serve one stream of requests, each request wholly on one of them."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from ..scheduler.lease import namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...records import Sequence
    from .engine import SimulatedEngine


class Routing(StrEnum):
    """Which engine gets a request: the next one, the one with the fewest tokens to serve (prompt and `max_new_tokens`
    of all that it has), or the one where these and what it has not cached of the prompt are the fewest."""

    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    PREFIX_AWARE = "prefix_aware"


class Cluster:
    """`make_engine` builds one engine, given who is told of ended sequences; so does `on_end`."""

    def __init__(
        self,
        count: int,
        routing: Routing,
        make_engine: Callable[[Callable[[Sequence], None]], SimulatedEngine],
        on_end: Callable[[Sequence], None],
    ) -> None:
        self._routing = routing
        self._on_end = on_end
        self._loads = [0] * count  # tokens
        self._routes: dict[int, int] = {}  # by id of the sequence
        self._arrived = 0
        self.engines = [make_engine(self._end) for _ in range(count)]

    def arrive(self, sequence: Sequence) -> None:
        """Give a sequence to an engine."""
        route = self._route(sequence)
        self._arrived += 1
        self._routes[id(sequence)] = route
        self._loads[route] += _tokens(sequence)
        self.engines[route].arrive(sequence)

    def _route(self, sequence: Sequence) -> int:
        everyone = range(len(self.engines))
        match self._routing:
            case Routing.ROUND_ROBIN:
                return self._arrived % len(self.engines)
            case Routing.LEAST_LOADED:
                return min(everyone, key=self._loads.__getitem__)
            case Routing.PREFIX_AWARE:
                for engine in self.engines:
                    engine.catch_up()
                prompt = [(sequence.prompt_tokens, namespace_of(sequence))]
                cached = [engine.services.leases.count_cached(prompt, touch=False)[0] for engine in self.engines]
                return min(everyone, key=lambda index: self._loads[index] - cached[index])

    def _end(self, sequence: Sequence) -> None:
        self._loads[self._routes.pop(id(sequence))] -= _tokens(sequence)
        self._on_end(sequence)


def _tokens(sequence: Sequence) -> int:
    return len(sequence.prompt_tokens) + sequence.sampling.max_new_tokens
