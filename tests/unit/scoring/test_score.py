"""Scores against a plain loop over one example at a time, whatever the packing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from lift import lifted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from goldsmith.data.loader import Dataset
from goldsmith.errors import DataError, NumericalError
from goldsmith.models.evaluate import iterate_log_probs, sum_log_likelihood
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.scoring.score import score_dataset
from goldsmith.scoring.summary import ScoreTally, summarize
from goldsmith.scoring.texts import gold_token_texts
from goldsmith.types import TokenizedExample, TokenScores

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
        ScoreTally().summary()
    with pytest.raises(DataError, match="how many gold tokens"):
        summarize([score("a", -1.0, 0)])


def test_unknown_bytes_give_no_bits_per_byte() -> None:
    assert summarize([score("a", -1.0, 1, num_bytes=0), score("b", -1.0, 1)]).bits_per_byte is None
