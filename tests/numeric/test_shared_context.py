"""A context carried once against the same rows packed apart: the same log-probabilities and the same gradient."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lift import lifted
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from goldsmith.data import shared_context
from goldsmith.data.packing import pack
from goldsmith.data.shared_context import (
    MIN_SAVED_TOKENS,
    pack_shared,
    plan_shared_microbatches,
    shareable_length,
    shared_segments,
)
from goldsmith.models.layout import PackLayout
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.types import TokenizedExample

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "qwen3": Qwen3Config(**SIZES, **HEADS, head_dim=8),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=512),
}


def example(ids, num_context, *, weight=1.0, number=0):
    weights = np.full(len(ids), weight, dtype=np.float32)
    weights[:num_context] = 0.0
    return TokenizedExample(
        token_ids=np.array(ids, dtype=np.int32),
        target_weights=weights,
        example_id=str(number),
        example_weight=1.0 + number % 2,
        source=f"test:{number}",
        num_bytes=0,
    )


def families(seed=0):
    """System prompt > question > answers, a second family, and rows of their own."""
    rng = np.random.default_rng(seed)

    def tokens(count):
        return rng.integers(0, 61, count).tolist()

    system, first, second, other = tokens(70), tokens(66), tokens(40), tokens(90)
    rows = [
        (system + first + tokens(12), 136),
        (system + first + tokens(3), 136),
        (system + first + tokens(30), 136),
        (system + second + tokens(9), 110),
        (system + tokens(25), 80),
        (other + tokens(5), 90),
        (other + tokens(1), 90),
        (tokens(40), 20),
        (tokens(6), 1),
    ]
    order = rng.permutation(len(rows))
    return [
        example(*rows[place], weight=[0.5, 1.0, 2.0][number % 3], number=number) for number, place in enumerate(order)
    ]


def model_of(name):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32).double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return LikelihoodModel(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_loss_and_gradient(name):
    rows = families()
    apart, shared = pack(rows, range(len(rows))), pack_shared(rows, range(len(rows)))
    assert shared.num_tokens < apart.num_tokens - 2 * 136
    assert int(shared.segment_parents.max()) >= 0
    results = []
    for batch in (apart, shared):
        model = model_of(name)
        with lifted():
            sums = model(batch)
            sums.weighted_nll.backward()
        results.append((sums, {key: p.grad for key, p in model.named_parameters()}))
    (first, first_grads), (second, second_grads) = results
    assert float((first.log_probs_K - second.log_probs_K).abs().max()) <= 1e-11
    total = torch.nn.utils.get_total_norm(list(first_grads.values()))
    for key, wanted in first_grads.items():
        error = (second_grads[key] - wanted).norm() / torch.maximum(wanted.norm(), 1e-3 * total)
        assert float(error) <= 1e-10, key


def test_no_two_gold_tokens_need_follow_the_same_token():
    """Words that share no more than their beginning: as many positions as targets, and yet in another order."""
    rng = np.random.default_rng(3)
    shared_beginning = rng.integers(0, 61, 70).tolist()
    rows = [example(shared_beginning + rng.integers(0, 61, 20).tolist(), 80, number=number) for number in range(6)]
    apart, shared = pack(rows, range(len(rows))), pack_shared(rows, range(len(rows)))
    assert len(shared.target_positions.unique()) == len(shared.target_positions)
    assert not torch.equal(shared.target_positions, shared.target_positions.sort().values)
    model = model_of("llama")
    with torch.no_grad():
        assert float((model(apart).log_probs_K - model(shared).log_probs_K).abs().max()) <= 1e-5


def test_children_do_not_see_each_other():
    rows = families()
    model = model_of("llama").eval()
    before = model(pack_shared(rows, range(len(rows)))).log_probs_K
    changed = list(rows)
    longest = max(range(len(rows)), key=lambda index: rows[index].num_tokens)
    ids = rows[longest].token_ids.copy()
    ids[-30:] = (ids[-30:] + 1) % 61  # its own gold only
    changed[longest] = example(ids.tolist(), 136, number=longest)
    batch = pack_shared(changed, range(len(rows)))
    after = model(batch).log_probs_K
    others = batch.target_example != longest
    assert torch.allclose(before[others], after[others], rtol=0, atol=1e-12)
    assert not torch.allclose(before[~others], after[~others], rtol=0, atol=1e-3)


def test_nothing_shared_is_a_plain_pack():
    rows = [example(list(range(n, n + 40)), 20, number=n) for n in range(5)]
    shared, plain = pack_shared(rows, range(5)), pack(rows, range(5))
    assert torch.equal(shared.segment_lengths, plain.segment_lengths)
    assert torch.equal(shared.target_positions, plain.target_positions)


def test_gold_is_never_shared():
    ids = list(range(60)) * 2
    rows = [example(ids, 10, number=0), example(ids, 10, number=1)]
    assert pack_shared(rows, range(2)).num_tokens == 240
    assert shareable_length(rows[0].target_weights) == 10


row_sets = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 120), st.integers(1, 20)), min_size=1, max_size=12
)  # (which prompt, tokens of it, own tokens)


def rows_of(drawn):
    prompts = [np.full(130, 7), np.arange(130), np.concatenate([np.arange(70), np.full(60, 3)]), np.arange(130) % 5]
    return [
        example(
            [1, *prompts[which][:length].tolist(), *[(number + k) % 50 for k in range(own)]], 1 + length, number=number
        )
        for number, (which, length, own) in enumerate(drawn)
    ]


@given(drawn=row_sets)
@settings(max_examples=60, deadline=None)
def test_segments_spell_every_row(drawn):
    rows = rows_of(drawn)
    ids = [row.token_ids for row in rows]
    segments = shared_segments(ids, [shareable_length(row.target_weights) for row in rows])
    assert sorted(segment.row for segment in segments if segment.is_leaf) == list(range(len(rows)))
    for index, leaf in enumerate(segments):
        if not leaf.is_leaf:
            children = sum(other.parent == index for other in segments)
            assert children >= 2
            assert (leaf.stop - leaf.start) * (_leaves(segments, index) - 1) >= MIN_SAVED_TOKENS
            continue
        spelled, above = [], index
        while above != -1:
            segment = segments[above]
            spelled = [*ids[segment.row][segment.start : segment.stop].tolist(), *spelled]
            above = segment.parent
        assert spelled == ids[leaf.row].tolist()
    PackLayout.plan(
        [segment.stop - segment.start for segment in segments], segment_parents=[s.parent for s in segments]
    )


@given(drawn=row_sets, min_saved=st.sampled_from([1, 8, 64, 200]))
@settings(max_examples=60, deadline=None)
def test_growing_no_tree_gives_what_growing_it_gives(drawn, min_saved):
    rows = rows_of(drawn)
    given_rows = [row.token_ids for row in rows], [shareable_length(row.target_weights) for row in rows]
    quick = shared_segments(*given_rows, min_saved=min_saved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_context, "_largest_saving", lambda common: min_saved)
        assert shared_segments(*given_rows, min_saved=min_saved) == quick


@given(
    drawn=st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=12),
)
@settings(max_examples=100, deadline=None)
def test_a_table_of_prefixes_sorts_as_one_by_one_does(drawn):
    rows = [np.array([*prefix, 5], dtype=np.int32) for prefix in drawn]
    lengths = [len(prefix) for prefix in drawn]
    assert shared_context.sorted_by_prefix(rows, lengths) == shared_context._sorted_one_by_one(rows, lengths)


def _leaves(segments, index):
    below = {index}
    for other, segment in enumerate(segments):
        if segment.parent in below:
            below.add(other)
    return sum(segments[other].is_leaf for other in below)


@given(drawn=row_sets, budget=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_microbatches_keep_the_budget(drawn, budget):
    rows = rows_of(drawn)
    ids, shareable = [row.token_ids for row in rows], [shareable_length(row.target_weights) for row in rows]
    plan = plan_shared_microbatches(ids, shareable, budget)
    assert sorted(index for members in plan for index in members) == list(range(len(rows)))
    for members in plan:
        assert len(members) == 1 or pack_shared(rows, members).num_tokens <= budget


def test_a_pack_whose_families_are_torn_is_refused():
    with pytest.raises(ValueError, match="does not follow"):
        PackLayout.plan([5, 3, 4], segment_parents=[-1, -1, 0])


def test_where_contexts_can_be_shared():
    assert model_of("llama").shares_contexts(1000)
    windowed = LikelihoodModel(
        AutoModelForCausalLM.from_config(MistralConfig(**SIZES, **HEADS, sliding_window=50), dtype=torch.float32)
    )
    assert windowed.shares_contexts(50)
    assert not windowed.shares_contexts(51)
