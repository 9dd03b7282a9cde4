"""Maps that generate: they wait for what they return."""

from __future__ import annotations

from typing import Any

from sage.foundation import MapFunction

from ...operators.sage_items import failed_item
from .function import EngineUser


class Generate(EngineUser, MapFunction):
    """One item in, what comes of it out. Thread-safe: calls of several threads are batched on the device.

        env.from_batch(prompts).map(Generate, config={"model": {"model_id": "..."}}, options={"max_tokens": 64})

    SAGE's autostop path calls it from eight threads, its streaming path from one at a time: for full batches there, use
    SubmitRequests and Completions, or GenerateBatch.

    Guarantee: one item out for each item in, in order; one that fails has an `error`, and nothing is raised.
    """

    def execute(self, data: Any) -> dict[str, Any]:
        return self.generate([data])[0]


class GenerateBatch(EngineUser, MapFunction):
    """A list of items in, the list of what comes of them out; the whole list runs at once.

    Guarantee: as Generate's, for each item of the list.
    """

    def execute(self, data: Any) -> list[dict[str, Any]]:
        if not isinstance(data, list):
            return [failed_item(f"found {data!r:.60}: GenerateBatch takes lists of items; for one, use Generate", data)]
        return self.generate(data)
