"""Plain rows: the ids of a server, gold with its end token once, weights beside ids, and no control token out of text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import TEXTS, learnt, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.rows import Rejection
from goldsmith.data.tokenizer import load_tokenizer
from goldsmith.errors import ConfigError, DataError
from goldsmith.types import Conversation, Message, TokenizedExample


def renderer(tokenizer: PreTrainedTokenizerFast, max_length: int | None = None, **config: Any) -> Renderer:
    return Renderer(tokenizer, RenderingConfig(**config), max_length)


def one(found: Renderer, conversation: Conversation) -> TokenizedExample:
    [examples] = found.render([conversation])
    assert not isinstance(examples, Rejection), examples
    [example] = examples
    return example


def refusal(found: Renderer, conversation: Conversation) -> Rejection:
    [rejection] = found.render([conversation])
    assert isinstance(rejection, Rejection)
    return rejection


def gold(example: TokenizedExample) -> list[int]:
    return example.token_ids[example.target_weights > 0].tolist()


def context(example: TokenizedExample) -> list[int]:
    return example.token_ids[example.target_weights == 0].tolist()


def test_separate_is_what_a_server_meets(bpe: PreTrainedTokenizerFast) -> None:
    found = renderer(bpe, separator=" ->")
    row = plain("Once upon", " a time", example_weight=2.5)
    example = one(found, row)
    served = bpe("Once upon ->")["input_ids"]
    assert context(example) == served == found.render_context(row)
    assert gold(example) == [*bpe(" a time", add_special_tokens=False)["input_ids"], bpe.eos_token_id]
    assert example.token_ids.tolist() == served + gold(example)
    assert example.token_ids.dtype == np.int32
    assert example.target_weights.dtype == np.float32
    assert set(example.target_weights.tolist()) == {0.0, 1.0}
    assert (example.example_id, example.source, example.example_weight) == ("row:0", "row.jsonl:1", 2.5)
    assert example.num_bytes == len(" a time")
    assert example.target_weights[0] == 0


def test_num_bytes_counts_utf8(bpe: PreTrainedTokenizerFast) -> None:
    assert one(renderer(bpe), plain("x", "é日")).num_bytes == 5


@functools.cache
def _cached(kind: str, boundary: str) -> Renderer:
    return renderer(learnt(kind), boundary=boundary)


@pytest.mark.parametrize("kind", ["character", "byte", "bpe", "unigram"])
@settings(deadline=None, max_examples=60)
@given(
    prompt=st.text(max_size=12),
    completion=st.text(min_size=1, max_size=12),
    boundary=st.sampled_from(["separate", "joint"]),
)
def test_every_row_says_its_text(kind: str, prompt: str, completion: str, boundary: str) -> None:
    found = _cached(kind, boundary)
    tokenizer = found.tokenizer
    example = one(found, plain(prompt, completion))
    ids = example.token_ids.tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    # Exactly one beginning and one end, whatever the text spells.
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 1
    if tokenizer.unk_token_id not in ids:
        assert tokenizer.decode(ids[1:-1]) == prompt + completion
    # Gold is one run at the end.
    first = int(np.flatnonzero(example.target_weights)[0])
    assert (example.target_weights[first:] == 1).all()
    assert first >= 1


@pytest.mark.parametrize("boundary", ["separate", "joint"])
def test_text_rendered_beforehand_has_its_beginning_and_end_once(bpe: PreTrainedTokenizerFast, boundary: str) -> None:
    alone = one(renderer(bpe, boundary=boundary), plain("Once upon", " a time"))
    row = plain("<s>Once upon", " a time</s>")
    found = renderer(bpe, boundary=boundary, allow_control_tokens="all")
    assert one(found, row).token_ids.tolist() == alone.token_ids.tolist() == [*found.render_context(row), *gold(alone)]
    assert one(found, row).target_weights.tolist() == alone.target_weights.tolist()
    # The end that the text spells is the end: what is said of it holds.
    untrained = renderer(bpe, boundary=boundary, allow_control_tokens="all", train_on_end_token=False)
    assert gold(one(untrained, row)) == gold(alone)[:-1]
    assert untrained.render([row])[0][0].token_ids[-1] == bpe.eos_token_id
    assert refusal(found, plain("<s>Once upon", "</s>")).reason == "no gold token"
    # Two in the text are two, less the one that is appended.
    doubled = one(found, plain("<s><s>Once upon", " a time</s></s>"))
    assert doubled.token_ids.tolist() == [bpe.bos_token_id, *alone.token_ids.tolist(), bpe.eos_token_id]


@pytest.mark.parametrize("text", ["</s>", "say </s> now", "<s>", "a <s></s><unk> b"])
@pytest.mark.parametrize("kind", ["bpe", "byte", "character", "prepending"])
def test_a_literal_control_token_stays_text(kind: str, text: str, prepending: PreTrainedTokenizerFast) -> None:
    tokenizer = prepending if kind == "prepending" else learnt(kind)
    before = tokenizer("x </s>")["input_ids"]
    example = one(renderer(tokenizer), plain(text, text))
    ids = example.token_ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids.count(tokenizer.bos_token_id) == 1
    if tokenizer.unk_token_id not in ids:
        assert tokenizer.decode(gold(example)[:-1]) == text
    # The caller's tokenizer works on as before: for it, `</s>` is the control token.
    assert tokenizer("x </s>")["input_ids"] == before
    assert tokenizer.eos_token_id in before


def test_a_tokenizer_that_puts_a_mark_before_every_text(prepending: PreTrainedTokenizerFast) -> None:
    example = one(renderer(prepending), plain("Once upon", "a time"))
    assert context(example) == prepending("Once upon")["input_ids"]
    assert context(example)[0] == prepending.bos_token_id
    assert example.token_ids.tolist().count(prepending.bos_token_id) == 1
    assert gold(example)[:-1] == prepending("a time", add_special_tokens=False)["input_ids"]


def test_the_boundary_joint_gives_a_straddling_token_to_the_gold(bpe: PreTrainedTokenizerFast) -> None:
    whole = bpe("Once upon", add_special_tokens=False)["input_ids"]
    starts = [
        begin for begin, _ in bpe("Once upon", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ]
    cut = next(at for at in range(1, 9) if at not in starts)  # within a token
    row = plain("Once upon"[:cut], "Once upon"[cut:])
    joint, separate = renderer(bpe, boundary="joint"), renderer(bpe)
    example = one(joint, row)
    assert example.token_ids.tolist() == [bpe.bos_token_id, *whole, bpe.eos_token_id]
    first_gold = gold(example)[0]
    assert bpe.decode(context(example)[1:]) != "Once upon"[:cut]  # part of the prompt is in the straddling token
    assert "Once upon"[cut - 1] in bpe.decode([first_gold])
    one(separate, row)
    assert (joint.num_straddles, separate.num_straddles) == (1, 1)
    clean = plain("Once", " upon")
    assert one(joint, clean).token_ids.tolist() == one(separate, clean).token_ids.tolist()
    assert (joint.num_straddles, separate.num_straddles) == (1, 1)


def test_joint_of_a_row_that_is_one_token_still_has_a_context() -> None:
    tokenizer = _bare_tokenizer(bos=None, eos="</s>", vocabulary=["a", "b", "ab"], merges=[("a", "b")])
    example = one(renderer(tokenizer, boundary="joint"), plain("a", "b"))
    assert tokenizer.convert_ids_to_tokens(example.token_ids.tolist()) == ["</s>", "ab", "</s>"]
    assert example.target_weights.tolist() == [0, 1, 1]


def _bare_tokenizer(
    *,
    bos: str | None,
    eos: str | None,
    vocabulary: list[str],
    merges: list[tuple[str, str]] = [],  # noqa: B006
) -> PreTrainedTokenizerFast:
    """Adds nothing by itself, and has no unknown token: characters that it does not know vanish."""
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    backend.add_special_tokens([token for token in (bos, eos) if token is not None])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def test_an_empty_context_is_the_beginning_token_else_the_end_token_else_refused() -> None:
    both = _bare_tokenizer(bos="<s>", eos="</s>", vocabulary=["a", "b"])
    assert one(renderer(both), plain("", "ab")).token_ids.tolist()[0] == both.bos_token_id
    assert renderer(both).render_context(plain("", "ab")) == [both.bos_token_id]
    end_only = _bare_tokenizer(bos=None, eos="</s>", vocabulary=["a", "b"])
    assert one(renderer(end_only), plain("", "ab")).token_ids.tolist()[0] == end_only.eos_token_id
    neither = renderer(_bare_tokenizer(bos=None, eos=None, vocabulary=["a", "b"]), append_end_token=False)
    assert refusal(neither, plain("", "ab")).reason == "empty context"
    assert one(neither, plain("a", "b")).token_ids.tolist() == [0, 1]
    assert one(renderer(both, separator="b"), plain("", "a")).token_ids.tolist() == [1, 0, both.eos_token_id]
    with pytest.raises(DataError, match="context is empty"):
        neither.render_context(plain("", "ab"))


def test_text_that_vanishes_in_the_tokenizer_is_no_gold() -> None:
    tokenizer = _bare_tokenizer(bos="<s>", eos="</s>", vocabulary=["a", "b"])
    assert refusal(renderer(tokenizer), plain("a", "日本")).reason == "no gold token"


def test_weight_0_is_no_gold(bpe: PreTrainedTokenizerFast) -> None:
    row = Conversation(
        messages=(Message(role="user", content="a"), Message(role="assistant", content="b", weight=0.0)),
        example_id="r",
        source="s",
    )
    assert refusal(renderer(bpe), row).reason == "no gold token"


def test_without_an_end_token(bpe: PreTrainedTokenizerFast) -> None:
    assert one(renderer(bpe, append_end_token=False), plain("Once", " upon")).token_ids.tolist()[-1] != bpe.eos_token_id
    with pytest.raises(ConfigError, match="tokenizer has none"):
        renderer(_bare_tokenizer(bos="<s>", eos=None, vocabulary=["a"])).render([plain("a", "a")])


def test_longer_than_max_length_is_rejected_never_cut(character: PreTrainedTokenizerFast) -> None:
    row = plain("abc", "de")  # <s> a b c d e </s>
    assert one(renderer(character, max_length=7), row).num_tokens == 7
    rejection = refusal(renderer(character, max_length=6), row)
    assert rejection.reason == "longer than max_length"
    assert "7 tokens" in rejection.detail
    assert "max_length is 6" in rejection.detail


def test_settings_kept_in_a_tokenizer_file_neither_cut_nor_pad(character: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(character.backend_tokenizer.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert one(renderer(tokenizer), plain("abc", "de")).num_tokens == 7


def test_a_batch_keeps_its_order(bpe: PreTrainedTokenizerFast) -> None:
    rows = [plain(text[:9], text[9 : 9 + index % 7], example_id=f"r:{index}") for index, text in enumerate(TEXTS * 10)]
    found = renderer(bpe)
    results = found.render(rows)
    for row, result in zip(rows, results, strict=True):
        [alone] = found.render([row])
        if isinstance(result, Rejection):
            assert isinstance(alone, Rejection)
            assert not row.messages[1].content
        else:
            assert not isinstance(alone, Rejection)
            assert result[0].token_ids.tolist() == alone[0].token_ids.tolist()
            assert result[0].example_id == row.example_id
    assert found.render([]) == []


def test_end_token_ids(bpe: PreTrainedTokenizerFast) -> None:
    assert renderer(bpe).end_token_ids == [bpe.eos_token_id]


def test_a_slow_tokenizer_gives_the_same(bpe: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path for tokenizers without a `tokenizers` backend, held to the same ids."""
    row = plain("Once </s> upon", " a <s> time")
    expected = one(renderer(bpe), row)
    monkeypatch.setattr("goldsmith.data.encoding.PreTrainedTokenizerFast", ())
    slow = renderer(bpe)
    assert one(slow, row).token_ids.tolist() == expected.token_ids.tolist()
    with pytest.raises(ConfigError, match="offsets"):
        renderer(bpe, boundary="joint")


def test_stories260k(shared_folder: Path) -> None:
    tokenizer = load_tokenizer(shared_folder / "models" / "stories260k")
    found = Renderer(tokenizer, RenderingConfig(), None)
    example = one(found, plain("Once upon a time", "there was </s> a girl"))
    ids = example.token_ids.tolist()
    assert context(example) == tokenizer("Once upon a time")["input_ids"]
    assert (ids.count(1), ids.count(2)) == (1, 1)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(gold(example)[:-1]) == "there was </s> a girl"


def test_an_unreadable_template(
    bpe: PreTrainedTokenizerFast, template_file: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        renderer(bpe, chat_template=str(tmp_path / "no.jinja"))
