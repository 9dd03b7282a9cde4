"""The engines of this process: one per configuration, built at its first use, ended with its last user or the process.

SAGE constructs each function twice and may run only one of the two, tells no function that it opens and few that it
closes. So functions hold the configuration, not the engine, and ask for that when there is something to compute.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ...config import SageLLMConfig
from ...errors import ConfigError

if TYPE_CHECKING:
    from ...engine import SageLLMEngine

_HANDLES: dict[str, EngineHandle] = {}
_LOCK = threading.Lock()


class EngineHandle:
    """An engine that is there while somebody uses it. Users are counted as long as they live; any thread may call."""

    def __init__(self, config: SageLLMConfig) -> None:
        self.config = config
        self._engine: SageLLMEngine | None = None
        self._failure: Exception | None = None
        self._users: WeakSet[Any] = WeakSet()
        self._lock = threading.Lock()

    def engine_for(self, user: object) -> SageLLMEngine:
        """The running engine, of which `user` is a user from now on. The first call loads the model, others wait.

        Raises:
            ModelError, ConfigError: the model or the device cannot be had; told again, without another try, until the
                handle is shut down.
        """
        from ...engine import SageLLMEngine

        with self._lock:
            self._users.add(user)
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            self._engine = self._engine or SageLLMEngine(self.config)
            try:
                self._engine.initialize()  # also afresh, where a failure has ended it
            except Exception as error:
                self._failure = error
                raise
            return self._engine

    def release(self, user: object) -> None:
        """`user` needs the engine no more; the last one's word ends it."""
        with self._lock:
            self._users.discard(user)
            if not self._users:
                self._end()

    def shut_down(self) -> None:
        """End the engine whoever uses it; what it is computing is cancelled. The next use builds another one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        engine, self._engine, self._failure = self._engine, None, None
        if engine is not None:
            engine.shutdown(cancel=True)


def find_handle(config: SageLLMConfig | Mapping[str, Any] | None) -> EngineHandle:
    """This process's handle for a configuration: equal ones share it.

    Raises:
        ConfigError: `config` is not a configuration, or has unknown or mistyped fields.
    """
    if not isinstance(config, SageLLMConfig):
        if config is not None and not isinstance(config, Mapping):
            raise ConfigError(f"config: found {config!r:.60}, write a SageLLMConfig or the fields of one")
        config = SageLLMConfig(**(config or {}))
    with _LOCK:
        return _HANDLES.setdefault(config.model_dump_json(), EngineHandle(config))


def shut_down_engines() -> None:
    """End all engines that SAGE functions use in this process; what they are computing is cancelled.

    The end of the process does so by itself. A function that is used afterwards builds its engine anew.
    """
    with _LOCK:
        handles = [*_HANDLES.values()]
    for handle in handles:
        handle.shut_down()


atexit.register(shut_down_engines)
