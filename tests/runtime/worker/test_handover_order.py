"""Mode strict on devices that lag behind their workers: who writes to a block of the other pool, and when."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.records import FinishReason
from sageLLM.runtime.scheduler.lease import Lease


@pytest.fixture
def lagging_executor(reading_executor):
    class LaggingExecutor(reading_executor):
        """Works off its steps in order, as late as it may; some exports fail, or are written and done even later."""

        def __init__(self, blocks, chance, faults=0.0):
            super().__init__(blocks, 4)
            self.chance, self.faults = chance, faults
            self.queue, self.late = deque(), deque()

        def admit(self, *changes):
            self.queue.append((super().admit, changes))

        def readmit(self, slot, outputs):
            self.queue.append((super().readmit, (slot, outputs.copy())))

        def release(self, slot):
            self.queue.append((super().release, (slot,)))

        def ready(self):
            if self.chance.random() < 0.3:
                self.work_off(self.chance.randint(0, len(self.queue)))
            if self.late and self.chance.random() < 0.1:
                self.late.popleft()()
            return True

        def launch(self, plan):
            step = Step(self, super().launch, plan)
            self.queue.append((step, ()))
            return step

        def work_off(self, count):
            for _ in range(count):
                job, arguments = self.queue.popleft()
                job(*arguments)

        def export(self, plan):
            """Which of a step's exports fail; they do not write at once, if at all."""
            failed = {}
            for index, export in enumerate(plan.exports):
                if self.chance.random() < self.faults:
                    failed[index] = "the test says so"
                    self.late.append(lambda export=export: self.send(export))
                else:
                    self.send(export)
            return failed

        def close(self):
            while self.late:
                self.late.popleft()()

    class Step:
        def __init__(self, executor, launch, plan):
            self.executor, self.launch, self.plan = executor, launch, plan
            self.kept = None

        def __call__(self):
            self.kept = self.launch(self.plan).result()

        def result(self):
            while self.kept is None:
                self.executor.work_off(1)
            return self.kept

    return LaggingExecutor


def check_that_sources_are_kept(b):
    """Nobody is granted a block that a step which may not have run yet is to copy from."""
    for worker in b.worker._decode:
        for plan, _ in worker._unread:
            assert worker._kv._pool.owners.counts[[source for source, _ in plan.copies]].all()


many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(
    seed=st.integers(0, 2**16),
    blocks=st.sampled_from([12, 20, 64]),
    workers=st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2)]),
    launch_ahead=st.booleans(),
    slow_doors=st.booleans(),
    faults=st.sampled_from([0, 0.1, 0.5]),
    ends=st.sampled_from([0, 0.02, 0.2]),
    commit=st.booleans(),
    policy=st.sampled_from(["fcfs", "fair_share"]),
)
def test_nobody_reads_what_somebody_elses_step_wrote(
    bench, lagging_executor, expected_tokens,
    seed, blocks, workers, launch_ahead, slow_doors, faults, ends, commit, policy,
):  # fmt: skip
    chance = random.Random(seed)
    b = bench(
        blocks=blocks,
        executor=lambda: lagging_executor(blocks, chance, faults),
        mode="strict",
        prefill_workers=workers[0],
        decode_workers=workers[1],
        launch_ahead=launch_ahead,
        slow_doors=slow_doors,
        uneven=True,
        commit=commit,
        policy=policy,
        max_batch_size=4,
        max_step_tokens=12,
        seed=seed,
    )
    sequences = []
    for number in range(14):
        prompt = [chance.choice((7, 8))] * chance.choice((3, 8, 17)) + [number] * chance.randint(1, 5)
        count = chance.randint(1, 12)
        eos = chance.sample(expected_tokens(prompt, count), chance.randint(0, 1))
        sequences.append(
            b.sequence(
                prompt,
                max_new_tokens=count,
                eos=tuple(eos),
                n=chance.choice((1, 1, 2)),
                stream=number % 3 == 0,
                tenant=chance.choice("ab"),
            )
        )
    b.offer(*sequences)

    gone = set()

    def end_one():
        check_that_sources_are_kept(b)
        if chance.random() < ends:
            sequence = chance.choice(sequences)
            if isinstance(sequence.kv, Lease) and chance.random() < 0.5:
                gone.add(id(sequence))  # an operator has dropped its record
                b.reclaim(sequence)
            else:
                b.worker.cancel([sequence.request])
                b.tell()

    b.run(between=end_one)
    b.close()
    ended = [id(sequence) for sequence in b.finished]
    assert len(set(ended)) == len(ended)
    assert set(ended) | gone == set(map(id, sequences))
    if policy == "fair_share":
        assert not any(account.promised for account in b.waiting._waiting._accounts.values())
    for sequence in b.finished:
        assert sequence.error is None
        outputs = expected_tokens(sequence.prompt_tokens.tolist(), sequence.sampling.max_new_tokens)
        outputs = outputs[: 1 + min(map(outputs.index, sequence.eos_token_ids), default=len(outputs))]
        for choice in sequence.choices:
            if choice.finish_reason is FinishReason.CANCELLED:
                assert sequence.request.cancelled or id(sequence) in gone
                assert choice.output_tokens == outputs[: len(choice.output_tokens)]
            else:
                assert choice.output_tokens == outputs
    b.check_nothing_leaks()
