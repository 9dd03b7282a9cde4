"""From a checked pipeline to a flow that can run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from .calls import tell_end
from .flow.flow import Flow
from .flow.ledger import Ledger
from .flow.operator import Operator, OperatorContext
from .flow.resume import ResumeIndex

if TYPE_CHECKING:
    from ..graph.pipeline import Node, Pipeline
    from .flow.ledger import Settled
    from .services import EngineServices


def assemble(pipeline: Pipeline, services: EngineServices) -> Flow:
    """Make the operators of a pipeline and connect them.

    Raises:
        ConfigError: sequences, which own KV blocks, are to be copied to several edges.
    """
    ledger = Ledger()
    ledger.on_settled(lambda settled: services.release([request for request, _ in settled]))
    resume = ResumeIndex(pipeline.edges)
    drains: list[Any] = []
    factories = {}
    for node in pipeline.nodes.values():
        wired = frozenset(edge.source_port for edge in pipeline.edges if edge.source == node.name)
        context = OperatorContext(
            node.name, services, ledger, pipeline.base_dir, lambda reason: drains[0](reason), resume, wired
        )
        factories[node.name] = partial(_make, node, context)
    flow = Flow(factories, pipeline.edges, ledger, pipeline.max_error_ratio, services.cancel, services.let_go)
    drains.append(flow.drain)
    ledger.on_ended(partial(_tell_callers, flow, services))
    return flow


def _tell_callers(flow: Flow, services: EngineServices, ended: Settled) -> None:
    """Of requests that end without a record at the reply_sink, such as those that a stage has dropped."""
    if flow.has_ended:
        return  # whoever ended it says why
    for request, outcome in ended:
        tell_end(request, None, outcome)
    services.calls.forget(ended)


def _make(node: Node, context: OperatorContext) -> Operator[Any]:
    return cast("Operator[Any]", node.spec.factory(node.config, context))
