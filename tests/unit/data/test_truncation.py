"""Rows longer than `max_length`: each policy token by token, and nothing lost without being counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import CHATML, LLAMA3, REASONING, learnt
from hypothesis import given, settings
from hypothesis import strategies as st

from goldsmith.data.config import DataConfig
from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import load_dataset
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.rows import Rejection
from goldsmith.data.stream import ExampleStream
from goldsmith.data.truncation import (
    LengthLimit,
    LengthPolicy,
    cut_left,
    cut_right,
    fit_row,
    shorten_context,
    split_gold,
)
from goldsmith.errors import DataError
from goldsmith.objective.normalization import step_denominator
from goldsmith.types import Conversation, Message, TokenizedExample

END = 1
POLICIES: tuple[LengthPolicy, ...] = ("reject", "drop", "left", "right", "split")
CHARACTERS = learnt("character")
PIECES = learnt("bpe")


def example(runs: str, *, weight: float = 1.0, from_end: bool = False, **fields: Any) -> TokenizedExample:
    """`ccggge`: context, gold, gold that is the end token; other ids count from 10."""
    places = range(len(runs))[::-1] if from_end else range(len(runs))
    ids = [END if kind == "e" else 10 + place for place, kind in zip(places, runs, strict=True)]
    weights = [0.0 if kind == "c" else weight for kind in runs]
    values = {"example_id": "row", "example_weight": 1.0, "source": "rows:1", "num_bytes": runs.count("g"), **fields}
    return TokenizedExample(token_ids=np.array(ids, np.int32), target_weights=np.array(weights, np.float32), **values)


def shown(one: TokenizedExample) -> list[tuple[int, float]]:
    return list(zip(one.token_ids.tolist(), one.target_weights.tolist(), strict=True))


def load(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    tokenizer: Any = CHARACTERS,
    template: str | None = None,
    rendering: dict[str, Any] | None = None,
    parts_share_weight: bool = False,
    max_length: int | None = None,
    **config: Any,
) -> Dataset:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings_ = dict(rendering or {})
    if template is not None:
        (folder / "template.jinja").write_text(template)
        settings_["chat_template"] = str(folder / "template.jinja")
    data = DataConfig.model_validate({"train": "rows.jsonl", **config})
    renderer = Renderer(tokenizer, RenderingConfig(**settings_), max_length, keeps_long_rows=True)
    return load_dataset(
        data.train,
        config=data,
        renderer=renderer,
        base_folder=folder,
        split="train",
        parts_share_weight=parts_share_weight,
    )


def text(data: Dataset, index: int) -> str:
    return str(CHARACTERS.decode(data[index].token_ids.tolist()))


# --- right


def test_right_cuts_gold_and_takes_the_end_token() -> None:
    cut = cut_right(example("cccgggge"), 6, end_ids={END})
    assert cut is not None
    assert shown(cut) == [(10, 0), (11, 0), (12, 0), (13, 1), (14, 1), (15, 1)]
    assert cut.num_bytes == 3


def test_right_keeps_the_end_token_where_asked() -> None:
    cut = cut_right(example("cccgggge", weight=0.5), 6, end_ids={END}, keep_end_token=True)
    assert cut is not None
    assert shown(cut) == [(10, 0), (11, 0), (12, 0), (13, 0.5), (14, 0.5), (END, 0.5)]
    assert cut.num_bytes == 2
    # One gold token alone is not turned into an end token: the model would learn to say nothing.
    lone = cut_right(example("cccgggge"), 4, end_ids={END}, keep_end_token=True)
    assert lone is not None
    assert shown(lone)[-1] == (13, 1)
    # Gold without an end token gets none.
    without = cut_right(example("cccgggg"), 6, end_ids={END}, keep_end_token=True)
    assert without is not None
    assert shown(without)[-1] == (15, 1)


def test_right_over_several_turns_ends_with_gold() -> None:
    turns = example("ccggeccccgge")
    for max_length in (5, 6, 9):  # between the turns: the first is whole, and its end token is its own
        cut = cut_right(turns, max_length, end_ids={END}, keep_end_token=True)
        assert cut is not None
        assert shown(cut) == shown(turns)[:5]
    assert cut_right(turns, 2) is None
    assert cut_right(turns, 12) is turns


# --- split


def test_split_predicts_each_token_once() -> None:
    parts = split_gold(example("cccggggge"), 5)
    assert parts is not None
    context = [(10, 0), (11, 0), (12, 0)]
    assert [shown(part) for part in parts] == [
        [*context, (13, 1), (14, 1)],
        [*context, (15, 1), (16, 1)],
        [*context, (17, 1), (END, 1)],
    ]
    assert [part.example_id for part in parts] == ["row#1", "row#2", "row#3"]
    assert sum(part.num_bytes for part in parts) == 5
    assert split_gold(example("cccge"), 3) is None


def test_split_over_several_turns_leaves_out_a_part_without_gold() -> None:
    parts = split_gold(example("cgeccccccge"), 3)
    assert parts is not None
    assert [shown(part) for part in parts] == [
        [(10, 0), (11, 1), (END, 1)],
        [(10, 0), (19, 1), (END, 1)],
    ]


@pytest.mark.parametrize("normalization", ["token", "example", "sum"])
def test_the_parts_weigh_as_the_whole(normalization: Any) -> None:
    """With the same nll of each token, loss and denominator of a step are those of the row in one piece."""
    row = example("cc" + "g" * 7 + "e", weight=0.5, example_weight=3.0)
    parts = split_gold(row, 5, share_weight=normalization == "example")
    assert parts is not None
    assert len(parts) == 3
    nll_of = {int(token): 0.1 * place for place, token in enumerate(row.token_ids)}

    def loss(examples: list[TokenizedExample]) -> float:
        nll = [
            sum(w * nll_of[int(i)] for i, w in zip(one.token_ids, one.target_weights, strict=True)) for one in examples
        ]
        u = np.array([one.example_weight for one in examples])
        w = np.array([one.weight_sum for one in examples])
        sums = u * np.array(nll) / (w if normalization == "example" else 1.0)
        return float(sums.sum() / step_denominator(u, w, normalization))

    other = example("cgg", example_weight=0.7)
    assert loss([*parts, other]) == pytest.approx(loss([row, other]), rel=1e-12)


# --- left


def test_left_shortens_a_plain_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "What is a little girl?", "completion": "Hello"}, {"prompt": "Hi", "completion": "Hello"}]
    data = load(tmp_path, rows, max_length=12, on_too_long="left")
    assert [text(data, 0), text(data, 1)] == ["<s>girl?Hello</s>", "<s>HiHello</s>"]
    assert data[0].target_weights.tolist() == [0] * 6 + [1] * 6
    [file] = data.report.files
    assert (file.too_long, file.cut, file.used) == (1, 1, 2)
    assert (file.tokens_lost, file.gold_tokens_lost, file.tokens_repeated) == (17, 0, 0)


def test_left_keeps_the_separator(tmp_path: Path) -> None:
    row = {"prompt": "What is a little girl?", "completion": "Hello"}
    data = load(tmp_path, [row], max_length=12, on_too_long="left", rendering={"separator": "\n\n"})
    assert text(data, 0) == "<s>rl?\n\nHello</s>"


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_left_keeps_every_mark_of_a_template(tmp_path: Path, template: str) -> None:
    def chat(system: str, first: str, second: str) -> dict[str, Any]:
        contents = [
            ("system", system),
            ("user", first),
            ("assistant", "It is 4."),
            ("user", second),
            ("assistant", "Hello!"),
        ]
        return {"messages": [{"role": role, "content": content} for role, content in contents]}

    whole = chat("You are kind.", "What is 2 + 2?", "Hi there, how are you?")
    [length] = load(tmp_path, [whole], template=template).lengths
    for lost, shorter in [
        (8, chat("You are kind.", "2 + 2?", "Hi there, how are you?")),
        (14 + 10, chat("You are kind.", "", "how are you?")),
        (14 + 22 + 4, chat("are kind.", "", "")),
    ]:
        data = load(tmp_path, [whole], template=template, max_length=length - lost, on_too_long="left")
        expected = load(tmp_path, [shorter], template=template)
        assert shown(data[0]) == shown(expected[0])
        assert data.report.files[0].tokens_lost == lost
    with pytest.raises(DataError, match=r"longer than max_length: 1 row\n.*the gold \(16 tokens\)"):
        load(tmp_path, [whole], template=template, max_length=length - 14 - 22 - 13, on_too_long="left")


def test_left_cuts_text_of_a_tokenizer_with_merges(tmp_path: Path) -> None:
    prompt = "Once upon a time there was a little girl named Lily. She loved to play outside. " * 3
    row = {"prompt": prompt, "completion": "Hello! Hi there, how are you?"}
    [whole] = load(tmp_path, [row], tokenizer=PIECES)
    for max_length in range(whole.num_target_tokens + 2, whole.num_tokens):
        data = load(tmp_path, [row], tokenizer=PIECES, max_length=max_length, on_too_long="left")
        kept = data.context_text(0, PIECES).removeprefix("<s>")
        assert prompt.endswith(kept)
        [served] = load(tmp_path, [{**row, "prompt": kept}], tokenizer=PIECES)
        assert shown(data[0]) == shown(served)  # what a server makes of the text that is left
        assert max_length - 3 <= data[0].num_tokens <= max_length


def test_left_cuts_the_ids_of_a_row_that_came_tokenised() -> None:
    row = example("ccccgge")
    cut = cut_left(row, 5)
    assert cut is not None
    assert shown(cut) == [(12, 0), (13, 0), (14, 1), (15, 1), (END, 1)]
    cut = cut_left(row, 5, beginning_id=10)
    assert cut is not None
    assert shown(cut) == [(10, 0), (13, 0), (14, 1), (15, 1), (END, 1)]
    assert cut_left(row, 4, beginning_id=10) is None
    assert cut_left(row, 3) is None
    fitted = fit_row(
        row, [row], LengthLimit(max_length=5, policy="left"), render=lambda _: [], token_starts=len,  # type: ignore[arg-type]
        count_bytes=len, end_ids={END}, beginning_id=10,
    )  # fmt: skip
    assert not isinstance(fitted.examples, Rejection)
    assert shown(fitted.examples[0]) == shown(cut)
    assert (fitted.losses.rows_cut, fitted.losses.tokens_lost, fitted.losses.gold_tokens_lost) == (1, 2, 0)


def test_shortening_moves_spans() -> None:
    user = Message(role="user", content="abcdef", spans=((0, 2, 0.5), (3, 5, 2.0)))
    row = Conversation(messages=(user, Message(role="assistant", content="x")), example_id="a", source="b:1")
    shorter = shorten_context(row, 4, lambda content: range(len(content)))
    assert shorter is not None
    assert shorter.messages[0] == Message(role="user", content="ef", spans=((0, 1, 2.0),))
    assert shorten_context(row, 6, lambda content: range(len(content))) is None


# --- through the loader


def test_drop_never_stops_and_is_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": "Hello" * count} for count in (1, 9, 1)]
    data = load(tmp_path, rows, max_length=20, on_too_long="drop")
    assert data.example_ids == ["rows:0", "rows:2"]
    assert data.groups.tolist() == [0, 1]
    [file] = data.report.files
    assert (file.rows_in, file.used, file.dropped, file.too_long, file.rejected) == (3, 2, 1, 1, {})
    assert (file.tokens_lost, file.gold_tokens_lost) == (3 + 46, 46)


def test_reject_stops_and_says_what_to_set(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": "Hello" * count} for count in (1, 9)]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 49 tokens, but max_length is 20; .* data\.on_too_long"):
        load(tmp_path, rows, max_length=20)
    data = load(tmp_path, rows, max_length=20, on_bad_row="skip")
    [file] = data.report.files
    assert (file.rejected, file.too_long, file.tokens_lost, file.gold_tokens_lost) == (
        {"longer than max_length": 1}, 1, 49, 46,
    )  # fmt: skip


def test_right_and_split_through_the_loader(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": "Hello there"}]
    data = load(tmp_path, rows, max_length=8, on_too_long="right")
    assert text(data, 0) == "<s>HiHello"
    assert data.num_bytes.tolist() == [5]
    data = load(tmp_path, rows, max_length=8, on_too_long="right", end_token_after_cut=True)
    assert text(data, 0) == "<s>HiHell</s>"
    assert data.num_bytes.tolist() == [4]
    data = load(tmp_path, rows, max_length=8, on_too_long="split")
    assert [text(data, index) for index in range(3)] == ["<s>HiHell", "<s>Hio th", "<s>Hiere</s>"]
    assert (data.example_ids, data.groups.tolist()) == (["rows:0#1", "rows:0#2", "rows:0#3"], [0, 0, 0])
    assert data.example_weights.tolist() == [1, 1, 1]
    [file] = data.report.files
    assert (file.split, file.tokens_lost, file.gold_tokens_lost, file.tokens_repeated) == (1, 0, 0, 6)
    data = load(tmp_path, rows, max_length=8, on_too_long="split", parts_share_weight=True)
    assert data.example_weights.tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(
        DataError, match="3 tokens stand before the gold, 12 from there on, and max_length is 3: no room"
    ):
        load(tmp_path, rows, max_length=3, on_too_long="split")


def test_the_turns_of_an_expanded_chat_are_cut_one_by_one(tmp_path: Path) -> None:
    contents = [("user", "Hi"), ("assistant", "Hello"), ("user", "What"), ("assistant", "It is 4. It is 4.")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in contents]}]
    whole = load(tmp_path, rows, template=REASONING)
    assert whole.example_ids == ["rows:0@1", "rows:0@2"]
    limit = int(whole.lengths[1]) - 5
    assert whole.lengths[0] < limit
    split = load(tmp_path, rows, template=REASONING, max_length=limit, on_too_long="split")
    assert split.example_ids == ["rows:0@1", "rows:0@2#1", "rows:0@2#2"]
    cut = load(tmp_path, rows, template=REASONING, max_length=limit, on_too_long="right")
    assert shown(cut[1]) == shown(whole[1])[:limit]
    dropped = load(
        tmp_path,
        [*rows, {"messages": rows[0]["messages"][:2]}],
        template=REASONING,
        max_length=limit,
        on_too_long="drop",
    )
    assert dropped.example_ids == ["rows:1"]


def test_a_part_that_splits_a_character_keeps_the_sum_of_bytes(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": "éé日本語é"}]
    data = load(tmp_path, rows, tokenizer=learnt("byte"), max_length=6, on_too_long="split")
    assert len(data) > 3
    assert data.num_bytes.sum() == len("éé日本語é".encode())
    assert (data.num_bytes >= 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_keeps_to_the_policy_and_resumes(tmp_path: Path, policy: LengthPolicy) -> None:
    rows = [{"prompt": "What is a girl?", "completion": "Hello" * (1 + 3 * (n % 3 == 2))} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig.model_validate(
        {
            "train": [{"path": "rows.jsonl", "streaming": True, "window": 3}],
            "on_too_long": policy,
            "on_bad_row": "skip",
        }
    )

    def open_stream() -> ExampleStream:
        renderer = Renderer(CHARACTERS, RenderingConfig(), 30, keeps_long_rows=True)
        return ExampleStream(config.train, config=config, renderer=renderer, seed=1, batch_size=2, base_folder=tmp_path)

    stream = open_stream()
    steps = [stream.step(number) for number in range(1, 6)]
    assert all((step.lengths <= 30).all() for step in steps)
    [file] = stream.report().files
    # Each third row is too long, by 8 tokens; the short ones are 22 long.
    assert file.too_long == file.rows_in // 3
    assert file.rows_in == file.used + file.dropped + sum(file.rejected.values())
    assert (file.dropped, file.cut, file.split) == tuple(
        file.too_long * (policy in policies) for policies in (("drop",), ("left", "right"), ("split",))
    )
    rendered = file.rows_in * 22 + 15 * file.too_long
    assert rendered == file.tokens + file.tokens_lost - file.tokens_repeated
    state = json.loads(json.dumps(stream.state()))
    going_on = open_stream()
    going_on.seek(state)
    assert going_on.report() == stream.report()
    assert going_on.step(6).fingerprint() == stream.step(6).fingerprint()


def test_rows_that_came_tokenised_keep_to_the_policy(tmp_path: Path) -> None:
    rows = [{"token_ids": [0, 5, 6, 7, 8, 9], "target_weights": [0, 0, 0, 1, 1, 1]}]
    data = load(tmp_path, rows, max_length=5, on_too_long="left")
    assert data[0].token_ids.tolist() == [5, 6, 7, 8, 9]
    assert data.report.files[0].tokens_lost == 1
    data = load(tmp_path, rows, max_length=5, on_too_long="split")
    assert [one.token_ids.tolist() for one in data[:]] == [[0, 5, 6, 7], [0, 5, 6, 8, 9]]
    with pytest.raises(DataError, match="6 tokens, but max_length is 5"):
        load(tmp_path, rows, max_length=5)


def test_a_renderer_that_rejects_is_refused(tmp_path: Path) -> None:
    data = DataConfig.model_validate({"train": [{"path": "rows.jsonl"}], "on_too_long": "left"})
    with pytest.raises(ValueError, match="keeps long rows"):
        load_dataset(data.train, config=data, renderer=Renderer(CHARACTERS, RenderingConfig(), 9), split="train")


def runs() -> st.SearchStrategy[str]:
    turn = st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans())
    return st.lists(turn, min_size=1, max_size=3).map(
        lambda turns: "".join("c" * context + "g" * gold + "e" * end for context, gold, end in turns)
    )


@settings(deadline=None, max_examples=300)
@given(
    st.lists(runs(), min_size=1, max_size=3),
    st.integers(2, 25),
    st.sampled_from(POLICIES),
    st.booleans(),
    st.booleans(),
)
def test_everything_is_accounted_for(
    shapes: list[str], max_length: int, policy: LengthPolicy, keep_end: bool, share: bool
) -> None:
    examples = [example(shape, from_end=True, example_id=f"row@{number}") for number, shape in enumerate(shapes)]
    row = Conversation(messages=(Message(role="user", content="x" * 40),), example_id="row", source="rows:1")

    def render(shorter: Conversation) -> list[TokenizedExample]:
        # As if every context were the last characters of the message, behind one first token.
        lost = 40 - len(shorter.messages[0].content)
        shorter_runs = [shape[0] + shape[1:][min(lost, shape.index("g") - 1) :] for shape in shapes]
        return [example(shape, from_end=True, example_id=f"row@{n}") for n, shape in enumerate(shorter_runs)]

    fitted = fit_row(
        row,
        examples,
        LengthLimit(max_length=max_length, policy=policy, end_token_after_cut=keep_end, parts_share_weight=share),
        render=render,
        token_starts=lambda content: range(len(content)),
        count_bytes=len,
        end_ids={END},
    )
    kept = [] if isinstance(fitted.examples, Rejection) else fitted.examples
    losses = fitted.losses
    tokens, gold = sum(map(len, shapes)), sum(shape.count("g") + shape.count("e") for shape in shapes)
    assert sum(one.num_tokens for one in kept) == tokens - losses.tokens_lost + losses.tokens_repeated
    assert sum(one.num_target_tokens for one in kept) == gold - losses.gold_tokens_lost
    assert losses.rows_too_long == (max(map(len, shapes)) > max_length)
    handled = losses.rows_dropped + losses.rows_cut + losses.rows_split + isinstance(fitted.examples, Rejection)
    assert handled == losses.rows_too_long
    assert all(one.num_tokens <= max_length for one in kept)
    assert all(one.num_target_tokens >= 1 and one.target_weights[0] == 0 for one in kept)
    if policy in ("right", "split"):
        before = Counter((one.example_id.partition("#")[0], t) for one in examples for t in gold_of(one))
        after = Counter((one.example_id.partition("#")[0], t) for one in kept for t in gold_of(one))
        assert after <= before  # each gold token at most once
        if policy == "split" and kept:
            assert after == before
    if share and policy == "split" and kept:
        assert sum(one.example_weight for one in kept) == pytest.approx(len(shapes))


def gold_of(one: TokenizedExample) -> list[int]:
    return one.token_ids[one.target_weights > 0].tolist()
