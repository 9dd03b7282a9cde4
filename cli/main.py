"""The command `sagellm`: a table of verbs, each loaded only when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from .. import __version__
from ..errors import SageLLMError

VERBS = {
    "run": ("run", "Run a pipeline."),
    "serve": ("serve", "Answer OpenAI's API over HTTP."),
    "send": ("send", "Send a file's requests to a pipeline that listens."),
    "validate": ("validate", "Check a pipeline and report every problem."),
    "graph": ("graph", "Draw a pipeline."),
    "operators": ("operators", "List operator types, or describe one."),
    "echo": ("echo", "Print a pipeline with every reference resolved."),
    "schema": ("schema", "Print the JSON Schema of pipelines, for editors."),
    "simulate": ("simulate", "Replay a trace through a pipeline's scheduler in virtual time."),
    "bench": ("bench", "Measure."),
}


class VerbGroup(click.Group):
    """A click group that knows its verbs by table and imports a verb's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"..{VERBS[cmd_name][0]}", __name__).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from ..config.wording import did_you_mean

            ctx.fail(f"no such verb {args[0]!r}{did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SageLLMError as error:
            click.echo(str(error), err=True)
            ctx.exit(error.exit_code)


@click.group(
    cls=VerbGroup, subcommand_metavar="VERB [ARGS]...", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="sagellm")
def cli() -> None:
    """sageLLM: LLM inference as a dataflow, written in YAML."""


def main() -> None:
    """The entry point of the console script."""
    cli(prog_name="sagellm")
