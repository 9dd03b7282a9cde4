"""call_source: requests that a program submits to the engine, from any thread, become records."""

from __future__ import annotations

import threading

import anyio
import pytest

from sageLLM.errors import EngineClosedError
from sageLLM.operators.sources.call_source import CallSource
from sageLLM.records import Request
from sageLLM.runtime.calls import FutureCaller


def calls_of(*requests):
    for request in requests:
        request.caller = FutureCaller(request)
    return [*requests]


def test_each_submitted_request_is_emitted_once_in_order(on_loop, null_engine):
    engine = null_engine()
    requests = [Request(f"r{n}", prompt="hi") for n in range(10)]

    async def main():
        async with engine.stage(CallSource) as source:
            engine.services.calls.submit(calls_of(*requests[:3]))  # a list of calls is one batch
            await source.settled()
            assert source.outlet.lists == [3]
            for request in requests[3:]:
                engine.services.calls.submit(calls_of(request))
            await source.settled()
            assert source.sent == requests
            engine.services.calls.close("that was all")

    on_loop(main)


def test_from_other_threads(on_loop, null_engine):
    engine = null_engine()
    requests = [Request(f"r{n}", prompt="hi") for n in range(40)]

    async def main():
        async with engine.stage(CallSource) as source:

            def submit(mine):
                for request in mine:
                    engine.services.calls.submit(calls_of(request))

            threads = [threading.Thread(target=submit, args=(requests[n::4],)) for n in range(4)]
            for thread in threads:
                thread.start()
            await source.until(lambda: len(source.sent) == 40)
            for thread in threads:
                await anyio.to_thread.run_sync(thread.join)
            for n in range(4):
                assert [request for request in source.sent if request in requests[n::4]] == requests[n::4]
            engine.services.calls.close("that was all")

    on_loop(main)


def test_it_ends_when_the_desk_closes_after_what_is_in(on_loop, null_engine):
    engine = null_engine()
    request = Request("r", prompt="hi")

    async def main():
        engine.services.calls.submit(calls_of(request))
        engine.services.calls.close("the engine was shut down")
        async with engine.stage(CallSource) as source:
            await source.settled()
        assert source.sent == [request]

    on_loop(main)


def test_a_closed_desk_takes_nothing_and_says_why(null_engine):
    calls = null_engine().services.calls
    calls.close("the engine was shut down")
    calls.close("later reasons do not count")
    with pytest.raises(EngineClosedError, match="the engine was shut down"):
        calls.submit(calls_of(Request("r", prompt="hi")))
