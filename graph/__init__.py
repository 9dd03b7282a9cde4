"""DECLARE: operators, ports, YAML pipelines and their checks. Nothing here needs torch."""

from __future__ import annotations

from .loader import build_pipeline, load_pipeline
from .pipeline import Edge, Node, Pipeline

__all__ = ["Edge", "Node", "Pipeline", "build_pipeline", "load_pipeline"]
