"""Runs a DecoderModel step by step over a paged pool with shuffled blocks, as the worker does."""

from __future__ import annotations

import random

import pytest
import torch

from sageLLM.backends.base import StepLayout


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class PagedRunner:
    """Sequences of one model in one pool. Block ids are handed out in random order, so position never equals slot."""

    def __init__(self, model, block_size: int = 4, num_blocks: int = 128) -> None:
        self.model = model
        self.block_size = block_size
        self.kv = model.backend.allocate_kv(model.kv_shape(num_blocks, block_size), model.kv_dtype)
        self.free = list(range(num_blocks))
        random.Random(0).shuffle(self.free)
        self.tables: list[list[int]] = []
        self.lengths: list[int] = []

    def add(self) -> int:
        self.tables.append([])
        self.lengths.append(0)
        return len(self.tables) - 1

    def step(self, work: list[tuple[int, list[int]]], logit_rows: list[int] | None = None) -> torch.Tensor:
        """`work`: (sequence, its next tokens), one-token entries first."""
        positions, slots, tokens = [], [], []
        for sequence, new in work:
            table = self.tables[sequence]
            for token in new:
                position = self.lengths[sequence]
                if position % self.block_size == 0:
                    table.append(self.free.pop())
                positions.append(position)
                slots.append(table[position // self.block_size] * self.block_size + position % self.block_size)
                tokens.append(token)
                self.lengths[sequence] += 1
        width = max(len(self.tables[sequence]) for sequence, _ in work)
        layout = StepLayout(
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            block_tables=torch.tensor(
                [self.tables[sequence] + [0] * (width - len(self.tables[sequence])) for sequence, _ in work]
            ),
            context_lens=torch.tensor([self.lengths[sequence] for sequence, _ in work]),
            query_lens=[len(new) for _, new in work],
            num_decodes=next((i for i, (_, new) in enumerate(work) if len(new) != 1), len(work)),
        )
        rows = None if logit_rows is None else torch.tensor(logit_rows)
        return self.model.compute_logits(self.model.forward(torch.tensor(tokens), layout, self.kv, rows))

    def generate(self, prompt: list[int], count: int, chunk: int | None = None) -> list[int]:
        """Greedy tokens, the prompt in chunks of `chunk` tokens."""
        sequence = self.add()
        size = chunk or len(prompt)
        for start in range(0, len(prompt), size):
            part = prompt[start : start + size]
            logits = self.step([(sequence, part)], [len(part) - 1])
        output = [int(logits[-1].argmax())]
        while len(output) < count:
            output.append(int(self.step([(sequence, [output[-1]])])[-1].argmax()))
        return output


@pytest.fixture
def paged_runner():
    """The class PagedRunner."""
    return PagedRunner


@pytest.fixture
def load():
    """A function (folder, backend=CPUBackend(), **ModelConfig fields) -> DecoderModel."""
    from sageLLM.backends.cpu import CPUBackend
    from sageLLM.config import ModelConfig
    from sageLLM.models.resolve import resolve_model
    from sageLLM.models.weights import load_model

    def load_folder(folder, backend=None, **fields):
        return load_model(resolve_model(ModelConfig(model_id=str(folder), **fields)), backend or CPUBackend())

    return load_folder
