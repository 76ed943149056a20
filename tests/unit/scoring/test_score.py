"""Scores against a plain loop over one example at a time, whatever the packing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from lift import lifted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from goldsmith.data.dataset import Dataset
from goldsmith.errors import DataError, NumericalError
from goldsmith.models.evaluate import iterate_log_probs, sum_log_likelihood
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.scoring.score import Asked, ScoredExample, score_dataset, score_windows, turn_numbers, windows
from goldsmith.scoring.summary import ScoreSummary
from goldsmith.scoring.tally import ScoreTally, parts_of, summarize
from goldsmith.scoring.texts import TokenTexts, gold_token_texts
from goldsmith.types import GoldTurn, TokenizedExample, TokenScores

VOCABULARY = 40


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).double().eval()


def some_examples(count: int = 25) -> Dataset:
    generator = np.random.default_rng(1)
    examples = []
    for index in range(count):
        length = int(generator.integers(2, 30))
        weights = generator.choice([0.0, 1.0, 0.25], size=length).astype(np.float32)
        weights[0], weights[-1] = 0.0, 2.0
        examples.append(
            TokenizedExample(
                token_ids=generator.integers(VOCABULARY, size=length).astype(np.int32),
                target_weights=weights,
                example_id=f"e{index}",
                example_weight=float(generator.choice([0.5, 1.0])),
                source=f"eval.jsonl:{index + 1}",
                num_bytes=length,
            )
        )
    return Dataset(examples)


def plain_log_probs(model: LlamaForCausalLM, example: TokenizedExample) -> npt.NDArray[np.float64]:
    """One example, the model's own logits, no packing."""
    model.set_attn_implementation("sdpa")
    ids = torch.from_numpy(example.token_ids.astype(np.int64))
    with torch.no_grad():
        log_probs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    gold = np.flatnonzero(example.target_weights > 0)
    return log_probs[torch.from_numpy(gold - 1), ids[gold]].numpy()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and two merges, so that a token may end within a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "Yo", "rk"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Y", "o"), ("r", "k")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(autouse=True)
def _float64_throughout() -> Iterator[None]:
    """The norms and rotary embeddings of `transformers` round to float32; layers by hand do not."""
    with lifted():
        yield


@pytest.mark.parametrize("tokens_per_microbatch", [1, 37, 64, 100_000])
def test_log_probs_equal_the_plain_loop_in_any_packing(tokens_per_microbatch: int) -> None:
    examples = some_examples()
    expected = [plain_log_probs(tiny_model(), example) for example in examples]
    model = LikelihoodModel(tiny_model())
    found = list(iterate_log_probs(model, examples, tokens_per_microbatch=tokens_per_microbatch))
    assert [index for index, _ in found] == list(range(len(examples)))
    for (_, log_probs), plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(log_probs, plain, rtol=0, atol=1e-10)


def test_windows_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    examples, model = some_examples(), LikelihoodModel(tiny_model())
    whole = list(iterate_log_probs(model, examples, tokens_per_microbatch=64))
    monkeypatch.setattr("goldsmith.models.evaluate._WINDOW_EXAMPLES", 4)
    monkeypatch.setattr("goldsmith.models.evaluate._WINDOW_PACKS", 1)
    cut = list(iterate_log_probs(model, examples, tokens_per_microbatch=64))
    for (index, log_probs), (other, expected) in zip(cut, whole, strict=True):
        assert index == other
        np.testing.assert_allclose(log_probs, expected, rtol=0, atol=1e-10)


def test_a_share_of_the_examples_in_its_own_order() -> None:
    examples, model = some_examples(), LikelihoodModel(tiny_model())
    whole = dict(iterate_log_probs(model, examples, tokens_per_microbatch=64))
    share = list(iterate_log_probs(model, examples, tokens_per_microbatch=64, indices=[7, 3, 7]))
    assert [index for index, _ in share] == [7, 3, 7]
    for index, log_probs in share:
        np.testing.assert_allclose(log_probs, whole[index], rtol=0, atol=1e-10)


def test_sums_are_one_division_each() -> None:
    examples, model = some_examples(), LikelihoodModel(tiny_model())
    nll = [
        -float(np.dot(example.target_weights[example.target_weights > 0], plain_log_probs(tiny_model(), example)))
        for example in examples
    ]
    u = np.array([example.example_weight for example in examples])
    weight_sums = np.array([example.weight_sum for example in examples])
    sums = sum_log_likelihood(model, examples, tokens_per_microbatch=50)
    assert sums.nll == pytest.approx(np.dot(u, nll) / np.dot(u, weight_sums), rel=1e-9)
    assert sums.nll_per_example == pytest.approx(np.dot(u, nll / weight_sums) / u.sum(), rel=1e-9)
    assert sums.num_target_tokens == sum(example.num_target_tokens for example in examples)
    assert math.isnan(sum_log_likelihood(model, Dataset([]), tokens_per_microbatch=50).nll)


def test_training_mode_is_as_before_at_every_handing_over() -> None:
    examples, model = some_examples(), LikelihoodModel(tiny_model())
    model.train()
    model.causal_lm.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    for _ in iterate_log_probs(model, examples, tokens_per_microbatch=64):
        assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_broken_model_is_named_with_the_example() -> None:
    examples, model = some_examples(), LikelihoodModel(tiny_model())
    with torch.no_grad():
        model.causal_lm.model.norm.weight.fill_(math.nan)
    with pytest.raises(NumericalError, match=r"example 'e\d+' \(eval\.jsonl:\d+\): log P of gold token 1 of .* is nan"):
        list(iterate_log_probs(model, examples, tokens_per_microbatch=64))


def test_scores_are_plain_sums_over_gold_whatever_its_weights() -> None:
    examples, tokenizer = some_examples(), byte_tokenizer()
    model = LikelihoodModel(tiny_model())
    scores = list(score_dataset(model, tokenizer, examples, tokens_per_microbatch=64, with_tokens=True))
    for score, example in zip(scores, examples, strict=True):
        plain = plain_log_probs(tiny_model(), example)
        assert score.log_prob == pytest.approx(plain.sum(), abs=1e-10)
        assert score.tokens is not None
        assert math.fsum(token.log_prob for token in score.tokens) == score.log_prob
        gold = example.target_weights > 0
        assert [token.token_id for token in score.tokens] == example.token_ids[gold].tolist()
        assert [token.weight for token in score.tokens] == example.target_weights[gold].tolist()
        assert (score.num_target_tokens, score.num_bytes) == (len(plain), example.num_bytes)
        assert (score.example_id, score.source) == (example.example_id, example.source)
        model.use_packed_attention()
    without = next(score_dataset(model, tokenizer, examples, tokens_per_microbatch=64))
    assert without.tokens is None
    assert without.log_prob == pytest.approx(scores[0].log_prob, abs=1e-10)


def as_example(token_ids: Sequence[int], num_context: int) -> TokenizedExample:
    weights = np.ones(len(token_ids), dtype=np.float32)
    weights[:num_context] = 0
    return TokenizedExample(
        token_ids=np.array(token_ids, dtype=np.int32),
        target_weights=weights,
        example_id="e",
        example_weight=1.0,
        source="",
        num_bytes=1,
    )


@pytest.mark.parametrize("text", ["New York", "é", "日本 語", "a👩‍👩‍👧b", "  two  ", "�", "a�b"])
def test_texts_of_tokens_joined_are_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    gold = tokenizer(text).input_ids
    texts = gold_token_texts(lambda ids: tokenizer.decode(list(ids)), as_example([5, *gold], 1))
    assert "".join(texts) == text
    assert len(texts) == len(gold)


def test_texts_of_bytes_that_are_no_character_are_not_lost() -> None:
    tokenizer = byte_tokenizer()
    broken = [tokenizer("é").input_ids[0], tokenizer("a").input_ids[0]]
    texts = gold_token_texts(lambda ids: tokenizer.decode(list(ids)), as_example([5, *broken], 1))
    assert "".join(texts) == "�a"


def test_a_merge_is_one_text() -> None:
    tokenizer = byte_tokenizer()
    gold = tokenizer("New York").input_ids
    texts = gold_token_texts(lambda ids: tokenizer.decode(list(ids)), as_example([5, *gold], 1))
    assert texts == ["N", "e", "w", " ", "Yo", "rk"]


def score(name: str, log_prob: float, tokens: int, num_bytes: int = 4, source: str = "") -> TokenScores:
    return TokenScores(example_id=name, source=source, log_prob=log_prob, num_target_tokens=tokens, num_bytes=num_bytes)


def test_summary_divides_sums() -> None:
    summary = summarize([score("a", -1.0, 1), score("b", -30.0, 10)])
    assert summary.nll_per_token.estimate == 31 / 11
    assert summary.nll_per_example.estimate == 31 / 2
    assert summary.perplexity == pytest.approx(math.exp(31 / 11))
    assert summary.bits_per_byte is not None
    assert summary.bits_per_byte.estimate == pytest.approx(31 / 8 / math.log(2))
    for part in ("2 examples, 11 gold tokens", "nll per token    2.8182", "95% interval", "bits per byte"):
        assert part in str(summary)


def test_summary_of_one_example_has_no_interval() -> None:
    summary = summarize([score("a", -1.0, 1)])
    assert not summary.nll_per_token.is_known
    assert "interval" not in str(summary)
    assert "1 example, 1 gold token\n" in str(summary)


def test_summary_draws_the_turns_of_a_row_together() -> None:
    values = np.random.default_rng(0).random(12)
    apart = summarize([score(f"r{row}@{t}", -v, 1) for row, v in enumerate(values) for t in range(9)])
    tied = summarize([score(f"r{row}@{t}", -v, 1, source=f"f:{row}") for row, v in enumerate(values) for t in range(9)])
    assert tied.nll_per_token.estimate == pytest.approx(apart.nll_per_token.estimate)
    assert tied.nll_per_token.high - tied.nll_per_token.low > 2 * (apart.nll_per_token.high - apart.nll_per_token.low)


def test_nothing_scored_is_an_error_and_not_zero() -> None:
    with pytest.raises(DataError, match="nothing was scored"):
        ScoreTally(1).summary()
    with pytest.raises(DataError, match="how many gold tokens"):
        summarize([score("a", -1.0, 0)])


def test_unknown_bytes_give_no_bits_per_byte() -> None:
    assert summarize([score("a", -1.0, 1, num_bytes=0), score("b", -1.0, 1)]).bits_per_byte is None


# --- what is read off the logits, and packing


def all_scored(
    asked: Asked, *, budget: int = 64, shares: bool = False, examples: Dataset | None = None
) -> list[ScoredExample]:
    model, texts = LikelihoodModel(tiny_model()), TokenTexts(byte_tokenizer())
    data = some_examples() if examples is None else examples
    found = score_windows(model, texts, data, asked, tokens_per_microbatch=budget, shares_contexts=shares)
    return [example for window in found for example in window]


def summary_of(scored: list[ScoredExample]) -> ScoreSummary:
    tally = ScoreTally(1 + max(one.row for one in scored))
    for one in scored:
        tally.add(one.scores, parts_of(one.scores, one.gold), row=one.row - scored[0].row)
    return tally.summary(num_resamples=50)


def test_tokens_tell_rank_best_entropy_and_alternatives() -> None:
    examples, model = some_examples(), tiny_model()
    model.set_attn_implementation("sdpa")
    for one, example in zip(all_scored(Asked(tokens=True, alternatives=3)), examples, strict=True):
        ids = torch.from_numpy(example.token_ids.astype(np.int64))
        with torch.no_grad():
            rows = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        gold = np.flatnonzero(example.target_weights > 0)
        assert one.scores.context_tokens == gold[0]
        assert one.scores.tokens is not None
        for token, place in zip(one.scores.tokens, gold, strict=True):
            row = rows[place - 1]
            assert token.rank == 1 + int((row > row[token.token_id]).sum())
            assert token.best_log_prob == pytest.approx(float(row.max()), abs=1e-10)
            assert token.entropy == pytest.approx(float(-(row.exp() * row).sum()), abs=1e-10)
            assert token.alternatives is not None
            assert [ids for ids, _, _ in token.alternatives] == row.topk(3).indices.tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_batch_size_does_not_matter_to_the_figures(dtype: torch.dtype, tolerance: float) -> None:
    """So far: a relative 1e-12 in float64 and 1e-6 in float32, of every figure and every example."""
    model, texts, examples = LikelihoodModel(tiny_model().to(dtype)), TokenTexts(byte_tokenizer()), some_examples()

    def scored(budget: int) -> list[ScoredExample]:
        found = score_windows(model, texts, examples, Asked(), tokens_per_microbatch=budget)
        return [example for window in found for example in window]

    whole = scored(100_000)
    expected = summary_of(whole)
    for budget in (1, 40, 64):
        own = scored(budget)
        for one, other in zip(own, whole, strict=True):
            assert one.scores.log_prob == pytest.approx(other.scores.log_prob, rel=tolerance)
        figures = summary_of(own)
        for name in ("nll_per_token", "nll_per_example", "bits_per_byte", "token_accuracy", "exact", "weighted_nll"):
            for bound in ("estimate", "low", "high"):
                wanted = getattr(getattr(expected, name), bound)
                assert getattr(getattr(figures, name), bound) == pytest.approx(wanted, rel=tolerance, abs=tolerance)


def test_contexts_that_are_shared_change_no_score() -> None:
    generator = np.random.default_rng(2)
    prompt = generator.integers(VOCABULARY, size=90)
    rows = [as_example([*prompt, *generator.integers(VOCABULARY, size=5)], 90) for _ in range(6)]
    examples = Dataset(rows, groups=range(6))
    apart = all_scored(Asked(), budget=400, examples=examples)
    shared = all_scored(Asked(), budget=400, shares=True, examples=examples)
    for one, other in zip(shared, apart, strict=True):
        assert one.scores.log_prob == pytest.approx(other.scores.log_prob, abs=1e-10)


def test_gold_without_its_context_follows_the_beginning_token() -> None:
    examples = some_examples()
    for one, example in zip(all_scored(Asked(without_context=True, beginning=(7,))), examples, strict=True):
        gold = example.token_ids[example.target_weights > 0].tolist()
        plain = plain_log_probs(tiny_model(), as_example([7, *gold], 1))
        assert one.scores.log_prob_without_context == pytest.approx(plain.sum(), abs=1e-10)
    difficulty = summary_of(all_scored(Asked(without_context=True, beginning=(7,)))).difficulty
    assert difficulty is not None
    ratios = [
        math.exp((one.scores.log_prob_without_context - one.scores.log_prob) / one.scores.num_target_tokens)
        for one in all_scored(Asked(without_context=True, beginning=(7,)))
        if one.scores.log_prob_without_context is not None
    ]
    assert difficulty.mean.estimate == pytest.approx(np.mean(ratios))
    assert difficulty.quantiles[2] == pytest.approx(np.median(ratios))
    assert difficulty.share_above_one.estimate == np.mean([ratio > 1 for ratio in ratios])


def test_going_on_after_a_window_gives_the_rest_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("goldsmith.scoring.score._WINDOW_EXAMPLES", 7)
    model, texts, examples = LikelihoodModel(tiny_model().float()), TokenTexts(byte_tokenizer()), some_examples()
    whole = list(score_windows(model, texts, examples, Asked(), tokens_per_microbatch=64))
    assert [len(window) for window in whole] == [7, 7, 7, 4]
    rest = list(score_windows(model, texts, examples, Asked(), tokens_per_microbatch=64, first=14))
    assert [[one.scores for one in window] for window in rest] == [
        [one.scores for one in window] for window in whole[2:]
    ]


def test_windows_end_by_examples_or_by_tokens_and_hold_one_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("goldsmith.scoring.score._WINDOW_EXAMPLES", 3)
    monkeypatch.setattr("goldsmith.scoring.score._WINDOW_PACKS", 2)
    examples = [(row, as_example([0] * length, 1)) for row, length in enumerate([5, 5, 50, 2, 2, 2, 2])]
    found = [[row for row, _ in window] for window in windows(examples, 6)]
    assert found == [[0, 1], [2], [3, 4, 5], [6]]
    assert [[row for row, _ in window] for window in windows(examples[3:], 6)] == found[2:]


# --- the figures


def test_figures_and_breakdowns_against_plain_sums() -> None:
    examples, scored = some_examples(), all_scored(Asked(tokens=True))
    tokens = [token for one in scored for token in one.scores.tokens or ()]
    summary = summary_of(scored)
    assert summary.nll_per_token.estimate == pytest.approx(-sum(token.log_prob for token in tokens) / len(tokens))
    assert summary.token_accuracy is not None
    assert summary.token_accuracy.estimate == np.mean([token.rank == 1 for token in tokens])
    assert summary.exact is not None
    assert summary.exact.estimate == np.mean([all(t.rank == 1 for t in one.scores.tokens or ()) for one in scored])
    assert summary.weighted_nll is not None
    sums = sum_log_likelihood(LikelihoodModel(tiny_model()), examples, tokens_per_microbatch=64)
    assert summary.weighted_nll.estimate == pytest.approx(sums.nll, rel=1e-12)
    assert summary.is_weighted
    assert "as a training run evaluates it" in str(summary)

    expected: dict[str, list[float]] = {}
    for one in scored:
        for position, token in enumerate(one.scores.tokens or (), start=1):
            label = "1" if position == 1 else "2-4" if position <= 4 else "5-16" if position <= 16 else "17-64"
            expected.setdefault(label, []).append(token.log_prob)
    found = {group.label: group for group in summary.groups if group.by == "position"}
    assert list(found) == ["1", "2-4", "5-16", "17-64"][: len(found)]
    for label, log_probs in expected.items():
        assert found[label].num_target_tokens == len(log_probs)
        assert found[label].log_prob == pytest.approx(sum(log_probs))
    for by in ("length", "turn"):
        groups = [group for group in summary.groups if group.by == by]
        assert sum(group.num_target_tokens for group in groups) == len(tokens)
        assert sum(group.log_prob for group in groups) == pytest.approx(summary.log_prob)
    assert "by position in gold" in str(summary)


def test_greedy_decoding_writes_what_is_said_to_be_decoded_exactly() -> None:
    """An example whose gold is the greedy continuation has rank 1 throughout, and one changed token has not."""
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    ids = [3, 9, 4]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % VOCABULARY]
    examples = Dataset([as_example(ids, 3), as_example(other, 3)], groups=[0, 1])
    scored = all_scored(Asked(), examples=examples)
    assert [bool(one.gold.is_best.all()) for one in scored] == [True, False]
    assert summary_of(scored).exact.estimate == 0.5  # type: ignore[union-attr]


def test_turns_are_stretches_of_gold_or_the_turn_of_the_id() -> None:
    example = as_example([1, 2, 3, 4, 5], 1)
    example.target_weights[2] = 0
    assert turn_numbers(example).tolist() == [1, 2, 2]
    named = TokenizedExample(
        token_ids=example.token_ids,
        target_weights=example.target_weights,
        example_id="chat:4@3",
        example_weight=1.0,
        source="",
        num_bytes=1,
    )
    assert turn_numbers(named).tolist() == [3, 3, 3]


def test_roles_add_up_to_the_whole() -> None:
    """Two roles side by side in one row, one role alone in another: each token is summed up under its own."""
    both = replace(
        as_example([1, 2, 3, 4, 5, 6], 2),
        turns=(GoldTurn(begin=2, number=1, role="user"), GoldTurn(begin=4, number=2, role="assistant")),
    )
    alone = replace(as_example([7, 8, 9], 1), turns=(GoldTurn(begin=1, number=1, role="assistant"),))
    assert turn_numbers(both).tolist() == [1, 1, 2, 2]
    scored = all_scored(Asked(tokens=True), examples=Dataset([both, alone], groups=[0, 1]))
    summary = summary_of(scored)
    roles = {group.label: group for group in summary.groups if group.by == "role"}
    first, second = ([token.log_prob for token in one.scores.tokens or ()] for one in scored)
    assert roles["user"].log_prob == pytest.approx(sum(first[:2]), rel=1e-12)
    assert roles["assistant"].log_prob == pytest.approx(sum(first[2:]) + sum(second), rel=1e-12)
    assert [(role, group.num_examples, group.num_target_tokens) for role, group in roles.items()] == [
        ("assistant", 2, 4), ("user", 1, 2)
    ]  # fmt: skip
    assert "by role of gold" in str(summary)
    [only] = [group for group in summary_of(scored[1:]).groups if group.by == "role"]
    whole = summary_of(scored[1:])
    assert (only.log_prob, only.nll_per_token, only.token_accuracy) == (
        whole.log_prob, whole.nll_per_token, whole.token_accuracy
    )  # fmt: skip
    assert "by role" not in str(whole), "it says what the figures above it say"
    unknown = all_scored(Asked(), examples=Dataset([as_example([7, 8, 9], 1)]))
    assert "role" not in {group.by for group in summary_of(unknown).groups}


def test_by_source_from_the_names_in_the_rows() -> None:
    def row(name: str, source_name: str, log_prob: float) -> TokenScores:
        return TokenScores(
            example_id=name, source="", source_name=source_name, log_prob=log_prob, num_target_tokens=2, num_bytes=3
        )

    summary = summarize([row("a", "laws", -2.0), row("b", "maths", -4.0), row("c", "laws", -3.0)])
    sources = {group.label: (group.num_examples, group.nll_per_token.estimate) for group in summary.groups}
    assert sources == {"laws": (2, 1.25), "maths": (1, 2.0)}
    assert summary.token_accuracy is None
    frame = summary.to_pandas()
    assert frame["by"].tolist() == ["all", "source", "source"]
    assert frame["nll_per_token"].tolist() == pytest.approx([1.5, 1.25, 2.0])
    assert "laws" in summary._repr_html_()
    assert "&lt;b&gt;" in summarize([row("a", "<b>", -1.0), row("b", "c", -1.0)])._repr_html_()


def test_alternatives_of_a_tokenizer_that_drops_a_leading_space_keep_it() -> None:
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    assert texts.of_token(tokenizer(" ").input_ids[0]) == " "
    assert texts.of_token(tokenizer("rk").input_ids[0]) == "rk"


def test_a_name_out_of_the_data_does_nothing_to_a_terminal() -> None:
    """Roles are what rows call them."""
    tally = ScoreTally(2)
    for row, role in enumerate(("\x1b[2J", "\ud800\u202e\n")):
        score = TokenScores(example_id=role, source=f"f:{row}", log_prob=-1.0, num_target_tokens=1, num_bytes=1)
        tally.add(score, {("role", role): (-1.0, 1, -1)}, row=row)
    shown = str(tally.summary(num_resamples=10))
    assert "by role of gold" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "\\x1b[2J" in shown
    assert "\\xd800\\x202e\\x0a" in shown
