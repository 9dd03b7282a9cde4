"""The checks of a wired graph: connected, acyclic, every edge carries what its target takes, no stage missing."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .operator_spec import ANY_KIND, RecordKind
from .registry import all_specs

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from .document import KeyPath
    from .operator_spec import OperatorSpec, Port
    from .pipeline import Edge
    from .problems import Problems
    from .wiring import Wire, Wiring

_NO_SEQUENCES = frozenset({RecordKind.DEAD_LETTER, RecordKind.KV_EVENT})


@dataclass(frozen=True, slots=True)
class Draft:
    """A wired graph before it is known to be sound.

    `specs` lacks the operators of unknown type (then `all_known` is false), `configs` those whose fields are wrong;
    `on_error` is known for those too.
    """

    specs: dict[str, OperatorSpec]
    configs: dict[str, Any]
    on_error: dict[str, Any]
    wiring: Wiring
    all_known: bool


@runtime_checkable
class ListensOn(Protocol):
    """A configuration of what listens; `port` 0 is any free one."""

    host: str
    port: int


@runtime_checkable
class JudgesRecords(Protocol):
    """A configuration that names fields of the records which arrive."""

    def explain_misfits(self, kinds: frozenset[RecordKind]) -> Iterable[tuple[KeyPath, str]]:
        """What no record of these kinds can meet: where it stands in the configuration, and why."""
        ...


def check_graph(draft: Draft, base_dir: Path, problems: Problems) -> list[Edge]:
    """Note every problem of the graph. Returns its edges with the record kinds they carry."""
    if draft.all_known:
        _check_both_ends(draft, problems)
    if draft.wiring.complete:
        _check_connected(draft, problems)
    forward = _check_cycles(draft, problems)
    _check_writers(draft, base_dir, problems)
    _check_listeners(draft, problems)
    order = _topological(draft, forward)
    kinds = _check_kinds(draft, forward, order, problems)
    _check_stages(draft, forward, order, kinds, problems)
    _check_late_stages(draft, forward, order, kinds, problems)
    _check_single(draft, problems)
    if draft.all_known and draft.wiring.complete and not draft.wiring.unsure:
        _check_answered(draft, problems)
    _check_copies(draft, kinds, problems)
    _check_fields(draft, kinds, problems)
    return [replace(wire.edge, kinds=kinds.get(wire.edge, frozenset())) for wire in draft.wiring.wires]


def _check_both_ends(draft: Draft, problems: Problems) -> None:
    if draft.specs and not any(spec.is_source for spec in draft.specs.values()):
        problems.add(("operators",), f"no source; add one of: {_known(lambda s: s.is_source)}", at_key=True)
    if draft.specs and not any(spec.is_sink for spec in draft.specs.values()):
        problems.add(("operators",), f"no sink; add one of: {_known(lambda s: s.is_sink)}", at_key=True)


def _check_listeners(draft: Draft, problems: Problems) -> None:
    """No address has two listeners."""
    first: dict[tuple[str, int], str] = {}
    for name, config in draft.configs.items():
        if not draft.specs[name].is_source or not isinstance(config, ListensOn) or config.port == 0:
            continue
        before = first.setdefault((config.host, config.port), name)
        if before != name:
            text = f"{name!r} listens on {config.host}:{config.port}, where {before!r} listens too; "
            problems.add(("operators", name, "port"), text + "give each its own port")


def _check_connected(draft: Draft, problems: Problems) -> None:
    used_in, used_out = draft.wiring.used_inputs, draft.wiring.used_outputs
    connected = {name for name, _ in used_out | used_in}
    for name, spec in draft.specs.items():
        if name in draft.wiring.unsure:
            continue
        path = ("operators", name)
        if name not in connected:
            how = ("" if spec.is_source else "... -> ") + name + ("" if spec.is_sink else " -> ...")
            text = f"operator {name!r} is not connected; write `{how}` under edges, or remove it"
            problems.add(path, text, at_key=True)
            continue
        for port in spec.inputs:
            if (name, port.name) not in used_in and not port.optional:
                problems.add(path, f"nothing enters {name}.{port.name}; write `... -> {name}.{port.name}`", at_key=True)
        for port in spec.outputs:
            if (name, port.name) not in used_out:
                _note_unwired(name, port, draft, problems)


def _note_unwired(name: str, port: Port, draft: Draft, problems: Problems) -> None:
    if port.optional:
        for setting in draft.configs[name].changed(port.setting) if port.setting and name in draft.configs else ():
            text = f"{setting} is for what {name}.{port.name} gives, but that goes nowhere; write "
            text += f"`{name}.{port.name} -> ...` under edges, or leave {setting} out"
            problems.add(("operators", name, setting), text, at_key=True)
    elif port.name != "error":
        text = f"what {name}.{port.name} gives goes nowhere; write `{name}.{port.name} -> ...` under edges"
        problems.add(("operators", name), text, at_key=True)
    elif draft.on_error.get(name) == "route":
        text = f"the error port of {name!r} is not wired; write `{name}.error -> <a sink>` under edges, or "
        text += f'`on_error: drop` or `on_error: fail` at {name!r}; `"*.error -> <a sink>"` wires all that are left'
        problems.add(("operators", name), text, at_key=True)


def _known(wanted: Any) -> str:
    return ", ".join(name for name, spec in all_specs().items() if wanted(spec)) or "(none is registered)"


def _check_cycles(draft: Draft, problems: Problems) -> list[Wire]:
    """Name every cycle; returns the wires without those that close one."""
    outgoing: dict[str, list[Wire]] = {name: [] for name in draft.specs}
    for wire in draft.wiring.wires:
        outgoing[wire.edge.source].append(wire)
    closing: list[Wire] = []
    done: set[str] = set()
    for start in draft.specs:
        path: list[str] = []
        on_path: set[str] = set()
        stack: list[tuple[str, int]] = [(start, 0)] if start not in done else []
        while stack:
            name, index = stack.pop()
            if index == 0:
                path.append(name)
                on_path.add(name)
            if index == len(outgoing[name]):
                path.pop()
                on_path.discard(name)
                done.add(name)
                continue
            stack.append((name, index + 1))
            wire = outgoing[name][index]
            target = wire.edge.target
            if target in on_path:
                closing.append(wire)
                cycle = " -> ".join([*path[path.index(target) :], target])
                text = f"cycle {cycle}; a pipeline is a DAG: remove one of these edges"
                problems.add(wire.target.path, text, offset=wire.target.offset)
            elif target not in done:
                stack.append((target, 0))
    return [wire for wire in draft.wiring.wires if wire not in closing]


def _topological(draft: Draft, wires: list[Wire]) -> list[str]:
    waiting = dict.fromkeys(draft.specs, 0)
    for wire in wires:
        waiting[wire.edge.target] += 1
    ready = deque(name for name, count in waiting.items() if count == 0)
    order = []
    while ready:
        name = ready.popleft()
        order.append(name)
        for wire in wires:
            if wire.edge.source == name:
                waiting[wire.edge.target] -= 1
                if waiting[wire.edge.target] == 0:
                    ready.append(wire.edge.target)
    return order


def _check_writers(draft: Draft, base_dir: Path, problems: Problems) -> None:
    """No file has two writers, and none that is read is written."""
    writers: dict[str, str] = {}
    for name, config in draft.configs.items():
        field = draft.specs[name].writes
        value = getattr(config, field, None) if field else None
        if field is None or value is None:
            continue
        target = os.path.realpath(base_dir / value)
        if target in writers:
            text = f"{name!r} writes {str(value)!r}, which {writers[target]!r} writes too; give each its own file"
            problems.add(("operators", name, field), text)
        writers.setdefault(target, name)
    for name, config in draft.configs.items():
        value = getattr(config, draft.specs[name].reads or "", None)
        target = "" if value is None else os.path.realpath(base_dir / value)
        if target in writers:
            field = str(draft.specs[writers[target]].writes)
            text = f"{writers[target]!r} writes {str(value)!r}, which {name!r} reads; name another file"
            problems.add(("operators", writers[target], field), text)


def _check_kinds(
    draft: Draft, wires: list[Wire], order: list[str], problems: Problems
) -> dict[Edge, frozenset[RecordKind]]:
    """The kinds each edge carries; a port with `same_as` gives what arrives, unknown behind an unknown operator."""
    carried: dict[Edge, frozenset[RecordKind]] = {}
    arriving: dict[tuple[str, str], frozenset[RecordKind]] = {}
    for name in order:
        spec = draft.specs[name]
        for wire in wires:
            if wire.edge.source != name:
                continue
            output = spec.output(wire.edge.source_port)
            taken = draft.specs[wire.edge.target].input(wire.edge.target_port)
            if output is None or taken is None:
                continue
            given = output.kinds
            if output.same_as is not None:
                if (name, output.same_as) not in arriving:
                    continue
                given &= arriving[name, output.same_as]
            carried[wire.edge] = given
            if not given <= taken.kinds:
                _note_mismatch(wire, given, taken.kinds, draft, problems)
            key = (wire.edge.target, wire.edge.target_port)
            arriving[key] = arriving.get(key, frozenset()) | (given & taken.kinds)
    return carried


def _note_mismatch(
    wire: Wire, given: frozenset[RecordKind], taken: frozenset[RecordKind], draft: Draft, problems: Problems
) -> None:
    converters = [
        name
        for name, spec in all_specs().items()
        if any(given <= port.kinds and port.kinds != ANY_KIND for port in spec.inputs)
        and any(p.kinds <= taken and p.name != "error" and not p.same_as for p in spec.outputs)
    ]
    edge = wire.edge
    advice = f"put {' or '.join(repr(c) for c in converters)} between them" if converters else "wire it elsewhere"
    if given & taken and not converters:
        advice = f"let {wire.edge.target}.{wire.edge.target_port} take {words(given - taken)} too, or wire it elsewhere"
    problems.add(
        wire.target.path,
        f"{edge.source}.{edge.source_port} gives {words(given)}, but {edge.target}.{edge.target_port} "
        f"takes {words(taken)}; {advice}",
        offset=wire.target.offset,
    )


def _check_stages(
    draft: Draft,
    wires: list[Wire],
    order: list[str],
    kinds: dict[Edge, frozenset[RecordKind]],
    problems: Problems,
) -> None:
    """Must-analysis: a fact holds at an operator when it was provided on every path that leads there."""
    facts: dict[str, frozenset[str] | None] = {}
    for name in order:
        spec = draft.specs[name]
        held: frozenset[str] | None = frozenset() if spec.is_source else None
        without: dict[str, str] = {}
        for wire in wires:
            if wire.edge.target != name or kinds.get(wire.edge, ANY_KIND) <= _NO_SEQUENCES:
                continue
            before = facts.get(wire.edge.source)
            if before is None:
                continue
            for fact in spec.requires - before:
                without.setdefault(fact, wire.edge.source)
            held = before if held is None else held & before
        for fact in sorted(without):
            givers = [n for n, s in all_specs().items() if fact in s.provides]
            here = [n for n, s in draft.specs.items() if fact in s.provides]
            stage = " or ".join(repr(n) for n in here or givers) or "an operator that provides it"
            problems.add(
                ("operators", name),
                f"{spec.title(name)} needs records that are {fact!r}, but those from {without[fact]!r} are not: "
                f"a stage is missing; put {stage} upstream of {name!r}",
                at_key=True,
            )
        # what is missing is reported once, not again at every stage downstream
        facts[name] = None if held is None else held | spec.provides | frozenset(without)


def _check_late_stages(
    draft: Draft,
    wires: list[Wire],
    order: list[str],
    kinds: dict[Edge, frozenset[RecordKind]],
    problems: Problems,
) -> None:
    """May-analysis: no stage stands behind one that it must precede."""
    givers: dict[str, dict[str, str]] = {}
    for name in order:
        spec = draft.specs[name]
        given = givers[name] = {}
        for wire in wires:
            if wire.edge.target == name and not kinds.get(wire.edge, ANY_KIND) <= _NO_SEQUENCES:
                given.update(givers[wire.edge.source])
        for fact in sorted(spec.precedes & given.keys()):
            text = f"{spec.title(name)} comes too late: its records are {fact!r} already, by {given[fact]!r}; "
            problems.add(("operators", name), text + f"put it upstream of {given[fact]!r}", at_key=True)
        given.update(dict.fromkeys(spec.provides, name))


def _check_single(draft: Draft, problems: Problems) -> None:
    first: dict[str, str] = {}
    for name, spec in draft.specs.items():
        if spec.single and first.setdefault(spec.name, name) != name:
            text = f"{name!r} is a second {spec.name!r} beside {first[spec.name]!r}; a pipeline has one worker, and so "
            problems.add(("operators", name), text + f"one {spec.name!r} stage: merge the two", at_key=True)


def _check_answered(draft: Draft, problems: Problems) -> None:
    for name, spec in draft.specs.items():
        wanted = spec.answered_by
        if wanted is not None and wanted not in {draft.specs[each].name for each in _downstream_of(name, draft)}:
            text = f"nobody answers the calls of {spec.title(name)}: results must reach a {wanted!r}; write "
            text += f"`reply: {{type: {wanted}}}` under operators and `... -> reply` under edges"
            problems.add(("operators", name), text, at_key=True)


def _downstream_of(name: str, draft: Draft) -> set[str]:
    """What results reach that are no errors."""
    reached: set[str] = set()
    stack = [name]
    while stack:
        at = stack.pop()
        edges = [wire.edge for wire in draft.wiring.wires if wire.edge.source == at]
        following = {edge.target for edge in edges if edge.source_port != "error"} - reached
        reached |= following
        stack += following
    return reached


def _check_copies(draft: Draft, kinds: dict[Edge, frozenset[RecordKind]], problems: Problems) -> None:
    """Sequences, which own KV blocks, go one way."""
    first: dict[tuple[str, str], Edge] = {}
    for wire in draft.wiring.wires:
        edge = wire.edge
        before = first.setdefault((edge.source, edge.source_port), edge)
        if before is not edge and RecordKind.SEQUENCE in kinds.get(edge, frozenset()):
            text = f"{edge.source}.{edge.source_port} gives sequences, which cannot be copied, and goes to "
            text += f"{before.target!r} already; leave one edge, or branch where requests or completions flow"
            problems.add(wire.target.path, text, offset=wire.target.offset)


def _check_fields(draft: Draft, kinds: dict[Edge, frozenset[RecordKind]], problems: Problems) -> None:
    for name, config in draft.configs.items():
        arriving = frozenset[RecordKind]().union(*(carried for edge, carried in kinds.items() if edge.target == name))
        if arriving and isinstance(config, JudgesRecords):
            for path, why in config.explain_misfits(arriving):
                field = ".".join(map(str, path))
                text = f"operator {draft.specs[name].title(name)}, field {field!r}: {why}"
                problems.add(("operators", name, *path), text)


def words(kinds: frozenset[RecordKind]) -> str:
    """Record kinds for a reader: `request or sequence`, `any record`."""
    return "any record" if kinds == ANY_KIND else " or ".join(kind for kind in RecordKind if kind in kinds)
