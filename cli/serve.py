"""`sagellm serve`: run a pipeline with an http_source, with what is usually changed as flags."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ConfigError
from .common import pipeline_options, read_pipeline

if TYPE_CHECKING:
    from ..graph import Pipeline

DEFAULT_PIPELINE = Path(__file__).parent.parent / "pipelines" / "serve.yaml"


@click.command("serve")
@pipeline_options
@click.argument(
    "path", metavar="[PIPELINE]", type=click.Path(path_type=Path), required=False, default=DEFAULT_PIPELINE
)
@click.option("--model", metavar="ID", help="A built-in model, a folder, or an id of the hub.")
@click.option("--host", metavar="ADDRESS", help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), help="Where to listen; 0 takes a free port.")
@click.option("--keys", metavar="FILE", help="A YAML file of bearer keys: without it nobody needs one.")
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary; errors are still told.")
def command(
    path: Path,
    overrides: tuple[str, ...],
    allow_modules: tuple[str, ...],
    model: str | None,
    host: str | None,
    port: int | None,
    keys: str | None,
    quiet: bool,
) -> None:
    """Answer OpenAI's API over HTTP, by PIPELINE, which needs an http_source (default: the packaged serve.yaml).

    The same as `sagellm run PIPELINE`, which has the exit codes. SIGTERM or Ctrl-C finishes what is being computed.
    """
    from .run import run_pipeline

    flags = {"host": host, "port": port, "keys": keys}
    pipeline = read_pipeline(path, overrides, allow_modules)
    source = _find_source(pipeline, path)
    settings = [f"operators.{source}.{name}={value}" for name, value in flags.items() if value is not None]
    if model is not None:
        settings.append(f"engine.model.model_id={model}")
    if settings:
        pipeline = read_pipeline(path, [*overrides, *settings], allow_modules)
    run_pipeline(pipeline, quiet)


def _find_source(pipeline: Pipeline, path: Path) -> str:
    found = [name for name, node in pipeline.nodes.items() if node.spec.name == "http_source"]
    if len(found) != 1:
        which = " and ".join(found) or "none"
        raise ConfigError(f"{path}: serve needs one http_source, found {which}: use `sagellm run` for this pipeline")
    return found[0]
