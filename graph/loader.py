"""From YAML (or plain dicts) to a validated Pipeline, with every problem reported at once."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..config import SageLLMConfig
from ..config.wording import did_you_mean, nearest, show
from ..errors import ConfigError, PipelineError
from .checks import Draft, check_graph
from .document import Document, KeyPath, parse_value, read_document
from .engine_checks import check_engine
from .fields import validate_model
from .pipeline import Node, Pipeline
from .problems import Problems
from .registry import FOR_PROGRAMS, all_specs, find_spec, load_plugins
from .substitution import resolve_references
from .wiring import read_edges

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .operator_spec import OperatorSpec

SECTIONS = ("name", "vars", "engine", "operators", "edges", "max_error_ratio")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline file. `overrides` are `--set` texts: `input=x.jsonl`, `operators.decode.buffer=64`.

    The built-in operators must be known (`import sageLLM.operators`). Relative paths in the file start at the
    current directory.

    Raises:
        PipelineError: the file cannot be read, or something in it is wrong; it carries every problem.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PipelineError([f"{path}:1:1: cannot be read: {reason}"]) from error
    return _build(read_document(text, str(path)), overrides, Path.cwd(), Path(path), os.environ)


def build_pipeline(
    data: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    source: str = "pipeline",
    base_dir: str | Path | None = None,
) -> Pipeline:
    """Check a pipeline given as plain values; `engine` may also be a SageLLMConfig. `source` names it in problems.

    Raises:
        PipelineError: something is wrong; it carries every problem.
    """
    copied = {key: _copy(value) for key, value in data.items()}
    return _build(Document(source, copied), overrides, Path(base_dir or Path.cwd()), None, os.environ)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def _build(
    document: Document, overrides: Sequence[str], base_dir: Path, path: Path | None, environment: Mapping[str, str]
) -> Pipeline:
    problems = Problems(document)
    if not isinstance(document.data, dict):
        problems.add((), f"found {show(document.data)}; write a mapping with {', '.join(SECTIONS[:5])}")
        raise problems.error()
    for text in overrides:
        _override(text, document, problems)
    data = resolve_references(document.data, environment, problems)
    for key in data:
        if key not in SECTIONS:
            problems.add((key,), f"unknown section {key!r}{did_you_mean(key, SECTIONS)}", at_key=True)
    if not isinstance(data.get("vars") or {}, dict):
        problems.add(("vars",), f"found {show(data['vars'])}; write a mapping of names to values")
    name = data.get("name", path.stem if path else "pipeline")
    if not isinstance(name, str):
        problems.add(("name",), f"found {show(name)}; write a text")
    ratio = data.get("max_error_ratio")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1):
        problems.add(("max_error_ratio",), f"found {show(ratio)}; write a number from 0 to 1")
    engine = _read_engine(data.get("engine"), problems)
    specs, configs, on_error = _read_operators(data, engine, problems)
    wiring = read_edges(data.get("edges"), specs, on_error, problems)
    known = {node: spec for node, spec in specs.items() if spec is not None}
    edges = check_graph(Draft(known, configs, on_error, wiring, len(known) == len(specs)), base_dir, problems)
    if engine is not None and len(known) == len(specs):
        check_engine(engine, known.values(), problems)
    if len(problems) or engine is None:
        raise problems.error()
    return Pipeline(
        name=str(name),
        engine=engine,
        nodes={node: Node(node, spec, configs[node]) for node, spec in known.items()},
        edges=edges,
        base_dir=base_dir,
        path=path,
        max_error_ratio=None if ratio is None else float(ratio),
        resolved=data,
    )


def _override(text: str, document: Document, problems: Problems) -> None:
    origin = f"--set {text}"
    key, equals, written = text.partition("=")
    path: KeyPath = tuple(key.strip().split("."))

    def refuse(message: str) -> None:
        document.origins[(origin,)] = origin
        problems.add((origin,), message)

    if not equals or not all(path):
        refuse("write key=value, as in --set input=x.jsonl or --set operators.decode.buffer=64")
        return
    try:
        value = parse_value(written) if written else ""
    except yaml.YAMLError:
        refuse(f"{written!r} is not a YAML value; quote it: --set '{key}=\"...\"'")
        return
    variables = document.data.get("vars")
    variables = variables if isinstance(variables, dict) else {}
    operators = document.data.get("operators")
    if len(path) == 1 and path[0] not in SECTIONS:
        if path[0] not in variables:
            refuse(f"no var {key!r} in this pipeline{did_you_mean(key, variables)}")
            return
        path = ("vars", *path)
    elif len(path) == 1 and path[0] in variables:
        path = ("vars", *path)
    elif path[0] not in SECTIONS:
        refuse(f"no section {path[0]!r}{did_you_mean(str(path[0]), SECTIONS)}")
        return
    elif path[0] == "operators" and len(path) > 1 and isinstance(operators, dict) and path[1] not in operators:
        refuse(f"no operator {path[1]!r} in this pipeline{did_you_mean(str(path[1]), operators)}")
        return
    try:
        document.override(path, value, origin)
    except LookupError as error:
        refuse(str(error.args[0]))


def _read_engine(value: Any, problems: Problems) -> SageLLMConfig | None:
    if isinstance(value, SageLLMConfig):
        return value
    if value is None:
        value = {}
    if not isinstance(value, dict):
        problems.add(("engine",), f"found {show(value)}; write a mapping with {', '.join(SageLLMConfig.model_fields)}")
        return None
    given = {key: section for key, section in value.items() if section is not None}
    config: SageLLMConfig | None = validate_model(SageLLMConfig, given, ("engine",), "engine", problems)
    return config


def _read_operators(
    data: dict[str, Any], engine: SageLLMConfig | None, problems: Problems
) -> tuple[dict[str, OperatorSpec | None], dict[str, Any], dict[str, Any]]:
    """The type of each operator (None where it is unknown), the valid configurations, and each `on_error`.

    Validators of an operator's fields find `engine` (None where it is not valid) as `info.context`.
    """
    written = data.get("operators")
    if not isinstance(written, dict) or not written:
        found = f"found {show(written)}" if "operators" in data else "no operators"
        problems.add(("operators",), f"{found}; write a mapping of names to fields under `operators:`")
        return {}, {}, {}
    specs: dict[str, OperatorSpec | None] = {}
    configs: dict[str, Any] = {}
    on_error: dict[str, Any] = {}
    for name, fields in written.items():
        path = ("operators", name)
        specs[name] = None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.add(path, f"operator name {name!r}; write letters, digits, _ and -, without a dot", at_key=True)
            continue
        if not isinstance(fields, (dict, type(None))):
            problems.add(path, f"operator {name!r}: found {show(fields)}; write a mapping of fields, or {{}}")
            continue
        values = dict(fields or {})
        spec = specs[name] = _find_type(name, values.pop("type", name), "type" in (fields or {}), problems)
        if spec is None:
            continue
        config = validate_model(spec.config_model, values, path, f"operator {spec.title(name)}", problems, engine)
        if config is not None:
            configs[name] = config
        default = spec.config_model.model_fields.get("on_error")
        on_error[name] = values.get("on_error", default.default if default else None)
    return specs, configs, on_error


def _find_type(name: str, type_name: Any, is_given: bool, problems: Problems) -> OperatorSpec | None:
    path: KeyPath = ("operators", name, "type") if is_given else ("operators", name)
    if not isinstance(type_name, str):
        problems.add(path, f"operator {name!r}: found {show(type_name)} as its type{did_you_mean('', all_specs())}")
        return None
    spec = find_spec(type_name)
    if spec is None:
        try:
            load_plugins()
        except ConfigError as error:
            problems.add(path, str(error))
        spec = find_spec(type_name)
    if spec is not None:
        if spec.name in FOR_PROGRAMS and problems.document.is_file:
            ends = [end for end, s in all_specs().items() if (s.is_source if spec.is_source else s.is_sink)]
            text = f"{spec.title(name)} is for programs: use SageLLMEngine, or write one of: {', '.join(ends)}"
            problems.add(path, text, at_key=not is_given)
        return spec
    if "." in type_name or ":" in type_name:
        module = re.split(r"[:.][^:.]*$", type_name)[0]
        problems.add(
            path,
            f"found {type_name!r} as a type: a pipeline cannot import code; register the class with @operator(...), "
            f"write the registered name here, and add --allow-module {module} to the command",
        )
        return None
    hint = ""
    if nearest(type_name, all_specs()) is None:
        hint = "; if it is your own, add --allow-module <its module>" + ("" if is_given else ", or name its `type:`")
    problems.add(
        path, f"no operator type {type_name!r}{did_you_mean(type_name, all_specs())}{hint}", at_key=not is_given
    )
    return None
