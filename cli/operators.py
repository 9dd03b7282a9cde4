"""`sagellm operators`: what a pipeline can be made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import allow_module, register_operators

if TYPE_CHECKING:
    from ..graph.operator_spec import OperatorSpec, Port


@click.command("operators")
@click.argument("name", required=False)
@allow_module
def command(name: str | None, allow_modules: tuple[str, ...]) -> None:
    """List the operator types, or describe NAME: its fields, ports, guarantee and an example."""
    register_operators(allow_modules)
    from ..config.wording import did_you_mean
    from ..graph.registry import all_specs, find_spec, load_plugins

    load_plugins()
    specs = all_specs()
    if name is None:
        width = max(map(len, specs), default=0)
        for spec in specs.values():
            click.echo(f"{spec.name:<{width}}  {spec.summary}")
        return
    known = find_spec(name)
    if known is None:
        raise click.UsageError(f"no operator type {name!r}{did_you_mean(name, specs)}")
    click.echo("\n".join(describe(known)))


def describe(spec: OperatorSpec) -> list[str]:
    """The lines that explain one operator type."""
    lines = [f"{spec.name}: {spec.summary}", "", f"Guarantee: {spec.guarantee or 'none stated'}"]
    lines += _ports("Inputs", spec.inputs) + _ports("Outputs", spec.outputs)
    if spec.requires:
        lines.append(f"Needs records that are: {', '.join(sorted(spec.requires))}")
    if spec.provides:
        lines.append(f"Makes records: {', '.join(sorted(spec.provides))}")
    if spec.precedes:
        lines.append(f"Comes before they are: {', '.join(sorted(spec.precedes))}")
    if spec.answered_by:
        lines.append(f"Needs downstream: {spec.answered_by}")
    if spec.single:
        lines.append("Once in a pipeline.")
    lines += _fields(spec)
    if spec.example:
        lines += ["", "Example:", *(f"  {line}" for line in spec.example.strip("\n").splitlines())]
    return lines


def _ports(title: str, ports: tuple[Port, ...]) -> list[str]:
    from ..graph.checks import words

    if not ports:
        return []
    lines = ["", f"{title}:"]
    for port in ports:
        kinds = f"what arrives at {port.same_as!r}" if port.same_as else words(port.kinds)
        lines.append(f"  {port.name:<8} {kinds}{' (optional)' if port.optional else ''}")
    return lines


def _fields(spec: OperatorSpec) -> list[str]:
    import json

    from ..config.wording import describe_type

    schema = spec.config_model.model_json_schema()
    required = schema.get("required", [])
    lines = ["", "Fields:"]
    for name, rule in schema.get("properties", {}).items():
        given = "required" if name in required else ""
        if "default" in rule:
            given = f"default {json.dumps(rule['default'])}"
        words = describe_type(rule, schema.get("$defs", {}))
        lines.append(f"  {name}: {words}{f' ({given})' if given else ''}")
        if "description" in rule:
            lines.append(f"      {rule['description']}")
    return lines
