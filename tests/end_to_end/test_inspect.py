"""`goldsmith inspect`: the whole of it on small data, as JSON, as text and as a page, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from goldsmith.cli import app

EVIL = "<script>alert(1)</script>\x1b[31m"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{"prompt": f"Who is {n}?", "completion": f"That is {n}."} for n in range(5)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    recipe = {
        "model": {"path": str(tiny_model_folder)},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "training": {"batch_size": 4, "epochs": 2, "tokens_per_microbatch": 100},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def inspect(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["inspect", "recipe.yaml", *arguments])


def add(folder: Path, name: str, **row: object) -> None:
    with (folder / name).open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_clean_data(folder: Path) -> None:
    done = inspect("--json", "--strict", "--examples", "2")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["findings"] == []
    train = report["splits"]["train"]
    assert (train["rows_in"], train["rows_used"], train["rejected"]) == (30, 30, {})
    assert train["roles"]["assistant"]["gold_messages"] == 30
    # A character a token: `What is 7?` and `It is 7.` with its end token.
    assert train["lengths"]["gold"]["minimum"] == len("It is 7.") + 1
    assert train["lengths"]["context"]["total"] == sum(len(f"What is {n}?") for n in range(30))
    plan = report["plan"]
    assert (plan["steps_per_epoch"], plan["steps"], plan["examples"]) == (8, 16, 30)
    assert plan["tokens"] == train["lengths"]["total"]["total"]
    assert 0 < plan["fill"] <= 1
    measured = report["measured"]
    assert measured["seconds_total"] == pytest.approx(16 * measured["seconds_per_step"])
    assert measured["peak_memory_bytes"] > 1 << 20
    assert [example["example_id"] for example in report["examples"]] == ["train:0", "train:1"]
    assert "".join(token["text"] for token in report["examples"][0]["tokens"]) == "What is 0?It is 0.</s>"
    assert [token["weight"] for token in report["examples"][0]["tokens"]] == [0] * 10 + [1] * 9
    assert sorted(path.name for path in folder.iterdir()) == ["eval.jsonl", "recipe.yaml", "train.jsonl"]


def test_findings_in_text_json_and_on_a_page(folder: Path) -> None:
    add(folder, "train.jsonl", prompt="Who is 3?", completion="That is 3.")  # line 31: also held out
    add(folder, "train.jsonl", prompt="What is 3?", completion=EVIL, id=EVIL)  # 32: another gold than line 4
    add(folder, "train.jsonl", prompt="What is 3?", completion="")  # 33: rejected
    add(folder, "train.jsonl", prompt="x" * 120, completion="much too long")  # 34
    done = inspect(
        "--json", "--no-measure", "--html", "page.html", "--examples", "40", "--set", "data.on_too_long=left"
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    found = {finding["kind"]: finding for finding in report["findings"]}
    assert {kind: (one["level"], one["count"]) for kind, one in found.items()} == {
        "rejected": ("error", 1),
        "in-eval": ("error", 1),
        "same-input-other-gold": ("warning", 2),
        "cut": ("warning", 1),
        "hidden-characters": ("warning", 1),
        "unknown-token": ("warning", 1),
        "longer-than-microbatch": ("info", 1),
    }
    assert report["measured"] is None
    [place] = found["in-eval"]["places"]
    assert place["source"].endswith("train.jsonl:31")
    assert [place["source"].rpartition(":")[2] for place in found["same-input-other-gold"]["places"]] == ["4", "32"]
    [file] = report["splits"]["train"]["files"]
    assert (file["rows_in"], file["used"], file["cut"], file["tokens_lost"]) == (34, 33, 1, 6)
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("<svg") == 6
    assert page.count('class="example"') == 33

    done = inspect("--no-measure", "--strict", "--set", "data.on_too_long=drop")
    assert done.exit_code == 3
    assert "train: 34 rows in, 32 used, 1 rejected, 1 dropped" in done.stdout
    assert "rejected, empty completion: 1" in done.stdout
    assert "in-eval (train): 1 row: " in done.stdout
    assert "train.jsonl:31" in done.stdout
    assert str(Path.cwd()) not in done.stdout, "files below the current folder are named from there"
    assert f"{Path.cwd()}/train.jsonl" not in page
    assert "⟦I|t| |i|s| |0|.|</s>⟧" in done.stdout
    assert "\x1b" not in done.stdout


def test_long_names_keep_the_tables_in_line(folder: Path) -> None:
    """Names of files that are longer than a table has room for, and twice as wide as they have characters."""
    rows = (folder / "train.jsonl").read_text()
    for name in ("much-" * 30 + "longer", "\u6df1" * 40, "short"):
        (folder / f"{name}.jsonl").write_text(rows.replace('"prompt": "', f'"prompt": "{name[0]}'))
    sources = ", ".join(
        f"{{path: {path.name}}}" for path in sorted(folder.glob("*.jsonl")) if path.name != "eval.jsonl"
    )
    done = inspect("--no-measure", "--set", f"data.train=[{sources}]")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("  file"))
    table = lines[first : first + 5]
    assert {cell_len(line) for line in table} == {cell_len(table[0])}
    assert cell_len(table[0]) < 120
    assert any(line.startswith("  \u2026much-") or "much-longer.jsonl " in line for line in table)
    assert any("\u6df1.jsonl " in line for line in table)


def test_a_model_that_cannot_be_built_is_not_measured(folder: Path) -> None:
    done = inspect("--json", "--set", "model.device=cuda:7")
    report = json.loads(done.stdout)
    assert done.exit_code == 0, done.output
    assert report["measured"] is None
    assert "cuda" in report["not_measured"]


def test_data_that_cannot_be_read(folder: Path) -> None:
    (folder / "eval.jsonl").unlink()
    done = inspect("--json")
    assert done.exit_code == 3
    assert "no such data file" in json.loads(done.stdout)["error"]["message"]


def test_no_row_can_be_used(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    done = inspect("--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["plan"] is None
    assert report["splits"]["train"]["rejected"] == {"empty completion": 1}
    assert "no row can be trained on" in inspect().stdout
    assert inspect("--strict").exit_code == 3
