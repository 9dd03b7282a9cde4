"""From a checked pipeline to a flow that can run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..errors import ConfigError
from .flow.flow import Flow
from .flow.ledger import Ledger
from .flow.operator import Operator, OperatorContext
from .flow.resume import ResumeIndex

if TYPE_CHECKING:
    from ..graph.pipeline import Node, Pipeline
    from .services import EngineServices


def assemble(pipeline: Pipeline, services: EngineServices) -> Flow:
    """Make the operators of a pipeline and connect them.

    Raises:
        ConfigError: two stages want the same door of the one worker.
    """
    for door in ("schedule", "prefill", "decode"):
        names = [node.name for node in pipeline.nodes.values() if node.spec.name == door]
        if len(names) > 1:
            raise ConfigError(f"{' and '.join(names)}: a pipeline has one worker, and so one {door} stage; merge them")
    ledger = Ledger()
    ledger.on_settled(lambda settled: services.release([request for request, _ in settled]))
    resume = ResumeIndex()
    drains: list[Any] = []
    factories = {}
    for node in pipeline.nodes.values():
        context = OperatorContext(
            node.name, services, ledger, pipeline.base_dir, lambda reason: drains[0](reason), resume
        )
        factories[node.name] = partial(_make, node, context)
    flow = Flow(factories, pipeline.edges, ledger, pipeline.max_error_ratio)
    drains.append(flow.drain)
    return flow


def _make(node: Node, context: OperatorContext) -> Operator[Any]:
    return cast("Operator[Any]", node.spec.factory(node.config, context))
