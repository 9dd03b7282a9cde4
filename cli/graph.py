"""`sagellm graph`: draw a pipeline."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from .common import pipeline_arguments, read_pipeline

if TYPE_CHECKING:
    from pathlib import Path


@click.command("graph")
@pipeline_arguments
@click.option(
    "--format",
    "form",
    type=click.Choice(["ascii", "dot", "mermaid", "json"]),
    default="ascii",
    show_default=True,
    help="A drawing for the terminal, or source for Graphviz, Mermaid or a program.",
)
def command(path: Path, overrides: tuple[str, ...], allow_modules: tuple[str, ...], form: str) -> None:
    """Draw PIPELINE: operators, edges and the kinds of record that travel on them."""
    pipeline = read_pipeline(path, overrides, allow_modules)
    if form == "ascii":
        from ..graph.drawing import draw_text

        click.echo(draw_text(pipeline, unicode="utf" in (sys.stdout.encoding or "").lower()))
        return
    from ..graph import render

    renderers = {"dot": render.render_dot, "mermaid": render.render_mermaid, "json": render.render_json}
    click.echo(renderers[form](pipeline))
