"""`sagellm send`: the requests of a file to a pipeline that listens, and its answers."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from .progress import PLAIN_INTERVAL_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..operators.sources.net.client import Address
    from .sender import Sender


@click.command("send")
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--to", "url", required=True, metavar="ADDRESS", help="tcp://host:port, tcps://, ws://, wss://, unix:///path"
)
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Results go here, not to stdout.")
@click.option("--framing", type=click.Choice(["json_lines", "msgpack"]), default="json_lines", show_default=True)
@click.option("--max-in-flight", type=click.IntRange(1), default=64, show_default=True)
@click.option("--key-env", metavar="NAME", help="The environment variable that holds the bearer key.")
@click.option(
    "--ca", type=click.Path(exists=True, dir_okay=False), help="Trust servers whose certificate this CA has signed."
)
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary; errors are still told.")
def command(
    path: Path,
    url: str,
    output: Path | None,
    framing: str,
    max_in_flight: int,
    key_env: str | None,
    ca: str | None,
    quiet: bool,
) -> None:
    """Send the requests in FILE, one JSON object a line, to ADDRESS, and print the last event of each as a line.

    What the server has no room for is sent again when it says. Exit codes: 0 every request got `done`, 1 some did not
    or the connection failed, 78 the address, key or CA is wrong.
    """
    import anyio

    from ..operators.sources.net.client import parse_address
    from ..runtime.flow.groups import lone_error_unwrapped

    address = parse_address(url)
    if framing != "json_lines" and address.is_websocket:
        raise ConfigError("--framing is for tcp and unix: leave it out, WebSocket frames its own messages")
    if ca is not None and not address.has_tls:
        raise ConfigError(f"--ca is for tcps:// and wss://, found {address.scheme}://")
    key = None
    if key_env is not None and not (key := os.environ.get(key_env)):
        raise ConfigError(f"--key-env {key_env}: the environment has no {key_env}: set it to the key")
    with ExitStack() as files, lone_error_unwrapped():
        lines = files.enter_context(path.open("rb"))
        results = sys.stdout.buffer if output is None else files.enter_context(output.open("wb"))
        all_done = anyio.run(_send, address, lines, results, (framing, key, ca), max_in_flight, quiet)
    if not all_done:
        sys.exit(1)


async def _send(
    address: Address,
    lines: IO[bytes],
    results: IO[bytes],
    how: tuple[str, str | None, str | None],
    limit: int,
    quiet: bool,
) -> bool:
    import anyio

    from ..operators.sources.net.client import connect
    from ..operators.sources.net.framing import encode_line
    from .sender import Sender

    def write(event: dict[str, Any]) -> None:
        results.write(encode_line(event))
        results.flush()

    session = await connect(address, *how)
    try:
        with _progress(lines, quiet) as show:
            sender = Sender(session, limit, write, lambda: show(sender))
            await sender.run(lines)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(session.stream)
    if not quiet:
        print(_summary(sender), file=sys.stderr)
    return set(sender.counts) <= {"done"}


def _summary(sender: Sender) -> str:
    told = [f"{name} {count}" for name, count in sorted(sender.counts.items())]
    told += [f"sent again {sender.retried}"] * (sender.retried > 0)
    return "  ".join(told) or "no requests"


@contextmanager
def _progress(lines: IO[bytes], quiet: bool) -> Iterator[Callable[[Sender], None]]:
    """Show a bar where there is a terminal to show it on, elsewhere a line from time to time."""
    if quiet:
        yield lambda sender: None
        return
    if not sys.stderr.isatty():
        yield _show_plainly()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    total = sum(1 for line in lines if line.strip())
    lines.seek(0)
    columns = (TimeElapsedColumn(), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def show(sender: Sender) -> None:
            bar.update(task, completed=sum(sender.counts.values()), description=_describe(sender))

        yield show


def _show_plainly() -> Callable[[Sender], None]:
    told_at = time.monotonic()

    def show(sender: Sender) -> None:
        nonlocal told_at
        if time.monotonic() >= told_at + PLAIN_INTERVAL_S:
            told_at = time.monotonic()
            print(_describe(sender), file=sys.stderr, flush=True)

    return show


def _describe(sender: Sender) -> str:
    return f"{sender.in_flight} in flight  {_summary(sender)}"
