"""What the verbs share: how a pipeline is named on the command line, and how it is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..graph import Pipeline

allow_module = click.option(
    "--allow-module",
    "allow_modules",
    multiple=True,
    metavar="MODULE",
    help="Import this Python module, which registers operators. Repeatable.",
)


def pipeline_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments `path`, `overrides` and `allow_modules` of a verb that works on one pipeline."""
    command = allow_module(command)
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set a var (input=x.jsonl) or any key (engine.scheduler.max_batch_size=8). Repeatable.",
    )(command)
    return click.argument("path", metavar="PIPELINE", type=click.Path(path_type=Path))(command)


def register_operators(allow_modules: Sequence[str]) -> None:
    """Register the built-in operators and those of the allowed modules, which may lie in the current directory.

    Raises:
        ConfigError: a module cannot be imported.
    """
    from .. import operators  # noqa: F401  (registers on import)
    from ..graph.registry import load_modules

    if allow_modules:
        sys.path.append(str(Path.cwd()))
        load_modules(allow_modules)


def read_pipeline(path: Path, overrides: Sequence[str], allow_modules: Sequence[str]) -> Pipeline:
    """The checked pipeline of a command line.

    Raises:
        ConfigError: an allowed module cannot be imported.
        PipelineError: something in the file or in `--set` is wrong.
    """
    register_operators(allow_modules)
    from ..graph import load_pipeline

    return load_pipeline(path, overrides)
