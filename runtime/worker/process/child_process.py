"""Starts the process of a worker and sees to it that it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from ....errors import ConfigError
from .channel import Channel

if TYPE_CHECKING:
    from collections.abc import Callable

_GRACE_S = 5.0  # for an end in peace


class ChildProcess:
    """A new interpreter, never a fork: threads and devices of this process are none of its business.

    It dies with this process, is reaped as soon as it is dead, and is in a process group of its own: Ctrl-C is for us.
    On another thread `on_notice` gets what it sends apart from the channel, and then `on_exit` tells that it has ended.
    """

    def __init__(self, module: str, on_notice: Callable[[Any], None], on_exit: Callable[[], None]) -> None:
        """Start `module.main(channel, notices, parent)`: descriptors of its ends of both, and our process id.

        Raises:
            OSError: no process can be started.
            ConfigError: this is not Linux.
        """
        if sys.platform != "linux":
            raise ConfigError(f"scheduler.isolation: process needs Linux, this is {sys.platform}: write thread")
        ours, theirs = zip(socket.socketpair(), socket.socketpair(), strict=True)
        self.channel, self._notices = map(Channel, ours)
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._on_notice, self._on_exit = on_notice, on_exit
        self._started, self._ended = Event(), Event()
        code = f"import sys; sys.path[:] = {sys.path!r}\n"
        code += f"from {module} import main; main({theirs[0].fileno()}, {theirs[1].fileno()}, {os.getpid()})"
        Thread(target=self._run, args=(code, theirs), name="sagellm-process", daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def _run(self, code: str, theirs: tuple[socket.socket, ...]) -> None:
        # The kernel ends the child with the thread that started it: this one stays until it has ended.
        try:
            with theirs[0], theirs[1]:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    pass_fds=[end.fileno() for end in theirs],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr.fileno() if _is_open(sys.stderr) else subprocess.DEVNULL,
                    process_group=0,
                )
        except OSError as error:
            self._error = error
            self._started.set()
            return
        self._started.set()
        with suppress(EOFError, OSError):
            while True:
                self._on_notice(self._notices.receive()[0])
        self._process.wait()
        self._notices.close()
        self._ended.set()
        self._on_exit()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def kill(self) -> None:
        """End it now, and wait until it is gone."""
        assert self._process is not None
        if not self._ended.is_set():
            self._process.kill()
        self.channel.close()
        self._ended.wait()

    def end(self) -> None:
        """Wait a moment for it to end by itself, then kill it."""
        self._ended.wait(_GRACE_S)
        self.kill()

    def describe_end(self) -> str:
        """How it ended, or that it has not."""
        assert self._process is not None
        if not self._ended.wait(1.0):
            return f"process {self.pid} closed its channel"
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"process {self.pid} {how}"


def _is_open(stream: Any) -> bool:
    try:
        return stream is not None and stream.fileno() >= 0
    except (OSError, ValueError):
        return False
