"""Token ids, chat prompts and incremental text are what tokenizers and transformers give."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from sageLLM.config import ModelConfig
from sageLLM.errors import CheckpointError, RequestError
from sageLLM.models.resolve import resolve_model
from sageLLM.models.tokenizer import IncrementalDecoder, NullTokenizer, Tokenizer, load_tokenizer

MESSAGES = [
    {"role": "user", "content": "  What is it? 你好  "},
    {"role": "assistant", "content": "A test."},
    {"role": "user", "content": "And then?"},
]


def byte_level() -> Tokenizer:
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(["你好世界 😀😀 héllo the quick brown fox"] * 5, trainer)
    rust.add_tokens(["<tool 中>"])
    return Tokenizer(rust)


def byte_fallback() -> Tokenizer:
    """As Llama 2's tokenizer.json: pieces with a space mark, bytes as a fallback."""
    words = ["▁", "▁the", "▁a", "x", "好", "▁▁"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {word: len(vocab) + index for index, word in enumerate(words)}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    rust.add_special_tokens(["<s>", "</s>"])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(rust)


def metaspace() -> Tokenizer:
    words = ["▁the", "▁quick", "fox", "▁", "s", "é"]
    vocab = {"<unk>": 0} | {word: 1 + index for index, word in enumerate(words)}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    rust.decoder = decoders.Metaspace()
    return Tokenizer(rust)


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "metaspace": metaspace(),
              "null": NullTokenizer()}  # fmt: skip
# Bytes of 😀, 你 and broken sequences are likelier than chance would make them.
INTERESTING = [0xF0, 0x9F, 0x98, 0x80, 0xE4, 0xBD, 0xA0, 0xED, 0xC0, 0x20]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
def test_pushes_and_finish_together_are_decode(name, skip):
    tokenizer = TOKENIZERS[name]
    offset = {"byte_fallback": 3, "null": 0}.get(name)
    favourites = [] if offset is None else [byte + offset for byte in INTERESTING]
    if name == "byte_level":
        favourites = [token for text in ("😀", "你", "é") for token in tokenizer.encode(text)]
    one = st.integers(0, tokenizer.vocab_size - 1)
    if favourites:
        one = st.sampled_from(favourites) | one

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.lists(one, max_size=4), max_size=12))
    def check(pushes):
        decoder = IncrementalDecoder(tokenizer, skip)
        text = "".join(decoder.push(ids) for ids in pushes) + decoder.finish()
        assert text == tokenizer.decode([token for ids in pushes for token in ids], skip)

    check()


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "null"])
def test_no_push_ever_holds_a_broken_character(name):
    tokenizer = TOKENIZERS[name]
    text = "你好 😀 the 世界"
    ids = [byte + 3 for byte in text.encode()] if name == "byte_fallback" else tokenizer.encode(text)
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push([token]) for token in ids]
    assert not any("�" in piece for piece in pieces)
    assert "".join(pieces) + decoder.finish() == text


def test_byte_level_text_comes_as_soon_as_it_is_certain():
    decoder = IncrementalDecoder(NullTokenizer())
    assert [decoder.push([byte]) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_text_survives_encoding_and_decoding(text):
    for name in ("byte_level", "null"):
        tokenizer = TOKENIZERS[name]
        try:
            ids = tokenizer.encode(text)
        except RequestError:
            assert any(0xD800 <= ord(char) < 0xE000 for char in text)
            continue
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_lone_surrogate_is_a_bad_request():
    for tokenizer in (TOKENIZERS["byte_level"], NullTokenizer()):
        with pytest.raises(RequestError, match="not valid Unicode"):
            tokenizer.encode("\ud800")


def test_a_checkpoint_encodes_as_transformers_does(checkpoint_folder):
    from transformers import AutoTokenizer

    folder = checkpoint_folder("llama3")
    expected, tokenizer = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    texts = ["the quick brown fox", "你好 😀", "", "<s>special</s> inside"]
    assert tokenizer.encode_batch(texts) == [expected(text)["input_ids"] for text in texts]
    assert tokenizer.encode(texts[0]) == tokenizer.encode_batch(texts)[0]
    assert tokenizer.vocab_size == len(expected)


TEMPLATES = {
    "qwen": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "namespace": "{%- set ns = namespace(count=0) -%}\n{%- for m in messages %}\n    {%- if m.role == 'user' %}\n"
    "        {%- set ns.count = ns.count + 1 %}\n        {{- loop.index ~ ':' ~ m.content|trim }}\n    {%- endif %}\n"
    "{%- endfor %}\n{{ ns.count }} {{ messages[0]|tojson(indent=2) }}",
    "controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n{{ bos_token }}{{ m.content }}"
    "{% endfor %}{{ unknown }}{% if tools is none %}no tools{% endif %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "block space": "    {% if true %}\n  x\n    {% endif %}\n{{ messages[0].role }}\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_a_chat_renders_as_transformers_renders_it(name, generation_prompt, checkpoint_folder, tmp_path):
    from transformers import AutoTokenizer

    source = checkpoint_folder("llama3")
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATES[name]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=generation_prompt
    )
    assert Tokenizer.from_folder(tmp_path).render_chat(MESSAGES, generation_prompt) == expected


def test_a_chat_gets_one_beginning_of_sequence(checkpoint_folder):
    from transformers import AutoTokenizer

    folder = checkpoint_folder("llama3")
    ids = Tokenizer.from_folder(folder).encode_chat(MESSAGES)
    assert ids.count(0) == 1
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert ids == expected["input_ids"]


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
TOOL_TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}[{{ message.role }}]\
{{ message.content }}{% if message.tool_calls %}[TOOL_CALLS]{{ message.tool_calls[0].function | tojson }}{% endif %}\
{% endfor %}"""


def with_tools(template=TOOL_TEMPLATE, **options) -> Tokenizer:
    rust = byte_level()._rust
    rust.add_special_tokens(["[TOOL_CALLS]"])
    return Tokenizer(rust, chat_template=template, **options)


def test_tools_and_calls_reach_the_template_as_transformers_gives_them(checkpoint_folder, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_bytes((checkpoint_folder("llama3") / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TOOL_TEMPLATE}))
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tools=TOOLS, tokenize=False)
    call["function"] = {"name": "add", "arguments": '{"a": 1}'}
    assert Tokenizer.from_folder(tmp_path).render_chat(messages, False, tools=TOOLS) == expected


def test_a_template_of_its_own_for_tools():
    tokenizer = with_tools("no tools", tool_template="[TOOL_CALLS] {{ tools | length }}")
    assert tokenizer.render_chat(MESSAGES) == "no tools"
    assert tokenizer.render_chat(MESSAGES, tools=TOOLS) == "[TOOL_CALLS] 1"
    assert tokenizer.tool_format.name == "mistral"


def test_a_template_without_tools_refuses_them():
    tokenizer = with_tools("{{ messages[0].content }}")
    assert tokenizer.tool_format is None
    for refusing in (tokenizer, NullTokenizer()):
        with pytest.raises(RequestError, match="leave them out"):
            refusing.render_chat(MESSAGES, tools=TOOLS)
        with pytest.raises(RequestError, match="leave them out"):
            refusing.render_chat([{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}])


def test_where_calls_are_looked_for_their_markers_are_text():
    tokenizer = with_tools()
    marker = tokenizer.control_ids["[TOOL_CALLS]"]
    ids = [*tokenizer.encode("hé"), 0, marker, *tokenizer.encode("l")]
    assert tokenizer.decode(ids) == "hél"
    assert tokenizer.for_tools.decode(ids) == tokenizer.for_tools.stream().push(ids) == "hé[TOOL_CALLS]l"
    assert tokenizer.for_tools.decode(ids, skip_special_tokens=False) == "hé<s>[TOOL_CALLS]l"


@pytest.mark.parametrize("where", ["list", "file"])
def test_a_template_may_be_a_list_or_a_file_of_its_own(where, checkpoint_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((checkpoint_folder("llama3") / "tokenizer.json").read_bytes())
    settings = {}
    if where == "list":
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
        settings = {"chat_template": named}
    else:
        (tmp_path / "chat_template.jinja").write_text("yes")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_folder(tmp_path).render_chat(MESSAGES) == "yes"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.missing.deeper }}", "no attribute"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "__class__"),
    ],
)
def test_what_a_template_refuses_or_must_not_do_is_a_bad_request(template, message):
    tokenizer = Tokenizer(RustTokenizer(models.BPE()), chat_template=template)
    with pytest.raises(RequestError, match=message):
        tokenizer.render_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{% for m in messages if m.role in ('system', 'user') %}{{ m.role }} {{ m.content }};{% endfor %}",
         "system Be brief.;user Hi;"),
        ("{% if messages[0].role == 'developer' %}D:{% endif %}{{ messages[0].content }}", "D:Be brief."),
    ],
)  # fmt: skip
def test_a_developer_is_the_system_to_a_template_that_knows_none(template, rendered):
    tokenizer = Tokenizer(RustTokenizer(models.BPE()), chat_template=template)
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(messages) == rendered
    assert messages[0]["role"] == "developer"


def test_without_a_template_messages_are_a_bad_request():
    with pytest.raises(RequestError, match="send `prompt`"):
        byte_level().encode_chat(MESSAGES)


def test_a_broken_template_names_its_line():
    with pytest.raises(CheckpointError, match="line 2"):
        Tokenizer(RustTokenizer(models.BPE()), chat_template="x\n{% if %}").render_chat(MESSAGES)


def test_real_weights_need_a_tokenizer_and_random_ones_fall_back_to_bytes(checkpoint_folder, tmp_path, caplog):
    source = checkpoint_folder("llama2")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(source / name)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(resolve_model(ModelConfig(model_id=str(tmp_path))))
    tokenizer = load_tokenizer(resolve_model(ModelConfig(model_id=str(tmp_path), load_format="dummy")))
    assert isinstance(tokenizer, NullTokenizer)
    assert "UTF-8 bytes" in caplog.text


def test_a_template_takes_the_variables_that_it_reads():
    tokenizer = with_tools("{{ 'Think. ' if enable_thinking is not false }}{{ messages[0].content }}")
    assert tokenizer.render_chat(MESSAGES[:1]) == f"Think. {MESSAGES[0]['content']}"
    assert tokenizer.render_chat(MESSAGES[:1], enable_thinking=False) == MESSAGES[0]["content"]
    for refusing in (tokenizer, NullTokenizer()):
        with pytest.raises(RequestError, match="leave (it|this) out"):
            refusing.render_chat(MESSAGES[:1], enable_thinkin=False)
