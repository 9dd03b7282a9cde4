"""What a step's graph holds: the decoder's work, no more and no less, in the decoder's order."""

from __future__ import annotations

from collections import Counter

import pytest

from sageLLM.accel.execution_graph import NodeKind
from sageLLM.accel.graph_builder import ExecutionGraphBuilder, KVMove
from sageLLM.accel.model_work import ModelWork, Parallelism
from sageLLM.models.architecture import DecoderConfig

LAYERS = 4


def kinds(graph):
    return Counter(node.kind for node in graph)


def test_a_decode_step(shape):
    graph = ExecutionGraphBuilder(shape).build_decode_graph([10, 20, 30])
    assert kinds(graph) == {
        NodeKind.EMBEDDING: 1,
        NodeKind.LAYERNORM: 2 * LAYERS + 1,
        NodeKind.QKV_PROJ: LAYERS,
        NodeKind.DECODE_ATTN: LAYERS,
        NodeKind.OUT_PROJ: LAYERS,
        NodeKind.FFN: LAYERS,
        NodeKind.LM_HEAD: 1,
        NodeKind.SAMPLE: 1,
    }
    assert [node.name for node in graph.topological_sort()] == [node.name for node in graph], "built in its order"
    assert graph["0.decode_attn"].flops == 4 * 8 * 16 * 60


def test_a_prefill_step_has_an_attention_for_each_chunk_and_logits_only_where_asked_for(shape):
    graph = ExecutionGraphBuilder(shape).build_prefill_graph([(0, 7), (32, 5)], logit_rows=0)
    assert kinds(graph)[NodeKind.PREFILL_ATTN] == 2 * LAYERS
    assert NodeKind.LM_HEAD not in kinds(graph)
    assert f"{LAYERS - 1}.ffn" not in graph, "nothing goes on after the last layer's attention"
    assert graph["0.prefill_attn_1"].flops == 4 * 8 * 16 * sum(32 + i + 1 for i in range(5))


def test_a_hybrid_step_shares_the_products_and_joins_the_attentions(shape):
    graph = ExecutionGraphBuilder(shape).build_hybrid_graph([9, 9], [(0, 6)])
    assert graph["1.qkv_proj"].rows == 8
    assert graph.inputs_of("1.out_proj") == {"1.decode_attn", "1.prefill_attn_0"}
    assert graph[f"{LAYERS - 1}.ffn"].rows == 3, "two decoding rows, and one of the chunk"


def test_no_rows_no_graph(shape):
    assert len(ExecutionGraphBuilder(shape).build_hybrid_graph([], [])) == 0


def test_flops_of_a_token_are_twice_the_weights_it_meets(shape):
    config = DecoderConfig("llama", 4, 8, 2, 16, 128, 352, 1000, 4096, tie_word_embeddings=True)
    graph = ExecutionGraphBuilder(config).build_decode_graph([1])
    weighty = {NodeKind.QKV_PROJ, NodeKind.OUT_PROJ, NodeKind.FFN, NodeKind.LM_HEAD}
    products = sum(node.flops for node in graph if node.kind in weighty)
    assert products == 2 * config.num_parameters
    weights = sum(work.fixed_bytes for work in ModelWork(config).rows.values())
    assert weights == 2 * (config.num_parameters - 1000 * 128) / 4 + 2 * 1000 * 128


def test_tensor_parallel_ranks_share_the_work_and_pay_for_it_in_messages(shape):
    def work(graph):
        every_rank = {NodeKind.EMBEDDING, NodeKind.LAYERNORM, NodeKind.SAMPLE}
        return sum(node.flops for node in graph if node.kind not in every_rank)

    whole = ExecutionGraphBuilder(shape).build_hybrid_graph([9], [(0, 6)])
    half = ExecutionGraphBuilder(shape, Parallelism(2)).build_hybrid_graph([9], [(0, 6)])
    assert work(half) == pytest.approx(work(whole) / 2)
    assert kinds(half)[NodeKind.COMM_ALL_REDUCE] == 2 * LAYERS
    assert kinds(half)[NodeKind.COMM_ALL_GATHER] == 1
    assert half["0.all_reduce_attn"].num_bytes == 7 * 128 * 2, "2 (n - 1) / n of what the rows hold"
    with pytest.raises(ValueError, match="tensor_parallel_size 3"):
        ExecutionGraphBuilder(shape, Parallelism(3))


def test_pipeline_stages_hand_over_what_lies_between_layers(shape):
    graph = ExecutionGraphBuilder(shape, Parallelism(1, 2)).build_decode_graph([9, 9])
    assert kinds(graph)[NodeKind.COMM_SEND] == kinds(graph)[NodeKind.COMM_RECV] == 2
    assert {node.stage for node in graph if node.layer in (0, 1) and not node.kind.is_comm} == {0}
    assert {node.stage for node in graph if node.layer in (2, 3) and not node.kind.is_comm} == {1}
    assert "1.ffn" in graph.ancestors_of("2.qkv_proj")
    with pytest.raises(ValueError, match="pipeline_parallel_size 5"):
        ExecutionGraphBuilder(shape, Parallelism(1, 5))


def test_kv_moves_stand_where_their_layer_does(shape):
    moves = [KVMove(NodeKind.KV_LOAD, 100, "ddr"), KVMove(NodeKind.KV_MIGRATE, 7, "handover")]
    graph = ExecutionGraphBuilder(shape).build_prefill_graph([(100, 7)], moves=moves)
    assert kinds(graph)[NodeKind.KV_LOAD] == kinds(graph)[NodeKind.KV_MIGRATE] == LAYERS
    assert "2.kv_load_0_ddr" in graph.inputs_of("2.prefill_attn_0")
    assert "2.prefill_attn_0" in graph.inputs_of("2.kv_migrate_0_handover")
    assert sum(node.num_bytes for node in graph if node.kind is NodeKind.KV_LOAD) == 100 * 4 * 2 * 2 * 16 * 2
