"""`sage llm ...` is `sagellm ...`: SAGE finds this through the entry-point group `sage.cli.plugins`.

SAGE imports it for each of its own commands, none of which works if that fails: so what it needs is imported at use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `llm`, which leaves every argument behind it to sagellm."""
    parser = subparsers.add_parser(
        "llm",
        help="Run sageLLM's pipelines: what `sagellm` does",
        add_help=False,
        prefix_chars="\0",  # no argument is an option of this parser
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(_handler=_run)


def _run(parsed: argparse.Namespace) -> Any:
    from .main import cli

    return cli(parsed.arguments, prog_name="sage llm")
