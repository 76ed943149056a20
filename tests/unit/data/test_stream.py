"""Streamed sources: drawn as the page says, and from a kept position on as if nothing had happened."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import REASONING, learnt
from pydantic import ValidationError

from goldsmith.data import stream as stream_module
from goldsmith.data.config import DataConfig
from goldsmith.data.loader import load_dataset
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.stream import ExampleStream
from goldsmith.errors import CheckpointError, ConfigError, DataError

Write = Callable[..., Path]
TOKENIZER = learnt("byte")


def rows(count: int, start: int = 0) -> list[dict[str, object]]:
    return [{"prompt": f"{n}", "completion": f"{n}."} for n in range(start, start + count)]


def open_stream(
    folder: Path, *sources: dict[str, Any], seed: int = 3, batch_size: int = 4, max_length: int = 60, **config: Any
) -> ExampleStream:
    data = DataConfig.model_validate({"train": [{"streaming": True, **source} for source in sources], **config})
    template = folder / "t.jinja"
    template.write_text(REASONING)
    rendering = RenderingConfig(chat_template=str(template))
    renderer = Renderer(TOKENIZER, rendering, max_length, keeps_long_rows="on_too_long" in config)
    return ExampleStream(
        data.train, config=data, renderer=renderer, seed=seed, batch_size=batch_size, base_folder=folder
    )


def drawn(stream: ExampleStream, first: int, last: int) -> list[list[str]]:
    return [stream.step(step).example_ids for step in range(first, last + 1)]


def reference(sources: list[tuple[list[list[str]], float, int]], *, seed: int, batch_size: int) -> Iterator[list[str]]:
    """The algorithm as the page describes it, over (rows of example ids, repeat, window)."""

    def endless(found: list[list[str]]) -> Iterator[list[str]]:
        while True:
            yield from found

    arrivals = [endless(found) for found, _, _ in sources]
    windows = [[next(arrival) for _ in range(size)] for arrival, (_, _, size) in zip(arrivals, sources, strict=True)]
    shares = np.cumsum([repeat / sum(r for _, r, _ in sources) for _, repeat, _ in sources])
    examples: list[str] = []
    draw = 0
    while True:
        while len(examples) < batch_size:
            block = np.random.Philox(np.random.SeedSequence([seed, 0x5712EA, draw // 1024])).random_raw(2048)
            which, where = (int(number) for number in block[2 * (draw % 1024) :][:2])
            draw += 1
            source = next(i for i, share in enumerate(shares) if (which >> 11) / 2**53 < share)
            place = where * len(windows[source]) // 2**64
            examples += windows[source][place]
            windows[source][place] = next(arrivals[source])
        yield examples[:batch_size]
        examples = examples[batch_size:]


def test_rows_are_drawn_as_the_page_says(tmp_path: Path, write_rows: Write) -> None:
    write_rows(rows(11), "a.jsonl")
    write_rows([{"prompt": "p"}, *rows(7)], "b.jsonl")
    write_rows(rows(2, 50), "c.jsonl")
    stream = open_stream(
        tmp_path,
        {"path": "a.jsonl", "window": 5, "repeat": 2.0},
        {"path": "b.jsonl", "window": 3, "weight": 2.5},
        {"path": "c.jsonl", "window": 4},  # larger than the source: it holds rows of two passes
        on_bad_row="skip",
        format="prompt_completion",
    )
    expected = reference(
        [
            ([[f"a:{n}"] for n in range(11)], 2.0, 5),
            ([[f"b:{n}"] for n in range(1, 8)], 1.0, 3),
            ([["c:0"], ["c:1"]], 1.0, 4),
        ],
        seed=3,
        batch_size=4,
    )
    for step in range(1, 41):
        data = stream.step(step)
        assert data.example_ids == next(expected)
        assert data.source_names == ["a", "b", "c"]
        names = [data.source_names[source] for source in data.source_indices]
        assert names == [example_id.partition(":")[0] for example_id in data.example_ids]
        assert data.example_weights.tolist() == [2.5 if name == "b" else 1.0 for name in names]
    [a, b, c] = stream.report().files
    assert a.rows_in == a.used
    assert b.rows_in == b.used + b.rejected["no completion"]
    assert b.rejected["no completion"] >= 2  # once a pass
    assert c.used > 2


def test_a_window_shuffles_and_every_row_comes_about_equally_often(tmp_path: Path, write_rows: Write) -> None:
    write_rows(rows(40), "a.jsonl")
    write_rows(rows(40), "b.jsonl")
    sources = [{"path": "a.jsonl", "window": 20, "repeat": 3.0}, {"path": "b.jsonl", "window": 20}]
    stream = open_stream(tmp_path, *sources, batch_size=10)
    counts = Counter(example_id for step in drawn(stream, 1, 400) for example_id in step)
    of_a = sum(count for example_id, count in counts.items() if example_id.startswith("a"))
    assert abs(of_a / 4000 - 0.75) < 0.03
    assert max(counts[f"a:{n}"] for n in range(40)) - min(counts[f"a:{n}"] for n in range(40)) <= 12
    steps = drawn(open_stream(tmp_path, sources[0], batch_size=10), 1, 4)
    assert steps[0] != [f"a:{n}" for n in range(10)]
    assert drawn(open_stream(tmp_path, sources[0], batch_size=10, seed=4), 1, 4) != steps
    assert drawn(open_stream(tmp_path, sources[0], batch_size=10), 1, 4) == steps


@pytest.mark.parametrize("at_once", [1, 256])
def test_a_position_is_gone_back_to_exactly(
    tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Rows of several parts, rejected rows, passes, and a window that is older than what was read last."""
    monkeypatch.setattr(stream_module, "_ROWS_AT_ONCE", at_once)
    turns = [{"role": ("user", "assistant")[n % 2], "content": "abcdef"[n]} for n in range(6)]
    chats: list[dict[str, object]] = [{"messages": turns[: 2 + 2 * (n % 3)]} for n in range(9)]
    chats[4] = {"messages": turns[:1]}
    write_rows(chats, "chats.jsonl")
    (tmp_path / "plain-1.jsonl").write_text("{broken\n" + "".join(json.dumps(row) + "\n" for row in rows(5)))
    write_rows(rows(4, 20), "plain-2.jsonl")
    sources = [
        {"path": "chats.jsonl", "window": 4},
        {"path": "plain-*.jsonl", "window": 3, "name": "plain", "repeat": 0.5},
    ]

    def opened() -> ExampleStream:
        return open_stream(tmp_path, *sources, on_bad_row="skip", max_length=200, batch_size=5)

    whole = opened()
    steps: list[list[str]] = []
    states: list[str] = [json.dumps(whole.state())]
    for step in range(1, 31):
        steps.append(whole.step(step).example_ids)
        states.append(json.dumps(whole.state()))
    assert any(part.startswith("chats") and "@" in part for step in steps for part in step)
    assert any(json.loads(state)["rest"] for state in states)
    for stopped in (0, 1, 2, 3, 7, 13, 24):
        again = opened()
        again.seek(json.loads(states[stopped]))
        assert json.dumps(again.state()) == states[stopped]
        for step in range(stopped + 1, min(stopped + 9, 31)):
            assert again.step(step).example_ids == steps[step - 1]
            assert json.dumps(again.state()) == states[step]
    # The same stream goes back as well, as it does after a measurement of its speed.
    whole.seek(None)
    assert drawn(whole, 1, 5) == steps[:5]
    with pytest.raises(ValueError, match="stands after step 5"):
        whole.step(5)


def test_the_first_step_is_known_before_training(tmp_path: Path, write_rows: Write) -> None:
    write_rows(rows(9), "a.jsonl")
    source = {"path": "a.jsonl", "window": 5}
    stream = open_stream(tmp_path, source)
    first = stream.first()
    assert stream.report().files[0].rows_in == 0
    assert stream.report().files[0].format == "prompt_completion"
    assert stream.step(1).example_ids == first.example_ids
    fingerprint = open_stream(tmp_path, source).fingerprint()
    assert open_stream(tmp_path, source).fingerprint() == fingerprint
    assert open_stream(tmp_path, source, seed=9).fingerprint() != fingerprint
    write_rows([*rows(9), *rows(1)], "a.jsonl")
    assert open_stream(tmp_path, source).fingerprint() != fingerprint


def test_a_bad_row_stops_at_the_row(tmp_path: Path, write_rows: Write) -> None:
    write_rows([*rows(6), {"prompt": "p"}, *rows(3)], "a.jsonl")
    stream = open_stream(tmp_path, {"path": "a.jsonl", "window": 2}, batch_size=2)
    drawn(stream, 1, 2)
    with pytest.raises(DataError, match=r"no completion\n  a\.jsonl:7: no field 'completion'") as error:
        stream.step(3)
    assert "on_bad_row: skip" in str(error.value)


def test_a_stream_without_a_row_to_use(tmp_path: Path, write_rows: Write) -> None:
    write_rows([{"prompt": "p", "completion": ""}] * 3, "a.jsonl")
    stream = open_stream(tmp_path, {"path": "a.jsonl", "window": 2}, on_bad_row="skip")
    with pytest.raises(DataError, match=r"a\.jsonl: no row of the stream can be used: empty completion: 3"):
        stream.step(1)


def test_a_stream_of_which_every_row_is_left_out_for_its_length(tmp_path: Path, write_rows: Write) -> None:
    write_rows([{"prompt": "p", "completion": "many words"}] * 3, "a.jsonl")
    stream = open_stream(tmp_path, {"path": "a.jsonl", "window": 2}, on_too_long="drop", max_length=4)
    with pytest.raises(DataError, match=r"can be used: longer than max_length: 3\n.*raise data.max_length"):
        stream.step(1)


def test_rows_that_are_gone_are_missed(tmp_path: Path, write_rows: Write) -> None:
    write_rows(rows(20), "a.jsonl")
    stream = open_stream(tmp_path, {"path": "a.jsonl", "window": 3})
    drawn(stream, 1, 3)
    write_rows(rows(4), "a.jsonl")
    with pytest.raises(CheckpointError, match=r"a\.jsonl no longer holds what the checkpoint stands at"):
        open_stream(tmp_path, {"path": "a.jsonl", "window": 3}).seek(stream.state())


def test_a_stream_of_the_hub(tmp_path: Path, write_rows: Write) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "gold").mkdir()
    write_rows(rows(6), "gold/train.jsonl")
    stream = open_stream(tmp_path, {"path": f"hf:{tmp_path}/gold", "split": "train", "window": 2}, batch_size=2)
    expected = reference([([[f"gold:{n}"] for n in range(6)], 1.0, 2)], seed=3, batch_size=2)
    assert drawn(stream, 1, 6) == [next(expected) for _ in range(6)]
    again = open_stream(tmp_path, {"path": f"hf:{tmp_path}/gold", "split": "train", "window": 2}, batch_size=2)
    again.seek(stream.state())
    assert again.step(7).example_ids == next(expected)


def test_a_limit_makes_a_streamed_source_one_that_is_held(tmp_path: Path, write_rows: Write) -> None:
    write_rows([{"prompt": "p"}, *rows(30)], "a.jsonl")
    source = {"path": "a.jsonl", "streaming": True, "limit": 5}
    config = DataConfig.model_validate({"train": "x.jsonl", "eval": source, "on_bad_row": "skip"})
    renderer = Renderer(TOKENIZER, RenderingConfig(), None)
    data = load_dataset(config.eval, config=config, renderer=renderer, split="eval", base_folder=tmp_path)
    assert data.example_ids == [f"a:{n}" for n in range(1, 6)]
    [file] = data.report.files
    assert (file.rows_in, file.used, file.over_limit) == (6, 5, 0)  # what lies behind is not read
    endless = config.eval[0].model_copy(update={"limit": None})
    with pytest.raises(ConfigError, match=r"a\.jsonl is streamed"):
        load_dataset([endless], config=config, renderer=renderer, split="train", base_folder=tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": [{"path": "a", "streaming": True}, {"path": "b"}]}, "mixes streamed sources .a. with others .b."),
        ({"train": "a", "eval": {"path": "b", "streaming": True}}, "b needs `limit`"),
        ({"train": {"path": "a", "window": 5}}, "set `streaming: true`"),
        ({"train": {"path": "a", "streaming": True, "window": 0}}, "greater than or equal to 1"),
    ],
)
def test_streams_that_no_recipe_may_ask_for(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate(data)
