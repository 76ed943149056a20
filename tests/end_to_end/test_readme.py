"""What the README prints is what a reader gets. (Its `>>>` examples are doctests of their own.)"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from goldsmith.cli import EXIT_CODES, app


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def block(readme: str, name: str) -> str:
    """The fenced block below `<!-- test: name -->`."""
    found = re.search(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", readme, re.DOTALL)
    assert found is not None, name
    return found.group(1)


def test_the_two_commands_stand_first(readme: str) -> None:
    assert re.findall(r"^\$ (make \w+)", readme, re.MULTILINE)[:2] == ["make demo", "make test"]


def test_every_exit_code_is_listed(readme: str) -> None:
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in readme


def test_compare_prints_what_the_readme_says(readme: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    blocks = re.findall(r"```console\n\$ goldsmith (compare examples[^\n]*)\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for command, output in blocks:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
        assert result.stdout == output


def test_the_recipe_trains_and_the_result_is_used_with_transformers(
    readme: str,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    (tmp_path / "recipe.yaml").write_text(block(readme, "recipe"), encoding="utf-8")
    rows = re.search(r"```json\n(.*?)```", readme, re.DOTALL)
    assert rows is not None
    for name in ("train.jsonl", "held-out.jsonl"):
        (tmp_path / name).write_text(rows.group(1) * 2, encoding="utf-8")
    result = CliRunner().invoke(app, ["train", "recipe.yaml", "--json", "--set", "model.device=cpu"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["output_dir"] == str(tmp_path / "runs" / "french")
    listed = re.findall(r"^\| `([\w.-]+)/?` \| ", readme, re.MULTILINE)
    assert {path.name for path in (tmp_path / "runs" / "french").iterdir() if path.name != ".lock"} - {
        "tokenizer"
    } == set(listed)
    # The resolved recipe means the same run from wherever it is read.
    monkeypatch.chdir(tmp_path / "runs")
    again = CliRunner().invoke(app, ["train", "french/recipe.yaml", "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["already_finished"] is True
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(block(readme, "transformers"), "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")
