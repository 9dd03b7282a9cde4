"""A pipeline drawn with text: one row per operator, top to bottom, side branches on rails at the right.

○ read (jsonl_source)
├─ error ───────────────╮
│ request               │
● tokenize              │
│ sequence              │
◆ write (jsonl_sink)    │
                        │
◆ dead (jsonl_sink) ◀───╯
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .checks import words

if TYPE_CHECKING:
    from .pipeline import Edge, Node, Pipeline

_PLAIN = str.maketrans("○●◆│├─╮┤╯╰◀┼", "o*#|+-.+''<+")
_RAIL_STEP = 3


def draw_text(pipeline: Pipeline, *, unicode: bool = True) -> str:
    """The drawing, one line per row, without colours; `unicode=False` uses ASCII characters only."""
    drawing = _Drawing(pipeline)
    text = "\n".join(drawing.lines())
    return text if unicode else text.translate(_PLAIN)


def reading_order(pipeline: Pipeline) -> list[str]:
    """A topological order that follows each chain as far as it goes, main outputs before error ports."""
    waiting = {name: len(pipeline.edges_into(name)) for name in pipeline.nodes}
    ready = [name for name, count in reversed(list(waiting.items())) if count == 0]
    order = []
    while ready:
        name = ready.pop()
        order.append(name)
        outgoing = sorted(pipeline.edges_from(name), key=lambda edge: edge.source_port == "error")
        freed = []
        for edge in outgoing:
            waiting[edge.target] -= 1
            if waiting[edge.target] == 0:
                freed.append((edge.source_port == "error", edge.target))
        ready += [target for is_error, target in reversed(freed) if not is_error]
        ready[:0] = [target for is_error, target in freed if is_error]
    return order


@dataclass(slots=True)
class _Row:
    text: str
    joins: _Rail | None = None  # a line goes from the text to this rail
    ends: _Rail | None = None  # this rail's arrow comes to the text


@dataclass(slots=True, eq=False)
class _Rail:
    """All edges into one input port that do not come from the operator drawn just above."""

    rows: list[int] = field(default_factory=list)
    column: int = 0


class _Drawing:
    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.rows: list[_Row] = []
        self.rails: dict[tuple[str, str], _Rail] = {}
        order = reading_order(pipeline)
        for index, name in enumerate(order):
            self._add_node(pipeline.nodes[name], order[index + 1] if index + 1 < len(order) else None)
        self._place_rails()

    def _add_node(self, node: Node, following: str | None) -> None:
        rails = {port.name: self.rails.get((node.name, port.name)) for port in node.spec.inputs}
        ending = [(port, rail) for port, rail in rails.items() if rail]
        symbol = "○" if node.spec.is_source else "◆" if node.spec.is_sink else "●"
        title = node.name if node.name == node.spec.name else f"{node.name} ({node.spec.name})"
        named = len(node.spec.inputs) > 1
        for index, (port, rail) in enumerate(ending):
            label = f" {port}" if named else ""
            text = f"{symbol} {title}{label}" if index == 0 else f"│{label}"
            rail.rows.append(len(self.rows))
            self.rows.append(_Row(text, ends=rail))
        if not ending:
            self.rows.append(_Row(f"{symbol} {title}"))
        edges = self.pipeline.edges_from(node.name)
        direct = [edge for edge in edges if edge.target == following]
        for edge in edges:
            if edge in direct:
                continue
            rail = self.rails.setdefault((edge.target, edge.target_port), _Rail())
            rail.rows.append(len(self.rows))
            last = edge is edges[-1] and not direct
            self.rows.append(_Row(f"{'╰' if last else '├'}─ {self._label(edge, named=True)}", joins=rail))
        for edge in direct:
            self.rows.append(_Row(f"│ {self._label(edge, named=edge.source_port != 'out')}"))
        if following is not None and not direct:
            self.rows.append(_Row(""))

    def _label(self, edge: Edge, *, named: bool) -> str:
        if edge.source_port == "error":
            return "error"
        label = words(edge.kinds)
        if named and edge.source_port != "out":
            label = f"{edge.source_port}: {label}"
        if len(self.pipeline.nodes[edge.target].spec.inputs) > 1:
            label += f" to {edge.target_port}"
        return label

    def _place_rails(self) -> None:
        """Short rails inside, long ones outside; two rails share a column only where their rows do not meet."""
        taken: list[list[tuple[int, int]]] = []
        for rail in sorted(self.rails.values(), key=lambda r: (r.rows[-1] - r.rows[0], r.rows[0])):
            first, last = rail.rows[0], rail.rows[-1]
            column = 0
            while column < len(taken) and any(a <= last and first <= b for a, b in taken[column]):
                column += 1
            if column == len(taken):
                taken.append([])
            taken[column].append((first, last))
            rail.column = column

    def lines(self) -> list[str]:
        left = max((len(row.text) for row in self.rows), default=0) + 2
        return [self._line(index, row, left).rstrip() for index, row in enumerate(self.rows)]

    def _line(self, index: int, row: _Row, left: int) -> str:
        width = left + _RAIL_STEP * (1 + max((rail.column for rail in self.rails.values()), default=0))
        cells = list(row.text.ljust(width))
        own = row.joins or row.ends
        end = left + _RAIL_STEP * own.column if own else 0
        if own:
            cells[len(row.text) + 1 : end] = "─" * (end - len(row.text) - 1)
            if row.ends:
                cells[len(row.text) + 1] = "◀"
        for rail in self.rails.values():
            column = left + _RAIL_STEP * rail.column
            if rail is own:
                cells[column] = "╯" if row.ends else "╮" if index == rail.rows[0] else "┤"
            elif rail.rows[0] < index < rail.rows[-1]:
                cells[column] = "┼" if column < end else "│"
        return "".join(cells)
