"""The worker's process: builds the executor that the configuration asks for and runs the plans that come."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, NoReturn

from ....config import SageLLMConfig
from ....records import Request, Sequence
from ...executors import make_lone_executor
from ...garbage import collect_rarely
from .channel import Channel
from .messages import Admission, Close, Failure, Readmission, Ready

if TYPE_CHECKING:
    from ...scheduler.plan import StepPlan
    from ..executor import Executor, StepHandle
    from .messages import Release

_PR_SET_PDEATHSIG = 1


def main(descriptor: int, parent: int) -> None:
    """Serve the worker at the other end of a socket, until it says `Close` or is gone."""
    _die_with(parent)
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        _serve(channel)
    except (EOFError, OSError):  # nobody is left to serve
        _exit(1)


def _die_with(parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's business: it finishes what it has, then tells us
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        _exit(1)


def _serve(channel: Channel) -> None:
    (config, worker), _ = channel.receive()
    try:
        executor, backend_name = make_lone_executor(SageLLMConfig(**config), worker)
    except Exception as error:
        channel.send(Failure(error))
        return
    collect_rarely()
    channel.send(Ready(backend_name))
    steps: SimpleQueue[StepHandle | Failure] = SimpleQueue()
    Thread(target=_answer, args=(channel, steps), daemon=True).start()
    while True:
        message, _ = channel.receive()
        if isinstance(message, Close):
            executor.close()
            _exit(0)
        for change in message.changes:
            _apply(executor, change)
        steps.put(_launch(executor, message.plan))


def _apply(executor: Executor, change: Admission | Readmission | Release) -> None:
    if isinstance(change, Admission):
        request = Request(f"slot-{change.slot}")
        sequence = Sequence(request, change.prompt_tokens, change.sampling, change.eos_token_ids)
        executor.admit(change.slot, sequence, change.choice)
    elif isinstance(change, Readmission):
        executor.readmit(*change)
    else:
        executor.release(change.slot)


def _launch(executor: Executor, plan: StepPlan) -> StepHandle | Failure:
    try:
        return executor.launch(plan)
    except Exception as error:
        return Failure(error)


def _answer(channel: Channel, steps: SimpleQueue[StepHandle | Failure]) -> None:
    while True:
        step = steps.get()
        try:
            answer = step if isinstance(step, Failure) else step.result()
        except Exception as error:
            answer = Failure(error)
        try:
            channel.send(answer)
        except OSError:
            _exit(1)


def _exit(code: int) -> NoReturn:
    """At once, whatever other threads compute."""
    os._exit(code)
