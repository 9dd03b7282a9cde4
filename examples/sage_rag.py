"""Retrieval-augmented generation as a SAGE flow: retrieve -> prompt -> generate -> sink, on the built-in model.

    pip install "sagellm[sage]"
    python examples/sage_rag.py "put an item onto a heap" "median of data"

Each question finds the functions of the standard library whose docstrings it shares most words with; the model, which
knows the standard library a little, is told them and says what the best one does.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections import Counter
from math import log

from sage.foundation import MapFunction, SinkFunction
from sage.runtime import LocalEnvironment

from sageLLM.integrations.sage import Generate

MODULES = ("bisect", "copy", "fnmatch", "heapq", "itertools", "os.path", "random", "shutil", "statistics", "textwrap")
QUESTIONS = ["put an item onto a heap", "shuffle the elements of a list", "remove common whitespace from lines"]


def words_of(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z]{2,}", text.lower())}


class Retrieve(MapFunction):
    """A question in; it and the `count` functions that fit it best out, the best one first."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self._count = count
        self._docs = {
            f"{module}.{name}": inspect.getdoc(value).partition("\n\n")[0].replace("\n", " ")
            for module in MODULES
            for name, value in vars(importlib.import_module(module)).items()
            if callable(value) and not name.startswith("_") and inspect.getdoc(value)
        }
        self._words = {name: words_of(f"{name} {doc}") for name, doc in self._docs.items()}
        self._commonness = Counter(word for words in self._words.values() for word in words)

    def execute(self, data: str) -> dict:
        asked = words_of(data)
        best = sorted(self._docs, key=lambda name: -self._similarity(asked, self._words[name]))[: self._count]
        return {"question": data, "found": [(name, self._docs[name]) for name in best]}

    def _similarity(self, asked: set[str], words: set[str]) -> float:
        rarity = sum(log(len(self._docs) / self._commonness[word]) for word in asked & words)
        return rarity / len(words) ** 0.5


class Prompt(MapFunction):
    """Adds the messages for the model. Generate's output has all of this as its `context`."""

    def execute(self, data: dict) -> dict:
        known = "\n".join(f"{name}: {doc}" for name, doc in data["found"])
        question = f"What does {data['found'][0][0]} do?"
        return {**data, "messages": [{"role": "system", "content": known}, {"role": "user", "content": question}]}


class Print(SinkFunction):
    def execute(self, data: dict) -> None:
        name = data["context"]["found"][0][0]
        print(f"{data['context']['question']}\n    {name}: {data.get('error') or data['text']}")


def main(questions: list[str]) -> None:
    env = LocalEnvironment("sage_rag")
    answers = env.from_batch(questions).map(Retrieve, count=2).map(Prompt)
    answers.map(Generate, options={"temperature": 0, "max_tokens": 64}).sink(Print)
    env.submit(autostop=True)


if __name__ == "__main__":
    main(sys.argv[1:] or QUESTIONS)
