"""The data set and its report: every row used, rejected or over the limit, and nothing lost on the way."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from data_examples import CHATML, REASONING, learnt
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from goldsmith.data import loader as loader_module
from goldsmith.data.config import DataConfig, SourceConfig
from goldsmith.data.dataset import Dataset
from goldsmith.data.hub import hub_revision, hub_rows
from goldsmith.data.loader import load_dataset, read_texts
from goldsmith.data.packing import epoch_order, pack
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.rows import Row
from goldsmith.data.tokenizer import load_tokenizer
from goldsmith.errors import ConfigError, DataError
from goldsmith.records import DataReport

Write = Callable[..., Path]


def load(tokenizer: Any, folder: Path, train: Any, *, max_length: int | None = None, **config: Any) -> Dataset:
    data = DataConfig.model_validate({"train": train, **config})
    renderer = Renderer(tokenizer, RenderingConfig(), max_length, keeps_long_rows="on_too_long" in config)
    return load_dataset(data.train, config=data, renderer=renderer, base_folder=folder, split="train")


def rows(count: int, start: int = 0) -> list[dict[str, object]]:
    return [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(start, start + count)]


def adds_up(report: DataReport) -> None:
    for file in report.files:
        assert file.rows_in == file.used + sum(file.rejected.values()) + file.over_limit


def test_a_data_set_keeps_every_example(tmp_path: Path, write_rows: Write, bpe: PreTrainedTokenizerFast) -> None:
    path = write_rows(rows(2500), "train.jsonl")  # more than are rendered at once
    data = load(bpe, tmp_path, "train.jsonl")
    assert len(data) == 2500
    renderer = Renderer(bpe, RenderingConfig(), None)
    assert data.example_ids == [f"train:{n}" for n in range(2500)]
    assert data.sources == [f"train.jsonl:{n + 1}" for n in range(2500)]
    for index in (0, 1, 1023, 1024, 2499, -1):
        example = data[index]
        number = index % 2500
        assert example.token_ids[0] == bpe.bos_token_id
        assert data.gold_text(number, bpe) == f"It is {number}."
        assert data.context_text(number, bpe) == f"<s>What is {number}?"
        assert example.num_tokens == data.lengths[number]
        assert example.num_target_tokens == data.num_target_tokens[number]
        assert example.weight_sum == data.weight_sums[number]
        assert example.example_id == f"train:{number}"
    assert data.groups.tolist() == list(range(2500))
    assert [e.example_id for e in data[3:5]] == ["train:3", "train:4"]
    with pytest.raises(IndexError):
        data[2500]
    with pytest.raises(IndexError):
        data[-2501]
    [file] = data.report.files
    assert (file.path, file.name, file.rows_in, file.used, file.examples) == ("train.jsonl", "train", 2500, 2500, 2500)
    assert file.tokens == data.lengths.sum() == len(data.token_ids)
    assert file.gold_tokens == data.num_target_tokens.sum()
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert DataReport(**json.loads(json.dumps({**data.report.to_json(), "files": []}))).rejections == {}
    batch = pack(data, [5, 0])
    assert batch.example_weight_sums.tolist() == [data.weight_sums[5], data.weight_sums[0]]
    assert renderer.num_straddles == 0


def test_bad_rows_stop_with_a_summary_by_reason(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    lines = [json.dumps(row) for row in rows(8)]
    lines[1] = "{broken"
    lines[3] = '{"prompt": "p"}'
    lines[4] = '{"prompt": "p", "completion": ""}'
    lines[5] = '{"prompt": "p", "completion": " "}'
    lines[6] = json.dumps({"prompt": "long " * 100, "completion": "x"})
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        load(bpe, tmp_path, "train.jsonl", max_length=60)
    text = str(error.value)
    assert error.value.exit_code == 3
    assert "5 of 8 rows of data.train cannot be used" in text
    assert "empty completion: 2 rows\n    train.jsonl:5: " in text
    for place in ("train.jsonl:2: ", "train.jsonl:4: ", "train.jsonl:7: "):
        assert place in text
    assert "on_bad_row: skip" in text

    data = load(bpe, tmp_path, "train.jsonl", max_length=60, on_bad_row="skip")
    assert data.example_ids == ["train:0", "train:2", "train:7"]  # ids do not depend on what was rejected
    assert data.report.rejected == {
        "invalid JSON": 1,
        "no completion": 1,
        "empty completion": 2,
        "longer than max_length": 1,
    }
    assert data.report.rejections["empty completion"][1].startswith("train.jsonl:6: ")
    adds_up(data.report)


def test_many_rejections_are_counted_and_few_are_shown(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "p", "answer": "a"}\n' * 5000)
    with pytest.raises(
        DataError, match=r"the first 20 rows fit no format; train\.jsonl:1 has the fields 'prompt', 'answer'"
    ):
        load(bpe, tmp_path, "train.jsonl")
    for choice in ("stop", "skip"):
        with pytest.raises(DataError, match="No row is left") as error:
            load(bpe, tmp_path, "train.jsonl", on_bad_row=choice, format="prompt_completion")
        text = str(error.value)
        assert len(text) < 1500
        assert "no completion: 5000 rows" in text
        assert "... and 4997 more" in text
        assert "'answer'" in text


@pytest.mark.parametrize(
    ("line", "options", "remedy"),
    [
        ('{"prompt": "p", "answer": "a"}', {}, "name the columns with `columns`, or mend the rows"),
        ("{", {}, "write the file again, so that each row can be read"),
        ('{"prompt": "p", "completion": ""}', {}, "mend the rows"),
        (
            '{"prompt": "p", "completion": "a b c d"}',
            {"max_length": 2},
            "raise data.max_length where the model can take more",
        ),
    ],
)
def test_the_remedy_where_no_row_is_left_fits_the_reason(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, line: str, options: dict[str, Any], remedy: str
) -> None:
    (tmp_path / "train.jsonl").write_text(f"{line}\n")
    for choice in ("stop", "skip"):
        with pytest.raises(DataError, match="No row is left") as error:
            load(bpe, tmp_path, "train.jsonl", on_bad_row=choice, format="prompt_completion", **options)
        assert error.value.remedy is not None
        assert error.value.remedy.startswith(remedy)
        assert ("columns" in error.value.remedy) == ("columns" in remedy)


@pytest.mark.parametrize("line", ["", '{"prompt": "p", "completion": ""}\n'])
def test_rows_that_were_all_left_out_for_their_length_are_counted(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, line: str
) -> None:
    (tmp_path / "train.jsonl").write_text(f'{line}{{"prompt": "p", "completion": "a b c d"}}\n' * 2)
    with pytest.raises(DataError, match="No row is left") as error:
        load(bpe, tmp_path, "train.jsonl", on_bad_row="skip", on_too_long="drop", max_length=2)
    total = 4 if line else 2
    assert f"{total} of {total} rows of data.train cannot be used" in str(error.value)
    assert "longer than max_length: 2 rows" in str(error.value)
    assert error.value.remedy is not None
    assert "raise data.max_length where the model can take more" in error.value.remedy


def test_limits_repeats_and_weights(tmp_path: Path, write_rows: Write, bpe: PreTrainedTokenizerFast) -> None:
    write_rows([{"prompt": "p"}, *rows(5)], "a.jsonl")
    write_rows(rows(4, 100), "b.jsonl")
    sources = [
        {"path": "a.jsonl", "limit": 3, "weight": 2.0},
        {"path": "b.jsonl", "repeat": 1.5},
    ]
    data = load(bpe, tmp_path, sources, on_bad_row="skip")
    assert data.example_ids == ["a:1", "a:2", "a:3", "b:0", "b:1", "b:2", "b:3"]
    assert data.example_weights.tolist() == [2, 2, 2, 1, 1, 1, 1]
    assert data.repeats.tolist() == [1, 1, 1, 1.5, 1.5, 1.5, 1.5]
    first, second = data.report.files
    assert (first.rows_in, first.used, first.rejected, first.over_limit) == (6, 3, {"no completion": 1}, 2)
    assert (second.rows_in, second.used, second.over_limit) == (4, 4, 0)
    order = epoch_order(data.groups, seed=0, epoch=0, repeats=data.repeats)
    assert len(order) == 3 + 4 + 2


def test_a_limit_counts_used_rows_over_the_files_of_a_glob(
    tmp_path: Path, write_rows: Write, bpe: PreTrainedTokenizerFast
) -> None:
    for number in range(3):
        write_rows([*rows(2, 10 * number), {"prompt": "x", "completion": "too long " * 99}], f"part-{number}.jsonl")
    source = {"path": "part-*.jsonl", "limit": 5, "name": "parts"}
    data = load(bpe, tmp_path, source, on_bad_row="skip", max_length=60)
    # The long row is only known to be too long after rendering; it does not use up the limit.
    assert data.example_ids == ["parts:0", "parts:1", "parts:3", "parts:4", "parts:6"]
    assert [(f.rows_in, f.used, f.over_limit) for f in data.report.files] == [(3, 2, 0), (3, 2, 0), (3, 1, 2)]
    adds_up(data.report)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["good", "bad", "empty", "long", "twice"]), min_size=1, max_size=25),
    st.none() | st.integers(1, 8),
    st.integers(1, 5),
)
def test_the_report_adds_up(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], limit: int | None, at_once: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number, kind in enumerate(kinds):
        row: dict[str, object] = {"prompt": "p", "completion": f"c{number}", "id": f"i{number}"}
        row.update({"empty": {"completion": ""}, "long": {"prompt": "x" * 99}, "twice": {"id": "same"}}.get(kind, {}))
        lines.append("{" if kind == "bad" else json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(lines))
    expected: list[int] = []
    over = 0
    seen_twice = False
    for number, kind in enumerate(kinds):
        if limit is not None and len(expected) >= limit:
            over += 1
        elif kind == "good" or (kind == "twice" and not seen_twice):
            expected.append(number)
            seen_twice = seen_twice or kind == "twice"
    before = loader_module._ROWS_AT_ONCE
    loader_module._ROWS_AT_ONCE = at_once
    try:
        data = load(TOKENIZER, folder, {"path": "train.jsonl", "limit": limit}, on_bad_row="skip", max_length=50)
    except DataError:
        assert not expected
        return
    finally:
        loader_module._ROWS_AT_ONCE = before
    assert [int(source.rpartition(":")[2]) - 1 for source in data.sources] == expected
    [file] = data.report.files
    assert (file.rows_in, file.used, file.over_limit) == (len(kinds), len(expected), over)
    adds_up(data.report)
    assert file.examples == len(data)
    assert file.gold_tokens == data.num_target_tokens.sum()


TOKENIZER = learnt("byte")


def test_duplicate_ids_name_both_places(tmp_path: Path, write_rows: Write, bpe: PreTrainedTokenizerFast) -> None:
    write_rows([{**row, "id": n % 2} for n, row in enumerate(rows(3))], "train.jsonl")
    with pytest.raises(
        DataError, match=r"duplicate id: 1 row\n    train\.jsonl:3: the id '0' is also that of train\.jsonl:1"
    ):
        load(bpe, tmp_path, "train.jsonl")


def test_two_sources_of_one_name(tmp_path: Path, write_rows: Write, bpe: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a").mkdir()
    write_rows(rows(1), "train.jsonl")
    write_rows(rows(1), "a/train.jsonl")
    with pytest.raises(ConfigError, match=r"two sources of data\.train are named 'train'"):
        load(bpe, tmp_path, ["train.jsonl", "a/train.jsonl"])
    data = load(bpe, tmp_path, ["train.jsonl", {"path": "a/train.jsonl", "name": "other"}])
    assert data.example_ids == ["train:0", "other:0"]


def test_rows_in_memory(bpe: PreTrainedTokenizerFast) -> None:
    config = DataConfig(train="unused.jsonl", columns={"prompt": "q", "completion": "a"})  # type: ignore[arg-type]
    renderer = Renderer(bpe, RenderingConfig(), None)
    held = [{"q": "x", "a": "y", "id": "mine"}, {"q": "x", "a": "z"}]
    for given_rows in (held, tuple(held), iter(held)):
        data = load_dataset(given_rows, config=config, renderer=renderer, split="train")
        assert data.example_ids == ["mine", "train:1"]
        assert data.sources == ["train:0", "train:1"]
        [file] = data.report.files
        assert (file.path, file.sha256, file.rows_in) == ("train", None, 2)
    with pytest.raises(DataError, match="holds no row"):
        load_dataset([], config=config, renderer=renderer, split="eval")
    assert read_texts(held, config=config) == (["x", "x"], ["y", "z"])


def test_expanded_chats_share_a_group(tmp_path: Path, write_rows: Write, bpe: PreTrainedTokenizerFast) -> None:
    def messages(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]

    write_rows([{"messages": messages("a", "b", "c", "d")}, {"messages": messages("a", "b")}], "train.jsonl")
    (tmp_path / "t.jinja").write_text(REASONING)
    data_config = DataConfig(train="train.jsonl")  # type: ignore[arg-type]
    renderer = Renderer(bpe, RenderingConfig(chat_template=str(tmp_path / "t.jinja")), None)
    data = load_dataset(data_config.train, config=data_config, renderer=renderer, base_folder=tmp_path, split="train")
    assert data.example_ids == ["train:0@1", "train:0@2", "train:1"]
    assert data.groups.tolist() == [0, 0, 1]
    assert data.report.files[0].used == 2
    assert data.report.files[0].examples == 3
    context, gold = data.last_turn(1)
    assert bpe.decode(gold.tolist()).endswith("d<|im_end|>")
    assert bpe.decode(context.tolist()).endswith("assistant\n")


def test_the_last_turn_of_a_whole_conversation(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    renderer = Renderer(bpe, RenderingConfig(chat_template=str(tmp_path / "t.jinja")), None)
    data = load_dataset([row], config=DataConfig(train="x.jsonl"), renderer=renderer, split="eval")  # type: ignore[arg-type]
    context, gold = data.last_turn(0)
    assert bpe.decode(gold.tolist()) == "d<|im_end|>"
    assert data.gold_text(0, bpe) == "d"
    assert bpe.decode(context.tolist()).endswith("c<|im_end|>\n<|im_start|>assistant\n")


def test_the_fingerprint_sees_every_change(bpe: PreTrainedTokenizerFast) -> None:
    config = DataConfig(train="x.jsonl")  # type: ignore[arg-type]
    renderer = Renderer(bpe, RenderingConfig(), None)

    def fingerprint(*given_rows: dict[str, object], **settings: Any) -> str:
        found = Renderer(bpe, RenderingConfig(**settings), None) if settings else renderer
        return load_dataset(given_rows, config=config, renderer=found, split="train").fingerprint()

    one, two = rows(2)
    prints = [
        fingerprint(one, two),
        fingerprint(two, one),
        fingerprint(one),
        fingerprint(one, {**two, "weight": 2}),
        fingerprint(one, {**two, "id": "x"}),
        fingerprint(one, {**two, "completion": "other"}),
        fingerprint(one, two, append_end_token=False),
        # The same text cut elsewhere has the same ids in places, but not the same weights.
        fingerprint(one, {"prompt": "What is", "completion": " 1?It is 1."}),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(one, two) == prints[0]


def test_an_epoch_that_would_hold_no_row(tmp_path: Path, write_rows: Write, bpe: PreTrainedTokenizerFast) -> None:
    write_rows(rows(3), "train.jsonl")
    with pytest.raises(DataError, match="an epoch would hold no row"):
        load(bpe, tmp_path, {"path": "train.jsonl", "repeat": 0.1})


def test_unknown_tokens_are_counted(character: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(character, RenderingConfig(), None)
    config = DataConfig(train="x.jsonl")  # type: ignore[arg-type]
    data = load_dataset([{"prompt": "日", "completion": "a本"}], config=config, renderer=renderer, split="train")
    assert data.num_unknown_tokens == 2


def test_a_data_set_of_examples(bpe: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(bpe, RenderingConfig(), None)
    source = load_dataset(rows(3), config=DataConfig(train="x.jsonl"), renderer=renderer, split="train")  # type: ignore[arg-type]
    copy = Dataset(list(source))
    assert copy.fingerprint() == source.fingerprint()
    assert len(Dataset([])) == 0
    assert Dataset([]).weight_sums.tolist() == []


def test_read_texts_keeps_to_the_limit_and_passes_over_bad_rows(tmp_path: Path, write_rows: Write) -> None:
    write_rows([{"prompt": "p"}, *rows(3)], "train.jsonl")
    config = DataConfig.model_validate({"train": {"path": "train.jsonl", "limit": 2}})
    contexts, golds = read_texts(config.train, config=config, base_folder=tmp_path)
    assert (contexts, golds) == (["What is 0?", "What is 1?"], ["It is 0.", "It is 1."])


def test_many_short_rows_are_loaded_fast(tmp_path: Path) -> None:
    """A tenth of the 100,000 rows that must take less than 10 s; processor time, with room for a busy machine."""
    with (tmp_path / "train.jsonl").open("w") as file:
        for number in range(10_000):
            file.write(json.dumps({"prompt": f"the word {number}", "completion": f"is {number}"}) + "\n")
    tokenizer = learnt("bpe")
    load(tokenizer, tmp_path, {"path": "train.jsonl", "limit": 10})
    begin = time.process_time()
    assert len(load(tokenizer, tmp_path, "train.jsonl")) == 10_000
    assert time.process_time() - begin < 3.0


# --- formats


def test_the_format_is_found_once_and_said_in_the_report(
    tmp_path: Path, write_rows: Write, bpe: PreTrainedTokenizerFast
) -> None:
    write_rows([*rows(2), {"txt": "no prompt"}], "plain.jsonl")
    write_rows([{"text": f"once {n}"} for n in range(3)], "story.jsonl")
    data = load(
        bpe, tmp_path, ["plain.jsonl", {"path": "story.jsonl", "format": "text"}], on_bad_row="skip", max_length=40
    )
    # A row of another format is rejected, and not read as what it could be.
    assert data.report.rejected == {"no prompt": 1}
    assert [(file.format, file.format_detected) for file in data.report.files] == [
        ("prompt_completion", True),
        ("text", False),
    ]
    assert data.example_ids == ["plain:0", "plain:1", "story:0", "story:1", "story:2"]
    assert data.context_text(2, bpe) == "<s>"
    assert data.gold_text(2, bpe) == "once 0"
    data = load(bpe, tmp_path, "story.jsonl", format="text")
    assert not data.report.files[0].format_detected


def test_the_first_rows_are_those_that_can_be_read(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.jsonl").write_text("{broken\n" * 30 + json.dumps(rows(1)[0]) + "\n" + '{"txt": "no prompt"}\n')
    data = load(bpe, tmp_path, "a.jsonl", on_bad_row="skip", format=None)
    assert data.report.rejected == {"invalid JSON": 30, "no prompt": 1}
    # Behind the first 20 rows nothing is looked at: the format stands.
    lines = [json.dumps(row) for row in rows(20)]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, '{"text": "late"}']))
    assert load(bpe, tmp_path, "b.jsonl", on_bad_row="skip").report.rejected == {"no prompt": 1}
    (tmp_path / "c.jsonl").write_text("\n".join([*lines[:19], '{"text": "early"}']))
    with pytest.raises(DataError, match="fit two formats"):
        load(bpe, tmp_path, "c.jsonl", on_bad_row="skip")


def test_all_files_of_a_source_have_its_one_format(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    (tmp_path / "p1.jsonl").write_text("{broken\n")
    (tmp_path / "p2.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "p3.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    data = load(bpe, tmp_path, {"path": "p*.jsonl", "name": "p"}, on_bad_row="skip")
    assert data.report.rejected == {"invalid JSON": 1, "no text": 1}
    assert [file.format for file in data.report.files] == ["", "text", "text"]


def test_rows_of_tokens_pass_the_renderer(tmp_path: Path, write_rows: Write, bpe: PreTrainedTokenizerFast) -> None:
    bos, eos = bpe.bos_token_id, bpe.eos_token_id
    prompt, gold = bpe.encode("What is 2?", add_special_tokens=False), bpe.encode("é", add_special_tokens=False)
    ids = [bos, *prompt, *gold, eos]
    labels = [-100] * (1 + len(prompt)) + [*gold, eos]
    late = len(bpe)
    given_rows: list[dict[str, object]] = [
        {"token_ids": ids, "labels": labels, "weight": 3},
        {"token_ids": [bos, *gold, *prompt, *gold], "labels": [-100, *gold, *[-100] * len(prompt), *gold], "id": "two"},
        {"token_ids": ids * 9, "labels": [-100] * len(ids) * 8 + ids},
        {"token_ids": [bos, late], "labels": [-100, late]},
    ]
    write_rows(given_rows, "t.jsonl")
    data = load(bpe, tmp_path, "t.jsonl", on_bad_row="skip", max_length=40)
    assert data.report.rejected == {"longer than max_length": 1, "no such token": 1}
    assert data.example_ids == ["t:0", "two"]
    assert data.example_weights.tolist() == [3, 1]
    assert data[0].token_ids.tolist() == ids
    # As if the text itself had been given, the number of bytes too.
    text = load_dataset(
        [{"prompt": "What is 2?", "completion": "é"}],
        config=DataConfig(train="x.jsonl"),  # type: ignore[arg-type]
        renderer=Renderer(bpe, RenderingConfig(), None),
        split="train",
    )
    assert text[0].token_ids.tolist() == ids
    assert text[0].target_weights.tolist() == data[0].target_weights.tolist()
    assert data.num_bytes.tolist() == [2, 4]
    assert text.num_bytes.tolist() == [2]
    assert read_texts(given_rows, config=DataConfig()) == ([], [])


def test_texts_of_a_chat_hold_all_that_a_template_may_write() -> None:
    call = {"name": "add", "arguments": {"é": 1}}
    row = {
        "messages": [
            {"role": "user", "content": "q", "name": "Ann"},
            {"role": "assistant", "content": "a", "reasoning": "hm", "tool_calls": [call]},
        ],
        "tools": [{"name": "add"}],
    }
    contexts, golds = read_texts([row], config=DataConfig())
    assert contexts == ['{"name": "add"}', "q", "Ann"]
    assert golds == ["hm", "a", json.dumps(call, ensure_ascii=False)]


def test_each_example_knows_its_source(tmp_path: Path, write_rows: Write, bpe: PreTrainedTokenizerFast) -> None:
    write_rows(rows(2), "a.jsonl")
    write_rows(rows(3), "b.jsonl")
    data = load(bpe, tmp_path, ["b.jsonl", {"path": "a.jsonl", "name": "first"}])
    assert data.source_names == ["b", "first"]
    assert data.source_indices.tolist() == [0, 0, 0, 1, 1]
    copy = Dataset(list(data), source_names=["b", "b", "b", "first", "first"])
    assert (copy.source_names, copy.source_indices.tolist()) == (data.source_names, data.source_indices.tolist())
    assert Dataset(list(data)).source_names == [""]


# --- data sets of the hub, here of a local folder


@pytest.fixture
def hub_folder(tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "gold").mkdir()
    write_rows(rows(3), "gold/train.jsonl")
    write_rows(rows(2, 50), "gold/test.jsonl")
    return tmp_path / "gold"


def test_a_hub_data_set(hub_folder: Path, bpe: PreTrainedTokenizerFast) -> None:
    source = {"path": f"hf:{hub_folder}", "split": "train", "limit": 2}
    data = load(bpe, hub_folder, [source, {**source, "split": "test", "name": "held"}])
    assert data.example_ids == ["gold:0", "gold:1", "held:0", "held:1"]
    assert data.sources[1] == f"hf:{hub_folder}/train:2"
    assert data.gold_text(2, bpe) == "It is 50."
    first, _ = data.report.files
    assert (first.path, first.rows_in, first.used, first.over_limit) == (f"hf:{hub_folder}/train", 3, 2, 1)
    assert (first.sha256, first.revision, first.format) == (None, None, "prompt_completion")
    assert hub_revision(SourceConfig.model_validate(source)) is None


def test_a_hub_data_set_that_cannot_be_read(
    hub_folder: Path, bpe: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"gold/dev cannot be read: ValueError: .*Unknown split"):
        load(bpe, hub_folder, {"path": f"hf:{hub_folder}", "split": "dev"})
    with pytest.raises(DataError, match="hf:nobody/nothing/train cannot be read"):
        load(bpe, hub_folder, {"path": "hf:nobody/nothing", "split": "train"})
    with pytest.raises(ConfigError, match="gives positions"):
        load(bpe, hub_folder, {"path": f"hf:{hub_folder}", "split": "train", "columns": {"text": 0}})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'goldsmith\[hub\]'"):
        load(bpe, hub_folder, {"path": f"hf:{hub_folder}", "split": "train"})


def test_a_revision_is_held_to(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not reached in tests: its answer is made up here, and what is asked of `datasets` is looked at."""
    hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []

    def dataset_info(self: object, name: str) -> SimpleNamespace:
        asked.append(name)
        return SimpleNamespace(sha="c" * 40)

    monkeypatch.setattr(hub.HfApi, "dataset_info", dataset_info)
    assert hub_revision(SourceConfig(path="hf:a/b", split="train")) == "c" * 40
    source = SourceConfig(path="hf:a/b", split="train", subset="main", revision="v1")
    assert hub_revision(source) == "v1"
    assert asked == ["a/b"]

    import datasets

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, **keywords: calls.append({"path": path, **keywords}) or rows(1)
    )
    [row] = list(hub_rows(source))
    assert isinstance(row, Row)
    assert row.source == "hf:a/b/main/train:1"
    asked_for = {"name": "main", "split": "train", "revision": "v1", "streaming": False}
    assert calls == [{"path": "a/b", **asked_for}]


def test_a_hub_that_is_not_reached_gives_no_revision() -> None:
    pytest.importorskip("datasets")
    assert (
        hub_revision(SourceConfig(path="hf:nobody/nothing", split="train")) is None
    )  # offline, by the tests' settings


def test_shared_data_sets(shared_folder: Path) -> None:
    """Real files: every row is used, and their READMEs' counts are met."""
    tokenizer = load_tokenizer(shared_folder / "models" / "stories260k")
    folder = shared_folder / "data"
    columns = {"prompt": "text", "completion": "category"}
    banking = load(tokenizer, folder, {"path": "banking77/train.csv", "columns": columns})
    assert (len(banking), banking.report.rejected) == (10_003, {})
    texts = {"prompt": "original_text", "completion": "reference_summary"}
    legal = load(tokenizer, folder, {"path": "legal/all_v1.json", "columns": {**texts, "id": "uid"}})
    assert len(legal) == 446
    assert len(set(legal.example_ids)) == 446
    words = load(tokenizer, folder, {"path": "sigmorphon2021/kor_dev.tsv", "columns": {"prompt": 0, "completion": 1}})
    assert len(words) == 1000
    maths = load(
        tokenizer,
        folder,
        {"path": "gsm8k/test.jsonl", "columns": {"prompt": "question", "completion": "answer"}},
        max_length=512,
        on_bad_row="skip",
    )
    assert maths.report.rows_in == 1319
    assert set(maths.report.rejected) == {"longer than max_length"}
    adds_up(maths.report)
    assert np.all(maths.lengths <= 512)
