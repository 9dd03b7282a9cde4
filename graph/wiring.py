"""Edges as they are written, `a -> b.left -> c`, made into ends with ports."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..config.wording import did_you_mean, nearest, show
from .pipeline import Edge
from .registry import find_spec

if TYPE_CHECKING:
    from .document import KeyPath
    from .operator_spec import OperatorSpec, Port
    from .problems import Problems

_END = re.compile(r"(?P<node>[A-Za-z_][A-Za-z0-9_-]*)(?:\.(?P<port>[A-Za-z_][A-Za-z0-9_-]*))?")
_EVERY_ERROR = "*.error"


@dataclass(frozen=True, slots=True)
class End:
    """One name in a chain, where it stands, and the ports it means as a target and as a source."""

    node: str
    path: KeyPath
    offset: int
    target_port: str | None = None
    source_port: str | None = None


@dataclass(frozen=True, slots=True)
class Wire:
    """An edge and the ends it was written with; problems with the edge point there."""

    edge: Edge
    source: End
    target: End


@dataclass(slots=True)
class Wiring:
    """All chains read. What could not be read leaves gaps, which later checks must not report again.

    `used` holds the ports that were named, as (node, port), even where the other end is unreadable. `unsure` are the
    nodes with an unreadable end; without `complete` nothing is known about nodes that seem to have no edge.
    """

    wires: list[Wire] = field(default_factory=list)
    used_inputs: set[tuple[str, str]] = field(default_factory=set)
    used_outputs: set[tuple[str, str]] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)
    complete: bool = True


def read_edges(
    written: Any, specs: dict[str, OperatorSpec | None], on_error: dict[str, Any], problems: Problems
) -> Wiring:
    """The edges of all chains; what cannot be one is noted. `specs` holds None for operators of unknown type.

    A chain that begins with `*.error` stands for every error port that no other chain names, of the operators whose
    `on_error` is `route`; what lies downstream of that chain is left out, as it would close a cycle.
    """
    reader = _Reader(specs, problems)
    if not isinstance(written, list) or not written:
        found = "no edges" if not written else f"found {show(written)}"
        problems.add(("edges",), f"{found}; write a list of chains under `edges:`: `- source -> stage -> sink`")
        reader.wiring.complete = False
        return reader.wiring
    for index, chain in enumerate(written):
        reader.read_chain(chain, ("edges", index))
    for end in reader.wildcards:
        reader.expand(*end, {name for name in specs if on_error.get(name) in ("drop", "fail")})
    return reader.wiring


class _Reader:
    def __init__(self, specs: dict[str, OperatorSpec | None], problems: Problems) -> None:
        self.specs = specs
        self.problems = problems
        self.wiring = Wiring()
        self.wildcards: list[tuple[KeyPath, int, End | None]] = []  # where `*.error` stands, and where it leads
        self._edges: set[Edge] = set()

    def read_chain(self, chain: Any, path: KeyPath) -> None:
        parts = chain.split("->") if isinstance(chain, str) else []
        if len(parts) < 2:
            self.problems.add(path, f"found {show(chain)}; write a chain with arrows: `a -> b -> c`")
            self.wiring.complete = False
            return
        ends: list[End | None] = []
        offset = 0
        for index, part in enumerate(parts):
            at = offset + len(part) - len(part.lstrip())
            if index == 0 and part.strip() == _EVERY_ERROR:
                ends.append(None)
            else:
                ends.append(self._read_end(part.strip(), path, at, index > 0, index < len(parts) - 1))
            offset += len(part) + 2
        if parts[0].strip() == _EVERY_ERROR:
            self.wildcards.append((path, len(parts[0]) - len(parts[0].lstrip()), ends[1]))
        for source, target in pairwise(ends):
            if source and target and source.source_port and target.target_port:
                edge = Edge(source.node, source.source_port, target.node, target.target_port)
                if edge in self._edges:
                    self.problems.add(path, f"the edge {edge} is given twice; remove one", offset=source.offset)
                    continue
                self._edges.add(edge)
                self.wiring.wires.append(Wire(edge, source, target))

    def _read_end(self, text: str, path: KeyPath, offset: int, is_target: bool, is_source: bool) -> End | None:
        match = _END.fullmatch(text)
        name, port = (match["node"], match["port"]) if match else (text, None)
        if match is None or name not in self.specs:
            self.wiring.complete = False
            if find_spec(name) and nearest(name, [other for other, spec in self.specs.items() if spec is None]):
                return None  # meant is that one, whose type is misspelt: it has been told
            message = f"found {text!r} between arrows; write an operator's name or `name.port`"
            if text.startswith("*"):
                message = f"found {text!r}; only `{_EVERY_ERROR}` stands for several ports, at the beginning of a chain"
            if match is not None:
                advice = f"; add `{name}:` there" if find_spec(name) else did_you_mean(name, self.specs)
                message = f"no operator {name!r} under operators{advice}"
            self.problems.add(path, message, offset=offset)
            return None
        spec = self.specs[name]
        if spec is None:
            return None
        try:
            target_port, source_port = _choose_ports(name, port, spec, is_target, is_source)
        except ValueError as error:
            self.problems.add(path, str(error), offset=offset)
            self.wiring.unsure.add(name)
            return None
        if target_port:
            self.wiring.used_inputs.add((name, target_port))
        if source_port:
            self.wiring.used_outputs.add((name, source_port))
        return End(name, path, offset, target_port, source_port)

    def expand(self, path: KeyPath, offset: int, target: End | None, without: set[str]) -> None:
        """Wire every error port that is left to `target` (None: it is unreadable, and nothing more is said of them)."""
        downstream = self._downstream_of(target.node) if target else set()
        found = [
            name
            for name, spec in self.specs.items()
            if spec is not None and spec.output("error") is not None and name not in downstream | without
            if (name, "error") not in self.wiring.used_outputs
        ]
        if not found and None not in self.specs.values():
            self.problems.add(path, f"no error port is left for `{_EVERY_ERROR}`; remove this chain", offset=offset)
        for name in found:
            self.wiring.used_outputs.add((name, "error"))
            if target is not None and target.target_port is not None:
                edge = Edge(name, "error", target.node, target.target_port)
                self.wiring.wires.append(Wire(edge, End(name, path, offset, None, "error"), target))

    def _downstream_of(self, node: str) -> set[str]:
        reached, stack = {node}, [node]
        while stack:
            at = stack.pop()
            following = {wire.edge.target for wire in self.wiring.wires if wire.edge.source == at} - reached
            reached |= following
            stack += following
        return reached


def _choose_ports(
    name: str, port: str | None, spec: OperatorSpec, is_target: bool, is_source: bool
) -> tuple[str | None, str | None]:
    """The (input, output) ports that an end of a chain means, None on the side it does not have."""
    title = spec.title(name)
    if is_target and spec.is_source:
        raise ValueError(f"{title} is a source and takes no input; begin the chain with it")
    if is_source and not spec.outputs:
        raise ValueError(f"{title} is a sink and gives nothing; end the chain with it")
    names_input = is_target and port is not None and spec.input(port) is not None
    names_output = is_source and port is not None and spec.output(port) is not None
    if port is not None and names_input and names_output:
        raise ValueError(f"{port!r} is both an input and an output of {name!r}; write two chains, one that ends there")
    if port is not None and not names_input and not names_output:
        ports = [p.name for p in ((*spec.inputs,) if is_target else ()) + ((*spec.outputs,) if is_source else ())]
        side = "input or output" if is_target and is_source else "input" if is_target else "output"
        raise ValueError(f"{title} has no {side} port {port!r}{did_you_mean(port, ports)}")
    target_port = source_port = None
    if is_target:
        target_port = port if names_input else _default(spec.inputs, "in")
        if target_port is None:
            names = " or ".join(f"{name}.{p.name}" for p in spec.inputs)
            raise ValueError(f"{title} has several inputs; write {names}")
    if is_source:
        source_port = port if names_output else _default(tuple(p for p in spec.outputs if p.name != "error"), "out")
        if source_port is None:
            names = " or ".join(f"{name}.{p.name}" for p in spec.outputs)
            why = "is a sink" if spec.is_sink else "has several outputs"
            raise ValueError(f"{title} {why}; write {names}")
    return target_port, source_port


def _default(ports: tuple[Port, ...], usual: str) -> str | None:
    names = [port.name for port in ports]
    if usual in names:
        return usual
    return names[0] if len(names) == 1 else None
