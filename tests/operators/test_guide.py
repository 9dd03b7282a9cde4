"""guide: sequences in; out with their grammar compiled, or rejected with what is wrong with it."""

from __future__ import annotations

import threading

import pytest

from sageLLM.config import ModelConfig
from sageLLM.errors import ConfigError, RequestError
from sageLLM.models.guide_compiler import GuideCompiler
from sageLLM.models.resolve import resolve_model
from sageLLM.models.tokenizer import load_tokenizer
from sageLLM.operators.guide import GuideOutputs
from sageLLM.operators.schedule import Schedule
from sageLLM.records import Guide, GuideKind

YES_NO = Guide(GuideKind.REGEX, "(yes|no)")


@pytest.fixture
def engine(null_engine):
    """The null model, with another's tokens for grammars."""
    engine = null_engine()
    model = resolve_model(ModelConfig())
    engine.services.guides = GuideCompiler(model, lambda: load_tokenizer(model))
    return engine


def asking(engine, guide):
    sequence = engine.sequence([1, 2, 3])
    sequence.request.guide = guide
    return sequence


def test_sequences_without_a_guide_pass_in_order(on_loop, engine):
    sequences = [engine.sequence([n]) for n in range(5)]

    async def main():
        async with engine.stage(GuideOutputs) as stage:
            assert await stage.put(*sequences) == sequences
            assert stage.outlet.lists == [5]

    on_loop(main)
    assert all(sequence.guide is None for sequence in sequences)


def test_a_guide_is_compiled_and_noted_on_the_sequence(on_loop, engine):
    guided = [asking(engine, YES_NO), asking(engine, Guide(GuideKind.JSON_OBJECT)), asking(engine, YES_NO)]

    async def main():
        async with engine.stage(GuideOutputs) as stage:
            await stage.put(*guided)
            await stage.until(lambda: len(stage.sent) == 3)
            again = asking(engine, YES_NO)
            assert await stage.put(again) == [again]  # it is known: nothing to wait for

    on_loop(main)
    assert [sequence.guide for sequence in guided] == [sequence.request.guide for sequence in guided]


def test_a_wrong_grammar_is_rejected_and_others_go_on(on_loop, engine):
    wrong = asking(engine, Guide(GuideKind.REGEX, "a("))

    async def main():
        async with engine.stage(GuideOutputs) as stage:
            await stage.put(wrong, asking(engine, YES_NO))
            await stage.until(lambda: stage.sent and stage.errors)
            assert stage.errors == ['guided_regex: invalid regex "a(": regex parse error: error: unclosed group']
            assert stage.outlet.letters[0].request is wrong.request
            assert [sequence.guide for sequence in stage.sent] == [YES_NO]

    on_loop(main)


@pytest.fixture
def slow_checks(engine, monkeypatch):
    """An event that lets checks of guides end, and the guides whose checks have begun."""
    release, begun = threading.Event(), []

    def check(guide):
        begun.append(guide)
        release.wait(20)

    monkeypatch.setattr(engine.services.guides, "check", check)
    return release, begun


def test_who_has_no_grammar_overtakes_one_that_takes_long_which_is_compiled_once(on_loop, engine, slow_checks):
    release, checked = slow_checks

    async def main():
        async with engine.stage(GuideOutputs) as stage:
            slow, plain = [asking(engine, YES_NO) for _ in range(3)], engine.sequence([1])
            assert await stage.put(*slow[:2], plain) == [plain]
            assert await stage.put(slow[2]) == []
            release.set()
            await stage.until(lambda: len(stage.sent) == 4)
            assert stage.sent[1:] == slow
            assert checked == [YES_NO]

    on_loop(main)


def test_many_grammars_that_take_long_hold_up_nobody_else_until_the_buffer_is_full(on_loop, engine, slow_checks):
    release, begun = slow_checks

    async def main():
        async with engine.stage(GuideOutputs, buffer=6) as stage:
            for n in range(5):
                await stage.put(asking(engine, Guide(GuideKind.REGEX, f"{n}")))
            plain = engine.sequence([1])
            assert await stage.put(plain) == [plain]
            await stage.until(lambda: len(begun) == 4)  # at once
            for n in range(5, 8):
                await stage.put(asking(engine, Guide(GuideKind.REGEX, f"{n}")))
            assert stage.taken == 7
            release.set()
            await stage.until(lambda: len(stage.sent) == 9)

    on_loop(main)


def test_a_pipelines_own_grammar_is_for_requests_that_ask_for_none(on_loop, engine):
    plain, asks = engine.sequence([1]), asking(engine, Guide(GuideKind.JSON_OBJECT))

    async def main():
        async with engine.stage(GuideOutputs, guided_regex="(yes|no)") as stage:
            await stage.put(plain, asks)
            await stage.until(lambda: len(stage.sent) == 2)

    on_loop(main)
    assert (plain.guide, asks.guide) == (YES_NO, Guide(GuideKind.JSON_OBJECT))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"guided_regex": "a("}, "operator 'stage': guided_regex: invalid regex"),
        ({"guided_grammar": "start: x"}, "operator 'stage': guided_grammar: line 1, column 8: unknown name"),
    ],
)
def test_a_pipelines_own_grammar_that_is_wrong_keeps_it_from_starting(drive, engine, config, error):
    with pytest.raises(ConfigError, match=error):
        drive(GuideOutputs, config, context=engine.context)


def test_a_pipeline_says_one_grammar():
    with pytest.raises(ConfigError, match="found guided_regex and guided_grammar: an output conforms to one of them"):
        GuideOutputs.config_model(guided_regex="a", guided_grammar="start: x")


def test_the_null_model_refuses_each_request_that_asks(on_loop, null_engine):
    engine = null_engine()

    async def main():
        async with engine.stage(GuideOutputs) as stage:
            await stage.put(asking(engine, YES_NO))
            await stage.until(lambda: stage.errors)
            assert stage.errors[0].startswith("builtin:null chooses no tokens")

    on_loop(main)


def test_without_this_stage_schedule_rejects_a_request_that_asks(on_loop, null_engine):
    engine = null_engine()

    async def main():
        async with engine.stage(Schedule) as schedule:
            assert await schedule.put(asking(engine, YES_NO)) == []
            (error,) = schedule.errors
            assert error.startswith("the request asks for an output that conforms to a regex, but no `guide` stage")

    on_loop(main)
    engine.check_nothing_leaks()


def test_an_error_that_is_no_grammars_fault_fails_the_stage(on_loop, engine, monkeypatch):
    monkeypatch.setattr(engine.services.guides, "check", lambda guide: 1 / 0)

    async def main():
        async with engine.stage(GuideOutputs) as stage:
            await stage.inlet.send([asking(engine, YES_NO)])
            await stage.until(lambda: False)

    with pytest.raises(BaseExceptionGroup) as caught:
        on_loop(main)
    assert caught.group_contains(ZeroDivisionError)
    assert not caught.group_contains(RequestError)
