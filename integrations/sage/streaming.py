"""Generation in a flow without a stage that waits: a sink takes the requests, a source gives what comes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sage.foundation import SinkFunction, SourceFunction
from sage.runtime import StopSignal

from ...errors import ConfigError
from .channel import END, Channel, find_channel
from .engines import find_handle
from .function import EngineUser

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...config import SageLLMConfig


class SubmitRequests(EngineUser, SinkFunction):
    """Takes items and returns at once: however SAGE calls it, all that were taken are computed together.

        env.from_source(Questions).sink(SubmitRequests, config=config)
        env.from_source(Completions, config=config, delay=0.01).sink(Answers)

    It waits only while `max_in_flight` items are being computed. `channel` tells flows of one process apart that have
    the same configuration. The item `END` says that no more come.

    Guarantee: Completions gives one item for each that was taken, in the order in which they end; `context` is the one
    that was taken. They live in this process: what it has not given when the process ends is lost.
    """

    def __init__(
        self,
        config: SageLLMConfig | Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        channel: str = "",
        max_in_flight: int = 1024,
    ) -> None:
        """Note what to use; nothing is loaded.

        Raises:
            ConfigError: an argument holds what is none.
        """
        super().__init__(config, options)
        if max_in_flight < 1:
            raise ConfigError(f"max_in_flight: found {max_in_flight}, give at least 1")
        self._name = channel
        self._max_in_flight = max_in_flight
        self._channel: Channel | None = None

    def execute(self, data: Any) -> None:
        if self._channel is None:
            self._channel = find_channel(self._handle, self._name)
        if data is END:
            self._channel.end()
            self._channel = None
            return
        while not self._channel.submit(data, self._options, self._max_in_flight):
            self._channel = find_channel(self._handle, self._name)

    def close(self) -> None:
        """What the item END says, from SAGE: where no source of the flow has more."""
        if self._channel is not None:
            self._channel.end()
            self._channel.close_if_drained()
            self._channel = None


class Completions(SourceFunction):
    """What came of the items that SubmitRequests with the same `config` and `channel` took; ends after `END`.

    One for each channel. Between two looks at an empty channel SAGE sleeps `delay`, a second if from_source is not told
    otherwise.
    """

    def __init__(
        self, config: SageLLMConfig | Mapping[str, Any] | None = None, channel: str = ""
    ) -> None:
        """Note which channel to read.

        Raises:
            ConfigError: `config` holds what is none.
        """
        super().__init__()
        self._handle = find_handle(config)
        self._name = channel
        self._channel: Channel | None = None

    def execute(self) -> Any:
        if self._channel is None:
            self._channel = find_channel(self._handle, self._name)
        output = self._channel.take()
        return StopSignal("Completions") if output is END else output
