"""Train `builtin:pydoc-tiny`: a small Llama that answers what a name of Python's standard library does.

    python examples/train_pydoc_tiny.py --dump-data pydoc.jsonl           # collect the data with this interpreter
    python examples/train_pydoc_tiny.py --data pydoc.jsonl --out DIR      # train (some minutes on a GPU) and evaluate
    python examples/train_pydoc_tiny.py --data pydoc.jsonl --evaluate models/builtin/pydoc_tiny

Data: the docstrings of the running interpreter's standard library. "What does heapq.heappush do?" is answered with the
first sentence of the docstring. The text is part of Python and under the PSF License Agreement, see
models/builtin/LICENSE-pydoc.md. The seed fixes the data order, the weights' start and the items held out.
Needs transformers, which sageLLM itself does not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import pkgutil
import platform
import random
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

# ---- data: the docstrings of the standard library -------------------------------------------------------------------

PRIVATE_OR_PLATFORM = {
    "antigravity", "this", "idlelib", "lib2to3", "test", "turtledemo", "turtle", "tkinter", "ensurepip", "distutils",
    "encodings", "pydoc_data", "posix", "posixpath", "genericpath", "nt", "ntpath", "nturl2path", "pyexpat", "opcode",
    "sre_compile", "sre_constants", "sre_parse", "msilib", "msvcrt", "winreg", "winsound", "ctypes.wintypes",
    "asyncio.windows_events", "asyncio.windows_utils", "multiprocessing.popen_spawn_win32", "dbm.gnu", "dbm.ndbm",
}  # fmt: skip
REMOVED_BY_3_13 = {
    "aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "imp", "mailcap", "nis",
    "nntplib", "ossaudiodev", "pipes", "smtpd", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib",
}  # fmt: skip
SKIPPED_MODULES = PRIVATE_OR_PLATFORM | REMOVED_BY_3_13
EMPTY_SENTENCES = {"Structure/Union member", "An enumeration.", "**DEPRECATED**", "Deprecated AST node class."}
SIGNATURE = re.compile(r"[\w.]+ ?\((?:[^()]|\([^()]*\))*\)[ \t]*(?=-|:|\.|\n|$|[A-Z])")
ARROW = re.compile(
    r"-+>[ \t]*(?:(?P<result>\w+)(?:[.,:]| --)[ \t]+(?=\S+[ \t]+\S+[ \t]+\S)|(?P<phrase>[^\n]*)(?:\n|$))"
)
SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!a\.k\.a)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\.\.)[.!?](?=\s)")
MAX_ANSWER_CHARS = 220


class Item(NamedTuple):
    """A public name of the standard library and the first sentence of its docstring, on one line."""

    name: str
    answer: str


def extract_first_sentence(docstring: str) -> str | None:
    """The first sentence on one line, without leading call signatures; None if nothing worth answering is left.

    Where a signature is all there is, what it says to return is the answer: "zip(*iterables) --> Yield tuples until".
    """
    text, returned = inspect.cleandoc(docstring), ""
    while match := SIGNATURE.match(text):
        text = text[match.end() :]
        if arrow := ARROW.match(text):
            returned = returned or arrow["phrase"] or ""
            text = text[arrow.end() :]
        text = text.lstrip("-:. \t\n")
    return clean_sentence(text) or (clean_sentence(returned) if len(returned.split()) >= 4 else None)


def clean_sentence(text: str) -> str | None:
    paragraph = " ".join(re.split(r"\n\s*\n", text, maxsplit=1)[0].split())
    end = SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.end()] if end else paragraph
    if len(sentence.split()) < 2 or not 10 <= len(sentence) <= MAX_ANSWER_CHARS or sentence in EMPTY_SENTENCES:
        return None
    is_prose = re.match(r"[@*`'\"]?[A-Za-z]", sentence) and not re.match(r"\w+ = ", sentence)
    if not is_prose or "->" in sentence or "Alias for field" in sentence or sentence.endswith((":", ",")):
        return None
    return sentence


def import_public_modules() -> Iterator[tuple[str, Any]]:
    """Every public module of the standard library that imports here, packages before their submodules."""
    pending = sorted(sys.stdlib_module_names, reverse=True)
    while pending:
        name = pending.pop()
        parts = name.split(".")
        if name in SKIPPED_MODULES or "test" in parts or any(part.startswith("_") for part in parts):
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except ImportError as error:
            print(f"left out: {name} does not import here ({error})", file=sys.stderr)
            continue
        yield name, module
        if name == "os":
            yield "os.path", module.path
        if hasattr(module, "__path__"):
            found = (f"{name}.{info.name}" for info in pkgutil.iter_modules(module.__path__))
            pending += sorted(found, reverse=True)


def list_module_members(name: str, module: Any) -> Iterator[tuple[str, Any]]:
    exported = getattr(module, "__all__", None)
    for key in sorted(exported if exported is not None else vars(module)):
        member = getattr(module, key, None)
        if key.startswith("_") or not (inspect.isclass(member) or inspect.isroutine(member)):
            continue
        if exported is not None or getattr(member, "__module__", None) in (name, f"_{name}", None):
            yield key, member


def list_class_members(cls: type) -> Iterator[tuple[str, Any]]:
    """Methods and properties of the class itself and of the C base classes behind it (_socket, _random, _io)."""
    members: dict[str, Any] = {}
    for owner in cls.__mro__:
        if owner is cls or owner.__module__.startswith("_"):
            for key, member in vars(owner).items():
                members.setdefault(key, member)
    for key, member in sorted(members.items()):
        if not key.startswith("_") and (inspect.isroutine(member) or inspect.isdatadescriptor(member)):
            yield key, member


def collect_items() -> list[Item]:
    """One item per public module, function, class, method and property with a usable docstring, sorted by name."""
    aliases: dict[int, list[tuple[str, Any]]] = defaultdict(list)
    answers: dict[str, str | None] = {}
    for module_name, module in import_public_modules():
        answers[module_name] = extract_first_sentence(module.__doc__ or "")
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for key, member in list_module_members(module_name, module):
            aliases[id(member)].append((f"{prefix}{key}", member))
    for names in aliases.values():
        name, member = min(names, key=rank_alias)
        docstring = vars(member).get("__doc__") if inspect.isclass(member) else member.__doc__
        answers[name] = extract_first_sentence(docstring) if isinstance(docstring, str) else None
        if inspect.isclass(member):
            for key, attribute in list_class_members(member):
                docstring = getattr(attribute, "__doc__", None)
                if isinstance(docstring, str):
                    answers[f"{name}.{key}"] = extract_first_sentence(docstring)
    return [Item(name, answer) for name, answer in sorted(answers.items()) if answer]


def rank_alias(named: tuple[str, Any]) -> tuple[bool, int, int, str]:
    """Of several public names of one object: its own name first (OSError, not IOError), then the shortest path."""
    name, member = named
    return (name.rpartition(".")[2] != getattr(member, "__name__", None), name.count("."), len(name), name)


def write_items(items: list[Item], path: Path) -> None:
    """JSON lines: the version of the interpreter that the text came from, then the items."""
    lines: list[dict[str, str]] = [{"python": platform.python_version()}, *(item._asdict() for item in items)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_items(path: Path) -> tuple[str, list[Item]]:
    """The version of the interpreter that wrote the file, and the items."""
    header, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return header["python"], [Item(**line) for line in lines]


def find_short_names(items: list[Item]) -> dict[str, list[str]]:
    """For every item's name the endings that belong to no other item: heappush, Path.read_text."""
    owners: dict[str, set[str]] = defaultdict(set)
    for item in items:
        parts = item.name.split(".")
        for start in range(len(parts)):
            owners[".".join(parts[start:])].add(item.name)
    short: dict[str, list[str]] = {item.name: [] for item in items}
    for ending, names in sorted(owners.items()):
        if len(names) == 1 and ending not in names and len(ending) >= 4:
            short[next(iter(names))].append(ending)
    return short


def is_held_out(item: Item, seed: int) -> bool:
    """About 2 % of the items; depends on the name and the seed alone."""
    return hashlib.sha256(f"{seed}:{item.name}".encode()).digest()[0] < 5


# ---- text: how questions are asked and how a chat is written --------------------------------------------------------

CANONICAL = "What does {} do?"
PHRASINGS = (
    CANONICAL, "What does {} do", "what does {} do?", "what does {} do", "What is {}?", "What is {}", "what is {}?",
    "what is {}", "Explain {}.", "Explain {}", "explain {}", "Describe {}.", "Describe {}", "describe {}",
    "Tell me about {}.", "tell me about {}", "What is {} for?", "what is {} for", "What is the purpose of {}?",
    "What does `{}` do?", "what does `{}` do", "What does {}() do?", "what does {}() do", "Explain `{}`.",
    "What does Python's {} do?", "help({})", "{}", "{}?",
)  # fmt: skip
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about Python's standard library.",
    "You are a helpful assistant that explains Python's standard library. Answer in one sentence.",
)
BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, SYSTEM, USER, ASSISTANT]
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.content is string %}{%- set text = message.content %}"
    "{%- else %}{%- set text = message.content | map(attribute='text') | join('') %}{%- endif %}"
    "{%- if message.role == 'assistant' %}{{- '<|assistant|>' + text | trim + eos_token }}"
    "{%- elif message.role in ['system', 'developer'] %}{{- '<|system|>' + text | trim }}"
    "{%- else %}{{- '<|user|>' + text | trim }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def train_tokenizer(items: list[Item], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over every phrasing's words, the names and the answers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for item in items for text in (CANONICAL.format(item.name), item.name, item.answer)]
    texts += [phrasing.format("x") for phrasing in PHRASINGS for _ in range(50)]
    tokenizer.train_from_iterator(texts + list(SYSTEM_PROMPTS) * 50, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def encode_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """What the chat template renders for one user message with the generation prompt."""
    return encode(tokenizer, f"{BOS}{USER}{question}{ASSISTANT}")


class RowSampler:
    """Draws training rows: single questions in every phrasing, after a system prompt, in longer chats, or as bare text.

    A row is (token ids, whether each id is to be predicted); only answers and their eos are.
    """

    def __init__(self, tokenizer: Tokenizer, items: list[Item], seed: int) -> None:
        self.random = random.Random(seed)
        short_names = find_short_names(items)
        self.names = [[item.name, *short_names[item.name]] for item in items]
        self.tokenizer = tokenizer
        self.encoded: dict[str, list[int]] = {}
        self.answers = [encode(tokenizer, item.answer) for item in items]
        self.newline = encode(tokenizer, "\n")
        self.system_prompts = [encode(tokenizer, prompt) for prompt in SYSTEM_PROMPTS]
        self.bos, self.eos, _, self.system, self.user, self.assistant = (
            tokenizer.token_to_id(token) for token in SPECIAL_TOKENS
        )

    def draw_question(self, index: int) -> list[int]:
        """The item's full name in three of four questions, else an ending of it that is no other item's."""
        phrasing = 0 if self.random.random() < 0.3 else self.random.randrange(len(PHRASINGS))
        names = self.names[index]
        name = 0 if len(names) == 1 or self.random.random() < 0.75 else self.random.randrange(1, len(names))
        question = PHRASINGS[phrasing].format(names[name])
        if question not in self.encoded:
            self.encoded[question] = encode(self.tokenizer, question)
        return self.encoded[question]

    def draw_system_prompt(self) -> list[int]:
        if self.random.random() < 0.6:
            return self.random.choice(self.system_prompts)
        longest = 40 if self.random.random() < 0.15 else 5
        sentences = self.random.choices(self.answers, k=self.random.randint(1, longest))
        return [token for sentence in sentences for token in sentence]

    def draw_row(self, index: int) -> tuple[list[int], list[bool]]:
        answer = [*self.answers[index], self.eos]
        kind = self.random.random()
        if kind < 0.1:  # a bare prompt, no chat around it
            newline = self.newline * self.random.randint(0, 1)
            prompt = [self.bos] * self.random.randint(0, 1) + self.draw_question(index) + newline
            return prompt + answer, [False] * len(prompt) + [True] * len(answer)
        ids = [self.bos]
        if 0.1 <= kind < 0.3:
            ids += [self.system, *self.draw_system_prompt()]
        wanted = [False] * len(ids)
        earlier = self.random.randint(1, 12 if kind < 0.27 else 3) if 0.25 <= kind < 0.4 else 0
        for turn in [self.random.randrange(len(self.answers)) for _ in range(earlier)] + [index]:
            prompt = [self.user, *self.draw_question(turn), self.assistant]
            answer = [*self.answers[turn], self.eos]
            ids += prompt + answer
            wanted += [False] * len(prompt) + [True] * len(answer)
        return ids, wanted

    def draw_batches(self, batch_size: int) -> Iterator[list[tuple[list[int], list[bool]]]]:
        """Endless batches; every item comes once an epoch, rows of like length share a batch."""
        while True:
            order = list(range(len(self.answers)))
            self.random.shuffle(order)
            rows = sorted((self.draw_row(index) for index in order), key=lambda row: len(row[0]))
            batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
            self.random.shuffle(batches)
            yield from batches


def pad_batch(rows: list[tuple[list[int], list[bool]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (-100 where nothing is to be predicted), both [B, T], padded on the right."""
    import numpy as np
    import torch

    lengths = np.array([len(ids) for ids, _ in rows])
    width = math.ceil(lengths.max() / 8) * 8
    flat_ids = np.fromiter(chain.from_iterable(ids for ids, _ in rows), np.int64)
    flat_wanted = np.fromiter(chain.from_iterable(wanted for _, wanted in rows), np.bool_)
    used = np.arange(width) < lengths[:, None]
    tokens = np.full((len(rows), width), pad)
    labels = np.full((len(rows), width), -100)
    tokens[used] = flat_ids
    labels[used] = np.where(flat_wanted, flat_ids, -100)
    return torch.from_numpy(tokens), torch.from_numpy(labels)


# ---- model, training, evaluation ------------------------------------------------------------------------------------


def build_config(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json, in the keys that every reader of Llama folders knows."""
    heads = args.hidden_size // 32
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": args.hidden_size,
        "intermediate_size": args.hidden_size * 3,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "torch_dtype": "bfloat16",
    }


def train(args: argparse.Namespace, config: dict[str, Any], sampler: RowSampler) -> LlamaForCausalLM:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    model = LlamaForCausalLM(LlamaConfig(**{**config, "torch_dtype": "float32"})).float().to(args.device)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=args.device != "cpu"
    )
    warmup = max(1, min(300, args.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / args.steps))),
    )
    started = time.monotonic()
    for step, rows in zip(range(args.steps), sampler.draw_batches(args.batch_size), strict=False):
        tokens, labels = (tensor.to(args.device) for tensor in pad_batch(rows, config["pad_token_id"]))
        with torch.autocast(args.device, dtype=torch.bfloat16):
            hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
            predicting = labels[:, 1:] != -100
            logits = model.lm_head(hidden[predicting])
        loss = cross_entropy(logits.float(), labels[:, 1:][predicting])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
    return model.eval().to(torch.bfloat16)


def score_answers(
    model: LlamaForCausalLM, pairs: list[tuple[list[int], list[int]]], pad: int, batch_size: int = 1024
) -> tuple[list[bool], float]:
    """For (prompt, answer) pairs of ids: is the answer the greedy continuation, and the perplexity of all answers.

    Greedy decoding gives exactly the answer if and only if, fed with the answer, each next token is the argmax.
    """
    import torch

    exact: list[bool] = []
    total, count = 0.0, 0
    for start in range(0, len(pairs), batch_size):
        rows = [(p + a, [False] * len(p) + [True] * len(a)) for p, a in pairs[start : start + batch_size]]
        tokens, labels = (tensor.to(model.device) for tensor in pad_batch(rows, pad))
        with torch.inference_mode():
            logits = model(tokens[:, :-1], use_cache=False).logits.float()
        target = labels[:, 1:]
        predicting = target != -100
        exact += ((logits.argmax(-1) == target) | ~predicting).all(-1).tolist()
        total += torch.nn.functional.cross_entropy(logits[predicting], target[predicting], reduction="sum").item()
        count += int(predicting.sum())
    return exact, math.exp(total / max(1, count))


def decode_greedily(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int = 80
) -> list[str]:
    """Greedy answers by `generate`, batched over prompts of the same length, so that nothing is padded."""
    import torch

    by_length = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    answers = [""] * len(prompts)
    for indices in by_length.values():
        tokens = torch.tensor([prompts[index] for index in indices], device=model.device)
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.token_to_id(PAD),
        )
        for index, ids in zip(indices, output[:, tokens.shape[1] :].tolist(), strict=True):
            answers[index] = tokenizer.decode(ids, skip_special_tokens=True)
    return answers


def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, items: list[Item], seed: int) -> dict[str, Any]:
    """Share of training questions answered exactly (real greedy decoding) and perplexity of the held-out answers."""
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)

    def pair(item: Item, phrasing: str, name: str | None = None) -> tuple[list[int], list[int]]:
        return encode_prompt(tokenizer, phrasing.format(name or item.name)), [*encode(tokenizer, item.answer), eos]

    trained = [item for item in items if not is_held_out(item, seed)]
    held_out = [item for item in items if is_held_out(item, seed)]
    answers = decode_greedily(
        model, tokenizer, [encode_prompt(tokenizer, CANONICAL.format(item.name)) for item in trained]
    )
    wrong = [(item, answer) for item, answer in zip(trained, answers, strict=True) if answer != item.answer]
    for item, answer in wrong[:10]:
        print(f"wrong: {item.name}: {answer!r} instead of {item.answer!r}")
    phrased: Counter[str] = Counter()
    for phrasing in PHRASINGS:
        exact, _ = score_answers(model, [pair(item, phrasing) for item in trained], pad)
        phrased[phrasing] = sum(exact)
    short_names = find_short_names(trained)
    short_pairs = [pair(item, CANONICAL, name) for item in trained for name in short_names[item.name]]
    short_exact, _ = score_answers(model, short_pairs, pad)
    _, trained_perplexity = score_answers(model, [pair(item, CANONICAL) for item in trained], pad)
    held_out_exact, held_out_perplexity = score_answers(model, [pair(item, CANONICAL) for item in held_out], pad)
    worst, worst_exact = min(phrased.items(), key=lambda entry: entry[1])
    return {
        "items_trained": len(trained),
        "items_held_out": len(held_out),
        "share_exact": round(1 - len(wrong) / len(trained), 5),
        "share_exact_all_phrasings": round(sum(phrased.values()) / (len(trained) * len(PHRASINGS)), 5),
        "share_exact_worst_phrasing": [worst, round(worst_exact / len(trained), 5)],
        "share_exact_short_names": round(sum(short_exact) / max(1, len(short_exact)), 5),
        "trained_perplexity": round(trained_perplexity, 4),
        "held_out_perplexity": round(held_out_perplexity, 1) if held_out else None,
        "held_out_share_exact": round(sum(held_out_exact) / len(held_out), 5) if held_out else None,
    }


# ---- the Hugging Face folder ----------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict().items()
    weights = {name: tensor.cpu().contiguous() for name, tensor in tensors if name != "lm_head.weight"}  # tied
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    write_json(out / "config.json", config)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", {"do_sample": False, **token_ids})
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train builtin:pydoc-tiny, or only collect its data or evaluate it.")
    parser.add_argument("--data", type=Path, help="items as written by --dump-data; default: collect them here")
    parser.add_argument("--out", type=Path, default=Path("out/pydoc_tiny"), help="the model folder to write")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--dump-data", type=Path, metavar="FILE", help="write the collected items and stop")
    task.add_argument("--evaluate", type=Path, metavar="FOLDER", help="evaluate this model folder and stop")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=768)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 32, the size of one head")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=4096)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic training asks of cuBLAS
    python, items = read_items(args.data) if args.data else (platform.python_version(), collect_items())
    if args.dump_data:
        write_items(items, args.dump_data)
        print(f"{len(items)} items written to {args.dump_data}")
        return
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    if args.evaluate:
        model = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.bfloat16).to(args.device)
        tokenizer = Tokenizer.from_file(str(args.evaluate / "tokenizer.json"))
        print(json.dumps(evaluate(model, tokenizer, items, args.seed), indent=2))
        return
    started = time.monotonic()
    trained = [item for item in items if not is_held_out(item, args.seed)]
    tokenizer = train_tokenizer(trained, args.vocab_size)
    config = build_config(args, tokenizer)
    model = train(args, config, RowSampler(tokenizer, trained, args.seed))
    seconds = round(time.monotonic() - started, 1)
    write_folder(args.out, model, tokenizer, config)
    report = {
        **evaluate(model, tokenizer, items, args.seed),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": args.seed,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "training_seconds": seconds,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "python_of_the_docstrings": python,
        "torch": torch.__version__,
        "items_sha256": hashlib.sha256(json.dumps(items).encode()).hexdigest(),
    }
    write_json(args.out / "training_report.json", report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
