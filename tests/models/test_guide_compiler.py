"""Guides become matchers over a model's tokens, or one readable error."""

from __future__ import annotations

import json
import random
import shutil
import threading
from functools import partial

import numpy as np
import pytest
from llguidance.numpy import fill_next_token_bitmask

from sageLLM.config import ModelConfig
from sageLLM.errors import RequestError
from sageLLM.models import guide_compiler
from sageLLM.models.guide_compiler import GuideCompiler
from sageLLM.models.resolve import resolve_model
from sageLLM.models.tokenizer import load_tokenizer
from sageLLM.records import Guide, GuideKind

REGEX, GRAMMAR, SCHEMA = GuideKind.REGEX, GuideKind.GRAMMAR, GuideKind.JSON_SCHEMA


SQL = """
start: select (";" select)*
select: "SELECT " cols " FROM " NAME (" JOIN " NAME " ON " expr)* (" WHERE " expr)? (" GROUP BY " exprs)?
cols: "*" | exprs
exprs: expr (", " expr)*
expr: all_of (" OR " all_of)*
all_of: test (" AND " test)*
test: ("NOT ")? sum ((" = " | " < " | " LIKE ") sum | " IS NULL" | " IN (" (exprs | select) ")")?
sum: product ((" + " | " - ") product)*
product: atom ((" * " | " / ") atom)*
atom: NUM | STR | NAME ("." NAME)? | NAME "(" ("*" | exprs)? ")" | "(" expr ")" | "(" select ")" | "-" atom
NAME: /[a-zA-Z_][a-zA-Z0-9_]{0,30}/
NUM: /[0-9]+(\\.[0-9]+)?/
STR: /'([^'\\n]|'')*'/
"""


def record(fields):
    return {"type": "object", "properties": fields, "additionalProperties": False}


def service(size):
    """Schemas as an OpenAPI document has them: each with strings, numbers, arrays, and references to others."""

    def fields(at):
        other = {"$ref": f"#/$defs/model{at * 7 % size}"}
        kinds = [{"type": "string", "maxLength": 200}, {"type": "number"}, {"type": "array", "items": other}]
        kinds += [
            {"anyOf": [other, {"type": "null"}]},
            {"type": "string", "format": "date-time"},
            {"enum": ["on", "off"]},
        ]
        return {f"field_{at}_{n}": kinds[(at + n) % len(kinds)] for n in range(15)}

    return {"$defs": {f"model{at}": record(fields(at)) for at in range(size)}, "$ref": "#/$defs/model1"}


def compiler_of(model_id="builtin:pydoc-tiny", **fields):
    model = resolve_model(ModelConfig(model_id=str(model_id), **fields))
    return GuideCompiler(model, partial(load_tokenizer, model))


@pytest.fixture(scope="module")
def compiler():
    return compiler_of()


def following(compiler, guide, tokens=()):
    """The tokens that llguidance allows after these."""
    matcher = compiler.new_matcher(guide)
    assert matcher.consume_tokens([*tokens])
    bits = np.zeros((1, compiler.mask_words), np.int32)
    fill_next_token_bitmask(matcher, bits)
    return {*np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()}


def test_each_output_has_a_matcher_of_its_own(compiler):
    guide = Guide(REGEX, "[ab]c")
    first, second = compiler.new_matcher(guide), compiler.new_matcher(guide)
    assert first.consume_tokens(compiler.tokenizer.tokenize_str("ac"))
    assert first.is_stopped()
    assert not second.is_stopped()
    assert second.consume_tokens(compiler.tokenizer.tokenize_str("bc"))


def chain_of_rules(length):
    return "start: r0\n" + "\n".join(f'r{at}: "a" r{at + 1} | "b"' for at in range(length)) + f'\nr{length}: "a"'


def chain_of_references(length):
    definitions = {f"d{at}": {"$ref": f"#/$defs/d{at + 1}"} for at in range(length)}
    return json.dumps({"$defs": {**definitions, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize(("kind", "source"), [(GRAMMAR, chain_of_rules(5000)), (SCHEMA, chain_of_references(5000))])
def test_rules_may_be_as_deep_as_a_source_has_room_for(compiler, kind, source):
    assert following(compiler, Guide(kind, source))  # and the process lives


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (SCHEMA, '{"multipleOf":9999991}'),
        (SCHEMA, '{"multipleOf":1e999999999}'),
        (SCHEMA, '{"allOf":[{"multipleOf":9973},{"multipleOf":10.007}]}'),
        (GRAMMAR, 'start: %json {"type": "integer", "\\u006dultipleOf" : 9999991}'),
    ],
)
def test_multiples_that_would_take_for_ever_are_refused(compiler, kind, source):
    with pytest.raises(RequestError, match="multipleOf is too large"):
        compiler.check(Guide(kind, source))


def test_usual_multiples_are_not(compiler):
    for numbers in ("0.01", "5", "0.5", "1000", "-3.0", "0"):
        try:
            compiler.check(Guide(SCHEMA, f'{{"type":"number","multipleOf":{numbers}}}'))
        except RequestError as error:
            assert float(numbers) <= 0 and "too large" not in str(error)


@pytest.mark.parametrize(
    ("kind", "source", "error"),
    [
        (REGEX, "a" * 262145, "guided_regex: it is too large: found 262145 characters, write at most 262144"),
        (REGEX, "a(", 'guided_regex: invalid regex "a(": regex parse error: error: unclosed group'),
        (REGEX, "", "guided_regex: it allows nothing but an empty output: write one that allows more"),
        (GRAMMAR, 'start: "a" foo', 'guided_grammar: line 1, column 8: unknown name: "foo"'),
        (GRAMMAR, 'start: x\nx: "a', "guided_grammar: line 2, column 6: lexer error"),
        (SCHEMA, '{"type": "foo"}', "response_format.json_schema.schema: Invalid type: foo"),
        (SCHEMA, '{"not": {}}', 'response_format.json_schema.schema: Unimplemented keys: ["not"]'),
    ],
)
def test_a_wrong_grammar_is_said_in_one_line_with_its_place(compiler, kind, source, error):
    guide = Guide(kind, source)
    with pytest.raises(RequestError) as caught:
        compiler.check(guide)
    assert str(caught.value) == error
    assert not compiler.knows(guide)


REALISTIC = {
    "300 optional fields": (SCHEMA, json.dumps(record({f"field_{n}": {"type": "string"} for n in range(300)}))),
    "60 schemas that refer to each other": (SCHEMA, json.dumps(service(60))),
    "an enum of 1500": (SCHEMA, json.dumps({"enum": [f"code-{n * 7919:x}" for n in range(1500)]})),
    "a pattern of 2 kB": (
        REGEX,
        "|".join(f"(GET|PUT) /v[0-9]+/{n * 7919:x}/[a-z]{{1,16}}\\?id=[0-9]+" for n in range(40)),
    ),
    "SQL": (GRAMMAR, SQL),
    "500 commands": (GRAMMAR, "start: " + "|".join(f'"do{n} " ARG' for n in range(500)) + "\nARG: /[a-z]+/"),
}


@pytest.mark.parametrize("kind_and_source", REALISTIC.values(), ids=REALISTIC)
def test_what_people_write_is_within_the_limits(compiler, kind_and_source):
    matcher, chance = compiler.new_matcher(Guide(*kind_and_source)), random.Random(1)
    bits = np.zeros((1, compiler.mask_words), np.int32)
    for _ in range(200):
        fill_next_token_bitmask(matcher, bits)
        usable = np.flatnonzero(np.unpackbits((bits & compiler.text_bits).view(np.uint8), bitorder="little"))
        assert not matcher.is_error(), matcher.get_error()
        if not len(usable) or matcher.is_stopped():
            break
        assert matcher.consume_token(int(chance.choice(usable))), matcher.get_error()


def test_a_grammar_whose_first_token_takes_too_long_to_find_is_refused(compiler, monkeypatch):
    monkeypatch.setattr(guide_compiler, "MASK_S", 0.0)
    with pytest.raises(RequestError, match="guided_regex: it takes too long to find what may follow"):
        compiler.check(Guide(REGEX, "slow[a-z]*"))


def test_a_grammar_that_takes_too_long_to_compile_is_given_up_and_others_are_compiled(monkeypatch):
    """Its thread goes on, and when four do nothing else is compiled until one of them ends."""
    compiler, released, ended = compiler_of(), threading.Event(), threading.Semaphore(0)
    compile_ = compiler._compile

    def compile_slowly(guide):
        if guide.source.startswith("slow"):
            released.wait(20)
            ended.release()
        return compile_(guide)

    monkeypatch.setattr(compiler, "_compile", compile_slowly)
    monkeypatch.setattr(guide_compiler, "_COMPILE_S", 0.01)
    slow = [Guide(REGEX, f"slow{n}") for n in range(4)]
    for guide in slow[:3]:
        with pytest.raises(
            RequestError, match="guided_regex: it takes longer than 0.01 s to compile: write one smaller"
        ):
            compiler.check(guide)
    monkeypatch.setattr(guide_compiler, "_COMPILE_S", 10.0)
    compiler.check(Guide(REGEX, "quick"))
    monkeypatch.setattr(guide_compiler, "_COMPILE_S", 0.01)
    with pytest.raises(RequestError, match="it takes longer"):
        compiler.check(slow[3])
    with pytest.raises(RequestError, match="it cannot be compiled now: 4 grammars are under way"):
        compiler.check(Guide(REGEX, "not now"))
    released.set()
    for _ in slow:
        assert ended.acquire(timeout=20)
    monkeypatch.setattr(guide_compiler, "_COMPILE_S", 10.0)
    compiler.check(Guide(REGEX, "not now"))


def test_only_so_many_grammars_are_kept_those_that_were_used_last(compiler, monkeypatch):
    monkeypatch.setattr(guide_compiler, "_MAX_GRAMMARS", 3)
    guides = [Guide(REGEX, f"kept {n}") for n in range(4)]
    for guide in (*guides[:3], guides[0], guides[3]):
        compiler.check(guide)
    assert [compiler.knows(guide) for guide in guides] == [True, False, True, True]
    assert following(compiler, guides[1])


def test_whitespace_between_tokens_of_json_is_bounded_unless_the_schema_says_otherwise(compiler):
    def takes(text, **options):
        guide = Guide(SCHEMA, json.dumps({"type": "object", "maxProperties": 0, **options}))
        return compiler.new_matcher(guide).consume_tokens(compiler.tokenizer.tokenize_str(text))

    assert takes("{}")
    assert takes("{\n        }")
    assert not takes("{" + "\n" * 3 + "}")
    assert not takes("{" + " " * 50 + "}")
    assert takes("{" + "\n" * 3 + "}", **{"x-guidance": {"whitespace_pattern": "\\s+"}})
    assert not takes("{ }", **{"x-guidance": {"whitespace_flexible": False}})


def test_the_end_of_sequence_tokens_are_the_models(compiler):
    eos = compiler._model.generation.eos_token_ids
    assert {*eos} <= following(compiler, Guide(REGEX, "a*"))
    assert not {*eos} & following(compiler, Guide(REGEX, "a+"))


def widened(folder, tmp_path, vocab_size):
    """A copy of a checkpoint whose logits are so many, without an end-of-sequence token."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | {"vocab_size": vocab_size, "eos_token_id": None}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").unlink()
    return copy


@pytest.mark.parametrize("vocab_size", [300, 320, 321, 512])
def test_ids_that_only_the_model_has_or_only_the_tokenizer_are_never_usable(checkpoint_folder, tmp_path, vocab_size):
    compiler = compiler_of(widened(checkpoint_folder("llama3"), tmp_path, vocab_size), load_format="dummy")
    known = load_tokenizer(compiler._model).vocab_size
    anything = following(compiler, Guide(REGEX, "(?s:.)*"))
    assert max(anything) <= known  # `known` itself ends, but the model has no such token
    usable = {*np.flatnonzero(np.unpackbits(compiler.text_bits.view(np.uint8), bitorder="little")).tolist()}
    assert max(usable & anything) < min(known, vocab_size)
    assert not compiler.eos_bits.any()


def test_byte_tokens_of_a_model_without_a_tokenizer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "max_seq_len": 64}
    compiler = compiler_of("nobody/nothing", vocab_size=300, **sizes)
    assert following(compiler, Guide(REGEX, "[a-c]+")) == {97, 98, 99}
    few = compiler_of("nobody/nothing", vocab_size=64, **sizes)
    few.check(Guide(REGEX, "[0-9]+"))
    with pytest.raises(RequestError, match="it allows no text that the model has tokens for"):
        few.check(Guide(REGEX, "[a-z]+"))


def test_the_null_model_cannot_be_guided():
    with pytest.raises(RequestError, match="builtin:null chooses no tokens, so nothing can guide it"):
        compiler_of("builtin:null").check(Guide(GuideKind.JSON_OBJECT))
