"""KV in units of BLOCK, TOKEN, LAYER and HEAD: what goes out comes back bit for bit, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.errors import KVCacheError
from sageLLM.kv_runtime import KVGranularity
from sageLLM.kv_runtime.granularity import copy_kv, export_kv, import_kv, reshard_kv

LAYERS, HEADS, DIM = 3, 4, 8
UNITS = list(KVGranularity)
many = settings(max_examples=25, deadline=None)


def make_pool(blocks, size, dtype, seed, heads=HEADS, layers=LAYERS):
    values = torch.randn((blocks, layers, 2, heads, size, DIM), generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


@st.composite
def moves(draw):
    """Two pools, a range of positions and the blocks that it lies in on both sides, in any order."""
    size = draw(st.sampled_from([1, 3, 4, 16]))
    start = draw(st.integers(0, 3 * size))
    end = start + draw(st.integers(0, 4 * size))
    count = -(-end // size) - start // size if end > start else 0
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    pools = [make_pool(count + draw(st.integers(1, 4)), size, dtype, seed) for seed in (1, 2)]
    tables = [np.array(draw(st.permutations(range(len(pool))))[:count], np.int32) for pool in pools]
    return (*pools, *tables, start, end)


def copied_one_by_one(source, target, source_blocks, target_blocks, start, end, layers=range(LAYERS)):
    """The model: every position of every layer by itself."""
    expected, size = target.clone(), source.shape[4]
    for position in range(start, end):
        at, offset = position // size - start // size, position % size
        for layer in layers:
            expected[target_blocks[at], layer, :, :, offset] = source[source_blocks[at], layer, :, :, offset]
    return expected


def widened(move, unit):
    """BLOCK moves whole blocks."""
    source, target, source_blocks, target_blocks, start, end = move
    size = source.shape[4]
    if unit is KVGranularity.BLOCK and end > start:
        start, end = start // size * size, -(-end // size) * size
    return source, target, source_blocks, target_blocks, start, end


@pytest.mark.parametrize("unit", UNITS)
@many
@given(move=moves())
def test_a_copy_changes_those_positions_and_no_others(unit, move):
    expected = copied_one_by_one(*widened(move, unit))
    before = move[0].clone()
    copy_kv(unit, *move)
    assert torch.equal(move[1], expected)
    assert torch.equal(move[0], before)


@many
@given(move=moves(), layer=st.integers(0, LAYERS - 1))
def test_a_layer_moves_alone(move, layer):
    expected = copied_one_by_one(*move, layers=[layer])
    copy_kv(KVGranularity.LAYER, *move, layer=layer)
    assert torch.equal(move[1], expected)


@pytest.mark.parametrize("unit", UNITS)
@many
@given(move=moves())
def test_units_go_through_a_host_buffer(unit, move):
    source, target, source_blocks, target_blocks, start, end = move
    expected = copied_one_by_one(*widened(move, unit))
    buffer = export_kv(unit, source, source_blocks, start, end)
    assert buffer.is_contiguous()
    import_kv(unit, buffer, target, target_blocks, start, end)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("unit", UNITS)
@many
@given(move=moves(), data=st.data())
def test_units_go_one_run_after_another(unit, move, data):
    source, target, source_blocks, target_blocks, start, end = move
    expected = copied_one_by_one(*widened(move, unit))
    buffer = export_kv(unit, source, source_blocks, start, end)
    cut = data.draw(st.integers(0, len(buffer)))
    import_kv(unit, buffer[cut:], target, target_blocks, start, end, first_unit=cut)
    import_kv(unit, buffer[:cut], target, target_blocks, start, end)
    assert torch.equal(target, expected)


@many
@given(move=moves(), ranks=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])))
def test_heads_go_from_one_tensor_parallel_size_to_another(move, ranks):
    source, target, source_blocks, target_blocks, start, end = move
    expected = copied_one_by_one(*move)
    shards = [
        [part.contiguous() for part in pool.chunk(count, dim=3)]
        for pool, count in zip((source, target), ranks, strict=True)
    ]
    reshard_kv(*shards, source_blocks, target_blocks, start, end)
    assert torch.equal(torch.cat(shards[1], dim=3), expected)


def test_tensor_parallel_sizes_need_not_divide_each_other():
    whole = make_pool(4, 4, torch.float32, 1, heads=6)
    halves = [part.contiguous() for part in whole.chunk(2, dim=3)]
    thirds = [torch.zeros(4, LAYERS, 2, 2, 4, DIM) for _ in range(3)]
    reshard_kv(halves, thirds, [0, 1, 2, 3], [0, 1, 2, 3], 0, 16)
    assert torch.equal(torch.cat(thirds, dim=3), whole)


def test_a_pool_copies_within_itself():
    pool = make_pool(4, 4, torch.float32, 1)
    expected = pool[[0, 1]].clone()
    copy_kv(KVGranularity.BLOCK, pool, pool, [0, 1], [3, 2], 0, 8)
    assert torch.equal(pool[[3, 2]], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end": 9}, "lie in 3 blocks of 4, found 2"),
        ({"start": 5}, r"\[5, 4\) are no range"),
        ({"source_blocks": [4, 0]}, "not all in a pool of 4"),
        ({"target_blocks": [-1, 0]}, "not all in a pool of 4"),
        ({"target": make_pool(4, 8, torch.float32, 1)}, "between pools of"),
        ({"target": make_pool(4, 4, torch.bfloat16, 1)}, "between pools of"),
        ({"target": make_pool(4, 4, torch.float32, 1, heads=2)}, "between pools of"),
        ({"target": make_pool(4, 4, torch.float32, 1, layers=2)}, "between pools of"),
        ({"layer": 1}, "for LAYER only"),
        ({"granularity": KVGranularity.LAYER, "layer": 3}, "layer 3 of 3"),
    ],
)
def test_what_cannot_be_copied_is_refused_and_changes_nothing(change, message):
    move = {
        "granularity": KVGranularity.TOKEN,
        "source": make_pool(4, 4, torch.float32, 1),
        "target": make_pool(4, 4, torch.float32, 2),
        "source_blocks": [0, 1],
        "target_blocks": [0, 1],
        "start": 0,
        "end": 4,
        **change,
    }
    before = move["target"].clone()
    with pytest.raises(KVCacheError, match=message):
        copy_kv(**move)
    assert torch.equal(move["target"], before)


def test_groups_with_different_heads_are_refused():
    with pytest.raises(KVCacheError, match="2 pools of 4 kv heads do not hold 1 times 4 heads"):
        reshard_kv([make_pool(1, 4, torch.float32, 1)] * 2, [make_pool(1, 4, torch.float32, 1)], [0], [0], 0, 4)


@pytest.mark.parametrize(
    ("unit", "buffer", "first", "message"),
    [
        (KVGranularity.LAYER, torch.zeros(3, 4, 2, HEADS, DIM), 1, "units 1 to 4"),
        (KVGranularity.TOKEN, torch.zeros(4, LAYERS, 2, 2, DIM), 0, "of shape"),
        (KVGranularity.HEAD, torch.zeros(HEADS, 4, LAYERS, 2, DIM, dtype=torch.bfloat16), 0, "bfloat16"),
    ],
)
def test_a_buffer_of_other_units_is_refused(unit, buffer, first, message):
    with pytest.raises(KVCacheError, match=message):
        import_kv(unit, buffer, make_pool(2, 4, torch.float32, 1), [0], 0, 4, first)
