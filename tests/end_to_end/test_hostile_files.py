"""Files that nobody should give, and somebody will: each is answered with a message and its exit code, and none is lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from goldsmith.cli import app

GOLD = json.dumps({"prompt": "1 + 1 = ", "completion": "2"}) + "\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, "model")
    Path("gold.jsonl").write_text(GOLD)
    Path("link.jsonl").symlink_to("gold.jsonl")
    Path("long.jsonl").write_text(json.dumps({"prompt": "1 " * 2000, "completion": "2"}) + "\n")
    Path("folder").mkdir()
    Path("run").mkdir()
    Path("run/recipe.yaml").write_bytes(b"\xff\xfe\x00")
    Path("damaged").mkdir()
    Path("damaged/recipe.yaml").write_text("model: {path: model}\n")
    Path("damaged/metrics.jsonl").write_text('{"kind": "step", "step": "x"}\n')
    Path("deep.jsonl").write_text("[" * 100_000 + "\n")
    Path("huge.jsonl").write_text('{"example_id": "a", "log_prob": -1' + "0" * 400 + "}\n")
    Path("scores.jsonl").write_text('{"example_id": "a", "log_prob": -1}\n')
    Path("template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    Path("recipe.yaml").write_text(
        "model: {path: model, device: cpu}\ndata: {train: gold.jsonl}\nrendering: {chat_template: template.jinja}\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        ("score model gold.jsonl -o gold.jsonl", 2, "is the gold itself"),
        ("score model gold.jsonl -o link.jsonl", 2, "is the gold itself"),
        (
            "score model gold.jsonl -o model/config.json",
            2,
            "is a file of the model itself, which the scores would replace",
        ),
        ("generate model gold.jsonl -o gold.jsonl", 2, "is the data itself, which the answers would replace"),
        ("generate model gold.jsonl -o link.jsonl", 2, "is the data itself"),
        ("generate model -p 1 -o model/model.safetensors", 2, "is a file of the model itself"),
        ("inspect recipe.yaml --no-measure --html recipe.yaml", 2, "html: recipe.yaml is the recipe itself"),
        ("inspect recipe.yaml --no-measure --html link.jsonl", 2, "is the data itself, which the page would replace"),
        ("inspect recipe.yaml --no-measure --html template.jinja", 2, "is the chat template itself"),
        ("report --scores scores.jsonl -o scores.jsonl", 2, "is a score file itself, which the page would replace"),
        ("report damaged -o damaged/metrics.jsonl", 2, "is a file of the run itself"),
        ("score model gold.jsonl -o folder", 2, "'folder' is a folder"),
        ("score model gold.jsonl -o", 2, "'' is a folder"),
        ("score model", 2, "DATA: String should have at least 1 character"),
        ("score model gold.jsonl --columns a=b", 2, "--columns: 'a' is not a field"),
        ("compare scores.jsonl deep.jsonl", 3, "deep.jsonl:1: invalid JSON: nested too deep"),
        ("compare scores.jsonl huge.jsonl", 3, "a log-probability must be finite"),
        ("report --scores deep.jsonl", 3, "deep.jsonl:1: invalid JSON: nested too deep"),
        ("report --scores scores.jsonl -o folder", 7, "'folder' cannot be written: it is a folder"),
        ("report run -o out.html", 0, "out.html"),
        ("report damaged", 7, "a file of the run is damaged: metrics.jsonl"),
        (f"score model gold.jsonl -o {'x' * 300}.jsonl", 7, "File name too long"),
        (f"report --scores scores.jsonl -o {'x' * 300}.html", 7, "File name too long"),
        ("inspect recipe.yaml --no-measure --html folder", 7, "'folder' cannot be written: it is a folder"),
        ("inspect recipe.yaml --no-measure --html nowhere/page.html", 7, "No such file or directory"),
        ("generate model -p 1 --top-p 0", 2, "top_p: Input should be greater than 0, but 0.0 was given"),
        ("generate model -p 1 --temperature inf", 2, "temperature: Input should be a finite number"),
        ("generate model long.jsonl", 3, "shorten or remove the row"),
        ("generate model -p 1 --max-new-tokens 1 -o folder", 7, "'folder' cannot be written"),
    ],
)
def test_answered(arguments: str, exit_code: int, words: str) -> None:
    words_given = arguments.split()
    inputs = {path: path.read_bytes() for path in Path().glob("**/*") if path.is_file()}
    if arguments in ("score model", "score model gold.jsonl -o"):
        words_given.append("")
    outcome = CliRunner().invoke(app, words_given)
    assert outcome.exit_code == exit_code, outcome.output
    assert words in outcome.output
    assert "Traceback" not in outcome.output
    assert {path: path.read_bytes() for path in inputs} == inputs
    assert not [name for name in os.listdir() if name.endswith((".tmp", ".partial"))]
