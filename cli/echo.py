"""`sagellm echo`: the pipeline as it would run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import pipeline_arguments, read_pipeline

if TYPE_CHECKING:
    from pathlib import Path


@click.command("echo")
@pipeline_arguments
@click.option("--defaults", is_flag=True, help="Also print every field that the file leaves at its default.")
def command(path: Path, overrides: tuple[str, ...], allow_modules: tuple[str, ...], defaults: bool) -> None:
    """Print PIPELINE with vars, environment and --set resolved; the output is a pipeline again."""
    import yaml

    values = read_pipeline(path, overrides, allow_modules).to_dict(defaults=defaults)
    click.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120), nl=False)
