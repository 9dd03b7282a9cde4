"""What the functions share: configuration and options, as keyword arguments that SAGE does not take for itself."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, EngineClosedError, RequestError
from ...operators.sage_items import check_options, completion_item, failed_item, has_failed, parse_item
from ...records import Completion, DeadLetter
from .engines import find_handle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...config import SageLLMConfig
    from ...records import Request


def output_item(record: Completion | DeadLetter, context: Any) -> dict[str, Any]:
    """The item of a terminal record."""
    if isinstance(record, DeadLetter):
        return failed_item(record.error, context)
    return completion_item(record, context)


class EngineUser:
    """Base of a SAGE function or service that uses an engine.

    `config` is a SageLLMConfig or its fields; `options` are fields of a request line, for items that say nothing else.
    Both are checked where SAGE constructs the function, when the flow is submitted.
    """

    def __init__(
        self,
        config: SageLLMConfig | Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Note what to use; nothing is loaded.

        Raises:
            ConfigError: `config` or `options` hold what is none.
        """
        super().__init__()
        self._handle = find_handle(config)
        self._options = dict(options or {})
        try:
            check_options(self._options)
            chat = {"messages": [{"role": "user", "content": "?"}]}
            parse_item(chat if self._options.get("tools") else "?", self._options)  # tools are for chats only
        except RequestError as error:
            raise ConfigError(f"options: {error}") from error

    def close(self) -> None:
        """Let go of the engine. SAGE calls this of sinks only, so others hold it until the process ends."""
        self._handle.release(self)

    def generate(self, items: list[Any]) -> list[dict[str, Any]]:
        """What comes of each item, in order. They run at once, with all that other threads generate."""
        outputs: list[dict[str, Any]] = [{}] * len(items)
        waiting: list[tuple[int, Request, Future[Completion | DeadLetter]]] = []
        for index, item in enumerate(items):
            if has_failed(item):
                outputs[index] = item
                continue
            try:
                waiting.append((index, parse_item(item, self._options), Future()))
            except Exception as error:
                outputs[index] = failed_item(error, item)
        if not waiting:
            return outputs
        try:
            engine = self._handle.engine_for(self)
            engine.submit([(request, future.set_result) for _, request, future in waiting])
        except Exception as error:
            return [output or failed_item(error, item) for output, item in zip(outputs, items, strict=True)]
        try:
            for index, _, future in waiting:
                outputs[index] = output_item(future.result(), items[index])
        except BaseException:  # KeyboardInterrupt: nobody waits for them any more
            with suppress(EngineClosedError):
                engine.cancel([request for _, request, _ in waiting])
            raise
        return outputs
