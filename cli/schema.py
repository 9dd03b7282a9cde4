"""`sagellm schema`: the JSON Schema of pipeline files."""

from __future__ import annotations

import json

import click

from .common import allow_module, register_operators


@click.command("schema")
@allow_module
def command(allow_modules: tuple[str, ...]) -> None:
    """Print the JSON Schema of a pipeline, with the fields of every operator type that is installed."""
    register_operators(allow_modules)
    from ..graph.registry import all_specs, load_plugins
    from ..graph.schema import pipeline_schema

    load_plugins()
    click.echo(json.dumps(pipeline_schema(all_specs()), indent=2, ensure_ascii=False))
