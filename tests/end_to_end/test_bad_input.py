"""Bad input, one case each: a clear message, no traceback, the exit code of the table, and no folder left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from goldsmith import storage
from goldsmith.cli import app
from goldsmith.storage import FolderLock

GOLD = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(12)]


class House:
    """A folder with a model, gold and a recipe that all work, for a test to break one thing of."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.data = folder / "train.jsonl"
        self.model = folder / "model"
        shutil.copytree(model, self.model)
        self.write_rows(*[json.dumps(row) for row in GOLD])
        self.recipe.write_text(
            "model: {path: ./model, device: cpu}\n"
            "data: {train: train.jsonl}\n"
            "training: {max_steps: 3, batch_size: 4}\n"
            "checkpoint: {every_steps: 1}\n"
            "output_dir: runs/it\n"
        )

    def write_rows(self, *lines: str) -> None:
        self.data.write_text("".join(f"{line}\n" for line in lines))

    def change_config(self, **changes: object) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def run(self, *arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def train(self, *overrides: str) -> Any:
        return self.run("train", self.recipe, "--quiet", *[word for text in overrides for word in ("--set", text)])


@pytest.fixture
def house(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that a second thread only waits
    yield House(tmp_path, tiny_model_folder)
    torch.set_num_threads(threads)


def refused(result: Any, exit_code: int, *words: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("goldsmith: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


# --- data: 3


def no_such_file(house: House) -> None:
    house.data.unlink()


def empty_file(house: House) -> None:
    house.data.write_bytes(b"")


def invalid_json(house: House) -> None:
    lines = [json.dumps(row) for row in GOLD]
    lines[6] = '{"prompt": "7 + 1 = ", "completion": '
    house.write_rows(*lines)


def no_completion(house: House) -> None:
    house.write_rows(*[json.dumps(row) for row in GOLD[:2]], '{"prompt": "3 + 1 = "}')


def empty_completion(house: House) -> None:
    house.write_rows(*[json.dumps(row) for row in GOLD[:2]], '{"prompt": "3 + 1 = ", "completion": ""}')


def too_long(house: House) -> None:
    house.write_rows(*[json.dumps(row) for row in GOLD[:2]], json.dumps({"prompt": "x" * 200, "completion": "y"}))


def not_utf8(house: House) -> None:
    house.data.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff", "completion": "b"}\n')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_such_file, ["train.jsonl"]),
        (empty_file, ["train.jsonl", "empty"]),
        (invalid_json, ["train.jsonl:7", "JSON"]),
        (no_completion, ["train.jsonl:3", "completion", "columns"]),
        (empty_completion, ["train.jsonl:3", "empty completion"]),
        (too_long, ["train.jsonl:3", "max_length", "128"]),
        (not_utf8, ["train.jsonl:2", "UTF-8"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("command", ["train", "score"])
def test_data(house: House, spoil: Callable[[House], None], words: list[str], command: str) -> None:
    spoil(house)
    result = house.train() if command == "train" else house.run("score", house.model, house.data, "--quiet")
    refused(result, 3, *words)
    assert not (house.folder / "runs" / "it").exists()


def test_bad_rows_are_counted_where_the_recipe_says_so(house: House) -> None:
    invalid_json(house)
    result = house.train("data.on_bad_row=skip")
    assert result.exit_code == 0, result.output
    (report,) = json.loads((house.folder / "runs" / "it" / "data.json").read_text())["train"]["files"]
    assert (report["rows_in"], report["used"]) == (12, 11)
    assert report["rejected"] == {"invalid JSON": 1}


# --- formats of data: 3

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
GOOD_AND_BAD: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "no format": ({"question": "q"}, {}, ["train.jsonl:1 has the fields 'question'", "columns: {prompt"]),
    "two formats": ({"text": "t", "messages": CHAT}, {}, ["chat ('messages'", "text ('text'", "format: chat"]),
    "a row of another format": (GOLD[0], {"text": "t"}, ["train.jsonl:2", "fit two formats", "format: "]),
    "a field that is missing": (GOLD[0], {"prompt": "p", "gold": "c"}, ["train.jsonl:2", "'completion'", "'gold'"]),
    "a span": ({"text": "t"}, {"text": "abc", "spans": [{"begin": 1, "end": 9, "weight": 1}]}, ["spans[0]", "1 to 9"]),
    "a message": (
        {"messages": CHAT},
        {"messages": [{"role": "bot", "content": "x"}]},
        ["messages[0]", "'bot'", "assistant"],
    ),
    "an image": (
        {"messages": CHAT},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, CHAT[1]]},
        ["train.jsonl:2", "messages[0].content[0]", "'image'", "trains on text"],
    ),
    "tool calls": (
        {"messages": CHAT},
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        ["train.jsonl:2", "messages[1].tool_calls[0].arguments", "not JSON"],
    ),
    "tools": ({"messages": CHAT}, {"messages": CHAT, "tools": {"name": "f"}}, ["train.jsonl:2", "'tools'", "a list"]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "bot", "value": "x"}]},
        ["train.jsonl:2", "conversations[0]", "'bot'", "observation"],
    ),
    "alpaca": (
        {"instruction": "i", "output": "o"},
        {"instruction": "i", "output": 5},
        ["train.jsonl:2", "'output' must be text", "int: 5"],
    ),
    "text": ({"text": "t"}, {"text": " "}, ["train.jsonl:2", "empty text", "nothing to learn"]),
    "an id beyond the vocabulary": (
        {"token_ids": [0, 5], "labels": [-100, 5]},
        {"token_ids": [0, 500], "labels": [-100, 500]},
        ["train.jsonl:2", "token_ids[1] is 500", "99 tokens", "tokenizer"],
    ),
    "shifted labels": (
        {"token_ids": [0, 5], "labels": [-100, 5]},
        {"input_ids": [0, 5, 6], "labels": [5, 6, -100]},
        ["train.jsonl:2", "labels[0] is 5", "not shifted", "-100"],
    ),
}


@pytest.mark.parametrize("case", GOOD_AND_BAD)
def test_formats(house: House, case: str) -> None:
    good, bad, words = GOOD_AND_BAD[case]
    template = house.folder / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}assistant: ")
    house.write_rows(json.dumps(good), *([json.dumps(bad)] if bad else []))
    refused(house.train(f"rendering.chat_template={template}"), 3, *words)
    assert not (house.folder / "runs" / "it").exists()


def test_a_hub_data_set_that_is_not_there(house: House) -> None:
    pytest.importorskip("datasets")
    refused(house.train("data.train={path: hf:nobody/nothing, split: train}"), 3, "hf:nobody/nothing/train", "revision")
    refused(house.train("data.train={path: hf:nobody/nothing}"), 2, "`split: train`")
    refused(house.run("score", house.model, "hf:nobody/nothing", "--quiet"), 2, "hf:nobody/nothing", "to_json")


# --- recipe: 2


def test_no_such_recipe(house: House) -> None:
    refused(house.run("train", "none.yaml"), 2, "none.yaml: no such recipe")


def test_an_unknown_key(house: House) -> None:
    refused(house.train("training.batchsize=3"), 2, "training.batchsize: unknown key", "`batch_size`")


def test_a_value_of_the_wrong_type(house: House) -> None:
    with house.recipe.open("a") as file:
        file.write("optimizer:\n  learning_rate: fast\n")
    refused(house.train(), 2, "recipe.yaml:7: optimizer.learning_rate: 'fast' (text) was seen; expected a number")


# --- model: 4


def no_such_model(house: House) -> None:
    shutil.rmtree(house.model)


def only_pickled_weights(house: House) -> None:
    (house.model / "model.safetensors").rename(house.model / "pytorch_model.bin")


def missing_weight(house: House) -> None:
    from safetensors.torch import load_file, save_file

    path = house.model / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def cut_weights(house: House) -> None:
    path = house.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remote_code(house: House) -> None:
    house.change_config(auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})


def fails_the_proof(house: House) -> None:
    house.change_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_such_model, ["model", "no such"]),
        (only_pickled_weights, ["pytorch_model.bin", "safetensors"]),
        (missing_weight, ["model.norm.weight"]),
        (cut_weights, ["model.safetensors"]),
        (remote_code, ["auto_map"]),
        (fails_the_proof, ["dynamic"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("command", ["train", "score", "generate"])
def test_model(house: House, spoil: Callable[[House], None], words: list[str], command: str) -> None:
    spoil(house)
    result = house.train() if command == "train" else house.run(command, "./model", house.data, "--quiet")
    refused(result, 4, *words)
    assert not (house.folder / "runs" / "it").exists()


def test_a_hub_id_that_cannot_be_reached(house: House) -> None:
    refused(house.train("model.path=nobody/nothing-of-the-kind"), 4, "nobody/nothing-of-the-kind")


# --- environment: 7


def test_rows_that_were_rendered_beforehand_are_said_once(house: House) -> None:
    marked = [{**row, "prompt": f"<s>{row['prompt']}</s>"} for row in GOLD]
    house.write_rows(*[json.dumps(row) for row in [*marked, *GOLD]])
    said = "warning: train: 12 of the first 24 rows spell control tokens (</s> in 12, <s> in 12)"
    assert house.run("train", house.recipe).stderr.count(said) == 1
    allowed = ("--set", "output_dir=runs/allowed", "--set", "rendering.allow_control_tokens=all")
    outcome = house.run("train", house.recipe, *allowed)
    assert outcome.exit_code == 0, outcome.output
    assert "spell control tokens" not in outcome.stderr


def test_an_output_folder_of_another_recipe(house: House) -> None:
    assert house.train().exit_code == 0
    refused(house.train("optimizer.learning_rate=1e-3"), 7, "runs/it", "another recipe", "optimizer.learning_rate")


def test_an_output_folder_that_holds_something_else(house: House) -> None:
    other = house.folder / "runs" / "it"
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("years of work")
    refused(house.train(), 7, "thesis.tex")
    assert [path.name for path in other.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_an_output_folder_in_use(house: House) -> None:
    with FolderLock(house.folder / "runs" / "it"):
        refused(house.train(), 7, "in use")


def test_an_output_folder_that_is_a_file(house: House) -> None:
    (house.folder / "runs").write_text("")
    refused(house.train(), 7, "runs")


@pytest.mark.parametrize("place", ["checkpoint.model", "metrics.append", "export.model"])
def test_a_full_disk(house: House, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("GOLDSMITH_FAIL_POINT", f"{place}!enospc")
    storage._passings.clear()
    refused(house.train(), 7, "disk is full", "same command")
    monkeypatch.delenv("GOLDSMITH_FAIL_POINT")
    resumed = house.train()
    assert resumed.exit_code == 0, resumed.output
    assert (house.folder / "runs" / "it" / "model" / "model.safetensors").is_file()


def test_a_disk_without_the_space_is_refused_before_the_start(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda folder: 1000)
    refused(house.train(), 7, " free, but ", "checkpoint.keep")
    assert not (house.folder / "runs" / "it" / "metrics.jsonl").exists()


# --- scores: 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["b.jsonl"]),
        ("", ["b.jsonl"]),
        ("{}\n", ["b.jsonl:1"]),
        ('{"example_id": "x", "log_prob": -1}\n', ["no example"]),
    ],
)
def test_score_files(house: House, text: str | None, words: list[str]) -> None:
    (house.folder / "a.jsonl").write_text('{"example_id": "y", "log_prob": -1}\n')
    if text is not None:
        (house.folder / "b.jsonl").write_text(text)
    refused(house.run("compare", "a.jsonl", "b.jsonl"), 3, *words)
