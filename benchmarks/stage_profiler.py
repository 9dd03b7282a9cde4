"""Where a flow's CPU time goes, by stage: samples, so that what is measured is not slowed as it is by cProfile."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType, TracebackType

INTERVAL_S = 0.001  # of CPU time
_ROOT = str(Path(__file__).parents[1]) + "/"
_STEP = "runtime/worker/worker.py"


class StageProfiler:
    """Use it as a context manager on the main thread, around what is to be measured."""

    def __init__(self) -> None:
        self._stages: Counter[str] = Counter()
        self._functions: Counter[str] = Counter()
        self._cpu_s = 0.0

    def __enter__(self) -> StageProfiler:
        self._before = signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)
        self._cpu_s -= time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._before)
        self._cpu_s += time.process_time()

    def _sample(self, number: int, frame: FrameType | None) -> None:
        calls: list[tuple[str, str]] = []  # innermost first: file below the package's root, function
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(_ROOT) and "site-packages" not in path:
                calls.append((path.removeprefix(_ROOT), frame.f_code.co_name))
            frame = frame.f_back
        self._stages[_stage_of(calls)] += 1
        self._functions["{} {}".format(*calls[0]) if calls else "event loop"] += 1

    def report(self, requests: int, functions: int = 12) -> str:
        """Microseconds of CPU time per request, by stage and for the most expensive functions, callees left out."""
        share = self._cpu_s / max(1, self._stages.total()) / requests * 1e6
        lines = [f"{self._cpu_s / requests * 1e6:7.1f}  us of CPU time per request, of which"]
        lines += [f"{count * share:7.1f}  {name}" for name, count in self._stages.most_common()]
        lines += ["", "the most expensive functions, in us per request:"]
        lines += [f"{count * share:7.1f}  {name}" for name, count in self._functions.most_common(functions)]
        return "\n".join(lines)


def _stage_of(calls: list[tuple[str, str]]) -> str:
    """The operator, the part of the step or the flow machinery on whose behalf the innermost function runs."""
    stage = ""
    for (path, function), outer in zip(calls, [*calls[1:], ("", "")], strict=False):
        if path.startswith("operators/"):
            stage = Path(path).stem  # a helper's, until its operator comes
        elif outer == (_STEP, "step"):
            return f"worker: {function.strip('_').replace('_', ' ')}"
        elif path.startswith("runtime/flow/"):
            return stage or "flow"
    return stage or "event loop and the rest"
