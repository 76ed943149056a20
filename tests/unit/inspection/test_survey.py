"""Every kind of finding, planted and found with its row; clean data gives none; the memory a row takes."""

from __future__ import annotations

import json
import string
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from goldsmith.data import example_ids
from goldsmith.data.config import DataConfig
from goldsmith.data.loader import load_dataset, watch_rows
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.tokenizer import TrainedTokenizerConfig, train_tokenizer
from goldsmith.inspection.findings import BITS, KINDS, Finding
from goldsmith.inspection.survey import Sample, SplitSurvey, Survey, compare_with_eval
from goldsmith.records import DataReport

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DOUBLED = "{{ bos_token }}{{ bos_token }}" + CHATML
OPENS_REASONING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")

WORDS = (
    "river", "stone", "lamp", "apple", "seven", "green", "walk", "under",
    "bright", "table", "music", "window", "quiet", "orange", "paper", "cloud",
)  # fmt: skip
CLEAN = [
    {"prompt": f"Say {WORDS[n % 16]} and {WORDS[n * 3 % 16]} {n}.", "completion": f"It is {WORDS[n * 5 % 16]} {n * n}."}
    for n in range(40)
]


def tokenizer_of(kind: str = "bpe") -> PreTrainedTokenizerFast:
    texts = [text for row in CLEAN for text in row.values()] + [string.printable]
    config = {"kind": kind, "special_tokens": ["<|im_start|>", "<|im_end|>"]}
    if kind == "bpe":
        config["vocab_size"] = 400
    return train_tokenizer(TrainedTokenizerConfig.model_validate(config), texts)


PIECES = tokenizer_of()
CHARACTERS = tokenizer_of("character")


def survey(
    folder: Path,
    rows: list[dict[str, Any]],
    held_out: list[dict[str, Any]] | None = None,
    *,
    tokenizer: Any = PIECES,
    template: str = CHATML,
    rendering: dict[str, Any] | None = None,
    max_length: int | None = None,
    tokens_per_microbatch: int = 8192,
    **config: Any,
) -> SplitSurvey:
    (folder / "template.jinja").write_text(template)
    # A source has one format: chats are a file of their own.
    chats = [row for row in rows if "messages" in row]
    plains = [row for row in rows if "messages" not in row]
    for name, content in (("train", plains), ("chats", chats), ("eval", held_out or [])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    files = ["train.jsonl", *(["chats.jsonl"] if chats else [])]
    data = DataConfig.model_validate({"train": files, "eval": "eval.jsonl", **config})
    rendered = RenderingConfig(chat_template=str(folder / "template.jinja"), **(rendering or {}))
    renderer = Renderer(tokenizer, rendered, max_length, keeps_long_rows=True)

    def watch(split: Any, sources: Any) -> tuple[Survey, DataReport]:
        one = Survey(renderer, split=split, tokens_per_microbatch=tokens_per_microbatch, num_examples=3)
        return one, watch_rows(sources, config=data, renderer=renderer, split=split, watcher=one, base_folder=folder)

    train, report = watch("train", data.train)
    if held_out:
        compare_with_eval(train, watch("eval", data.eval)[0])
    return train.finish(report, bad_rows_stop=data.on_bad_row == "stop")


def found(split: SplitSurvey) -> dict[str, Finding]:
    return {finding.kind: finding for finding in split.findings}


def plain(prompt: str, completion: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **fields}


def chat(*contents: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": c, **fields} for n, c in enumerate(contents)]}


LONG = "a river and a stone and a lamp and an apple. " * 3
PLANTED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "doubled-beginning-token": ([chat("river", "stone")], {"template": DOUBLED}),
    "in-eval": ([CLEAN[3] | {"prompt": "held out"}], {"held_out": [CLEAN[3] | {"prompt": "held out"}]}),
    "input-in-eval": ([plain("held out", "one")], {"held_out": [plain("held out", "two")]}),
    "duplicate": ([CLEAN[7]], {}),
    "cut": ([plain(LONG, LONG)], {"max_length": 60, "on_too_long": "right"}),
    "control-token-in-content": ([plain("a river<|im_end|>", "a stone")], {}),
    "serving-mismatch-trained": (
        [chat("river", "stone")], {"template": OPENS_REASONING, "rendering": {"serving_mismatch": "train"}},
    ),
    "unknown-token": ([plain("a river", "щ stone")], {"tokenizer": CHARACTERS}),
    "damaged-text": ([plain("the cafÃ©", "a stone")], {}),
    "hidden-characters": ([plain("a river\u202e", "a stone")], {}),
    "gold-repeats-input": ([plain(LONG, f" {LONG} is long")], {}),
    "gold-without-words": ([plain("a river", "...")], {}),
    "empty-context": ([plain(" \n", "a stone")], {}),
    "straddle": ([plain("a riv", "er")], {}),
    "space-before-gold": ([plain("a river ", "stone")], {"tokenizer": CHARACTERS}),
    "all-gold": ([plain("", "a stone")], {}),
    "gold-turned-off": (
        [{"messages": [{"role": "user", "content": "river"}, {"role": "assistant", "content": "x y", "weight": 0},
                       {"role": "user", "content": "stone"}, {"role": "assistant", "content": "lamp"}]}], {},
    ),
    "longer-than-microbatch": ([plain(LONG, LONG)], {"tokens_per_microbatch": 60}),
    "outlier-length": ([plain(LONG * 20, "a stone")], {}),
    "rejected": ([plain("a river", "")], {}),
    "serving-mismatch": ([chat("river", "stone")], {"template": OPENS_REASONING}),
    "dropped": ([plain(LONG, LONG)], {"max_length": 60, "on_too_long": "drop"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_row_is_found(tmp_path: Path, kind: str) -> None:
    planted, how = PLANTED[kind]
    finding = found(survey(tmp_path, [*CLEAN, *planted], **how))[kind]
    assert (finding.count, finding.level, finding.split) == (1, KINDS[kind].level, "train")
    expected = "chats.jsonl:1" if "messages" in planted[0] else "train.jsonl:41"
    assert [place.source for place in finding.places] == [expected]


def test_a_control_token_anywhere_in_a_chat_is_found(tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ m.reasoning_content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    thought = chat("river", "stone")
    thought["messages"][1]["reasoning"] = "so <|im_end|> is it"
    tools = [{"type": "function", "function": {"name": "look", "description": "after <|im_start|>"}}]
    rows = [chat("a", "lamp"), thought, chat("b", "lamp", name=None), {**chat("walk", "table"), "tools": tools}]
    for row in rows[0], rows[2]:
        row["tools"] = []
    finding = found(survey(tmp_path, [*CLEAN, *rows], template=template))["control-token-in-content"]
    assert [place.source for place in finding.places] == ["chats.jsonl:2", "chats.jsonl:4"]


@pytest.mark.parametrize("tokenizer", [PIECES, CHARACTERS])
def test_clean_data_gives_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    held_out = [plain(f"What of {WORDS[n]}?", f"That is {WORDS[-n]}.") for n in range(4)]
    chats = [
        chat(row["prompt"].replace("Say", "Tell"), row["completion"], f"And {n}?", f"Yes, {n}.")
        for n, row in enumerate(CLEAN[:9])
    ]
    split = survey(tmp_path, CLEAN + chats, held_out, tokenizer=tokenizer, max_length=900)
    assert [finding.kind for finding in split.findings if finding.kind != "straddle"] == []


def test_every_kind_is_planted() -> None:
    others = {"no-end-token", "same-input-other-gold", "same-gold"}
    assert set(PLANTED) | others == set(KINDS)
    assert set(BITS) < set(KINDS)


def test_rows_without_an_end_token(tmp_path: Path) -> None:
    # Asked for, it is a warning of all rows; pre-tokenised or odd templates may lack it unasked.
    finding = found(survey(tmp_path, CLEAN, rendering={"append_end_token": False}))["no-end-token"]
    assert (finding.count, finding.level) == (40, "warning")
    # Cut gold has no end token by intention, and is reported as cut.
    kinds = found(survey(tmp_path, [*CLEAN, plain(LONG, LONG)], max_length=60, on_too_long="right"))
    assert "no-end-token" not in kinds
    kinds = found(survey(tmp_path, [*CLEAN, plain(LONG, LONG)], max_length=60, on_too_long="split"))
    assert "no-end-token" not in kinds
    assert kinds["cut"].count == 1


def test_the_same_input_with_other_gold(tmp_path: Path) -> None:
    rows = [*CLEAN, plain("river?", "one"), plain("river?", "two"), plain("river?", "one")]
    kinds = found(survey(tmp_path, rows))
    assert [place.source for place in kinds["same-input-other-gold"].places] == [
        f"train.jsonl:{n}" for n in (41, 42, 43)
    ]
    [place] = kinds["duplicate"].places
    assert (place.source, place.detail) == ("train.jsonl:43", "as train.jsonl:41")


def test_one_gold_of_many_rows(tmp_path: Path) -> None:
    rows = CLEAN + [plain(f"river {n}", "N/A") for n in range(10)]
    finding = found(survey(tmp_path, rows))["same-gold"]
    assert finding.count == 10
    assert (finding.places[0].source, finding.places[0].detail) == ("train.jsonl:41", "N/A")


def test_common_gold_among_more_than_is_counted_at_a_time(tmp_path: Path) -> None:
    rows = [plain(f"river {n}", "N/A" if n % 4 == 0 else f"It is {n}") for n in range(1000)]
    finding = found(survey(tmp_path, rows))["same-gold"]
    assert 250 - 1000 / 257 <= finding.count <= 250


def test_rejected_rows_are_errors_only_where_they_stop(tmp_path: Path) -> None:
    rows = [*CLEAN, plain("a\x1briver", ""), {"prompt": 3, "completion": "x"}]
    finding = found(survey(tmp_path, rows, on_bad_row="skip"))["rejected"]
    assert (finding.level, finding.count) == ("warning", 2)
    assert (finding.places[0].detail or "").startswith("empty completion: ")


def test_the_counts_are_those_of_the_data_set(tmp_path: Path) -> None:
    rows = [*CLEAN, plain("bad", ""), plain(LONG, LONG), chat("river", "stone", "lamp", "apple"), plain("a", "b", id="x"),
            plain("a", "c", id="x")]  # fmt: skip
    how: dict[str, Any] = {"max_length": 60, "on_too_long": "split", "on_bad_row": "skip"}
    split = survey(tmp_path, rows, **how)
    data = DataConfig.model_validate(
        {"train": ["train.jsonl", "chats.jsonl"], "on_too_long": "split", "on_bad_row": "skip"}
    )
    rendered = RenderingConfig(chat_template=str(tmp_path / "template.jinja"))
    renderer = Renderer(PIECES, rendered, 60, keeps_long_rows=True)
    dataset = load_dataset(data.train, config=data, renderer=renderer, base_folder=tmp_path, split="train")
    assert [asdict(file) for file in split.report.files] == [asdict(file) for file in dataset.report.files]
    assert split.report.rejected == {"empty completion": 1, "duplicate id": 1}
    assert split.lengths["total"].count == len(dataset)
    assert split.lengths["total"].total == dataset.lengths.sum()
    assert split.lengths["gold"].total == dataset.num_target_tokens.sum()
    assert [example.example_id for example in split.first_examples] == dataset.example_ids[:3]
    assert split.roles["assistant"].gold_messages == split.roles["user"].messages == 44


def test_the_sample_is_of_an_epoch(tmp_path: Path) -> None:
    split = survey(tmp_path, CLEAN, train=[{"path": "train.jsonl", "repeat": 2.5}])
    assert split.sample.epoch_examples == 100
    assert split.sample.epoch_tokens == pytest.approx(2.5 * split.report.tokens)
    assert 80 <= len(split.sample.lengths) <= 120
    assert isinstance(split.sample, Sample)


def test_memory_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 64 bytes beyond a fixed base: what the table and the ids take, and what else grows."""
    # The newest ids are a set until they fill a block: both measurements are taken just after one was filled.
    monkeypatch.setattr(example_ids, "_IDS_A_BLOCK", 1024)
    first, num_rows = 4 * 1024 + 10, 10 * 1024 + 11
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}", "completion": "{n}"}}\n' for n in range(num_rows)))
    held: list[int] = []

    class Watched(Survey):
        def used(self, *arguments: Any, **others: Any) -> None:
            super().used(*arguments, **others)
            if len(self.table) in (first, num_rows - 1):
                held.append(tracemalloc.get_traced_memory()[0])

    data = DataConfig.model_validate({"train": "train.jsonl"})
    renderer = Renderer(CHARACTERS, RenderingConfig(), 64, keeps_long_rows=True)
    watcher = Watched(renderer, split="train", tokens_per_microbatch=8192)
    tracemalloc.start()
    try:
        report = watch_rows(
            data.train, config=data, renderer=renderer, split="train", watcher=watcher, base_folder=tmp_path
        )
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        watcher.finish(report, bad_rows_stop=True)
        of_finishing = (tracemalloc.get_traced_memory()[1] - before) / num_rows
    finally:
        tracemalloc.stop()
    # The first block of the table, and the newest ids, are laid down before the first measurement.
    growth = (held[1] - held[0]) / (num_rows - first)
    assert watcher.table.bytes_a_row == 30
    assert growth + watcher.table.bytes_a_row + 8 < 64
    assert of_finishing < 20


def test_ids_are_found_again_in_merged_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_ids, "_IDS_A_BLOCK", 4)
    monkeypatch.setattr(example_ids, "_MAX_IDS_A_BLOCK", 16)
    ids = example_ids.HashedIds()
    for number in range(150):
        assert ids.place(f"row {number}") is None
        ids.add(f"row {number}", "")
        assert all(ids.place(f"row {earlier}") == "an earlier row" for earlier in range(number + 1))
    assert [block.shape[0] for block in ids._blocks] == [16] * 9 + [4]


def test_rows_that_came_tokenised(tmp_path: Path) -> None:
    ids = PIECES("a river")["input_ids"]
    end = PIECES.eos_token_id
    rows = [{"token_ids": [*ids, 10 + n, end], "target_weights": [0] * len(ids) + [1, 1]} for n in (1, 2, 1)] + [
        {"token_ids": [*ids[::-1], 11, 12], "target_weights": [0] * len(ids) + [1, 1]}
    ]
    split = survey(tmp_path, rows)
    kinds = found(split)
    assert {kind: finding.count for kind, finding in kinds.items()} == {
        "duplicate": 1, "same-input-other-gold": 3, "no-end-token": 1,
    }  # fmt: skip
    assert split.roles == {}
    assert split.report.used == 4
