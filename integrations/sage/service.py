"""A model as a SAGE service, which functions of the flow call when they need it."""

from __future__ import annotations

from typing import Any

from sage.runtime import BaseService

from .function import EngineUser


class LLMService(EngineUser, BaseService):
    """Generates for the functions of a flow.

        env.register_service("llm", LLMService, options={"max_tokens": 64})
        ...
        answer = self.call_service("llm", "What does heapq.heappush do?")["text"]

    SAGE serves calls of several threads at a time, which are batched on the device; a list of items runs at once. It
    has no services on the autostop path of a flow that is a mere chain behind `from_batch`.

    Guarantee: what is returned answers the call; an item that fails has an `error`, and nothing is raised.
    """

    def process(self, data: Any) -> Any:
        """What comes of an item, or the list of what comes of a list's."""
        return self.generate(data) if isinstance(data, list) else self.generate([data])[0]

    def cleanup(self) -> None:
        """SAGE's word that the flow is over."""
        self.close()
