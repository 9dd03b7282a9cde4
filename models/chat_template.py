"""A checkpoint's Jinja chat template, rendered in a sandbox with what transformers' templates may use."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.parser import Parser

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One compiled template. Templates come from the network: they run in jinja2's immutable sandbox."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Compile `source`.

        Raises:
            CheckpointError: it is not a valid template.
        """
        from jinja2 import TemplateSyntaxError

        try:
            self._template = _compile(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template's line {error.lineno} is wrong: {error.message}") from error
        self._special_tokens = special_tokens
        self.source = source

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the variables that it reads or sets."""
        from jinja2 import nodes

        return frozenset(name.name for name in self._template.environment.parse(self.source).find_all(nodes.Name))

    @property
    def takes_tools(self) -> bool:
        """Whether it reads the variable `tools`."""
        return not self.names.isdisjoint(("tools", "custom_tools"))

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt's text.

        Raises:
            RequestError: the template refuses the messages, or they lack what it needs.
        """
        values = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            return self._template.render(
                messages=[self._adapt(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **values,
            )
        except Exception as error:  # a template can raise anything: it is code that came with the checkpoint
            raise RequestError(f"messages do not fit the model's chat template: {error}") from error

    def _adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """A developer is the system to a template that knows none: most would leave the message out."""
        message = _alias_reasoning(message)
        if message.get("role") == "developer" and "developer" not in self.source:
            return {**message, "role": "system"}
        return message


def _compile(source: str) -> Template:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationTag(Extension):
        """`{% generation %}` marks the assistant's part for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class GuardedNamespace(Namespace):
        """Refuses underscore names, the way into CPython's internals."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a chat template may not store {name!r} on a namespace")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = GuardedNamespace
    return environment.from_string(source)


def _alias_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read a message's reasoning under several names; give it under each."""
    if not isinstance(message, dict):
        raise RequestError(f"a message is {type(message).__name__}; write an object with `role` and `content`")
    reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
