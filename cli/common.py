"""What the verbs share: how a pipeline is named on the command line, and how it is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from ..graph import Pipeline

allow_module = click.option(
    "--allow-module",
    "allow_modules",
    multiple=True,
    metavar="MODULE",
    help="Import this Python module, which registers operators. Repeatable.",
)


def _check_settings(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    for text in given:
        key, equals, _ = text.partition("=")
        if not equals or not all(key.strip().split(".")):
            example = "write key=value, as in --set input=x.jsonl or --set operators.decode.buffer=64"
            raise click.BadParameter(f"{text!r}: {example}")
    return given


def check_known(option: str, what: str, given: Iterable[str], known: Collection[str]) -> None:
    """Whether there is everything that an option names.

    Raises:
        click.BadParameter: there is not; the message names what there is.
    """
    for name in given:
        if name not in known:
            raise click.BadParameter(f"no {what} {name!r}; there is: {', '.join(known)}", param_hint=option)


def pipeline_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments `path`, `overrides` and `allow_modules` of a verb that works on one pipeline."""
    command = pipeline_options(command)
    return click.argument("path", metavar="PIPELINE", type=click.Path(path_type=Path))(command)


def pipeline_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments `overrides` and `allow_modules`."""
    command = allow_module(command)
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_check_settings,
        help="Set a var (input=x.jsonl) or any key (engine.scheduler.max_batch_size=8). Repeatable.",
    )(command)


def register_operators(allow_modules: Sequence[str]) -> None:
    """Register the built-in operators and those of the allowed modules, which may lie in the current directory.

    Raises:
        click.UsageError: a module cannot be imported.
    """
    from .. import operators  # noqa: F401  (registers on import)
    from ..graph.registry import load_modules

    if allow_modules:
        sys.path.append(str(Path.cwd()))
        try:
            load_modules(allow_modules)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error


def read_pipeline(path: Path, overrides: Sequence[str], allow_modules: Sequence[str]) -> Pipeline:
    """The checked pipeline of a command line.

    Raises:
        click.UsageError: an allowed module cannot be imported.
        PipelineError: something in the file or in `--set` is wrong.
    """
    register_operators(allow_modules)
    from ..graph import load_pipeline

    return load_pipeline(path, overrides)
