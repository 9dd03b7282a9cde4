"""`sagellm validate`: check a pipeline without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import pipeline_arguments, read_pipeline

if TYPE_CHECKING:
    from pathlib import Path


@click.command("validate")
@pipeline_arguments
def command(path: Path, overrides: tuple[str, ...], allow_modules: tuple[str, ...]) -> None:
    """Check PIPELINE and report every problem as file:line:col. Exit code 78 when there is one."""
    pipeline = read_pipeline(path, overrides, allow_modules)
    click.echo(f"{path}: {pipeline.name!r} is valid: {len(pipeline.nodes)} operators, {len(pipeline.edges)} edges")
