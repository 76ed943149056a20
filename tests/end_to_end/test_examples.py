"""Every recipe of `examples/` is read, and trains: a few steps on the first rows of its own data, or on rows like them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from goldsmith.cli import app
from goldsmith.recipe import load_recipe

RECIPES = ("pronunciation", "gsm8k")

WORDS = "abba\tɒ bː ɒ\nasztal\tɒ s t ɒ l\ngyerek\tɟ ɛ r ɛ k\nház\th aː z\nszép\ts eː p\ntűz\tt yː z\nzsír\tʒ iː r\n"
SUMS = "".join(
    json.dumps({"question": f"What is {number} + 1?", "answer": f"{number} + 1 = {number + 1}\n#### {number + 1}"})
    + "\n"
    for number in range(12)
)


@pytest.fixture
def examples(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the examples, so that data can be put beside the recipes, as their READMEs say."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Path(shutil.copytree(repository / "examples", tmp_path / "examples"))
    torch.set_num_threads(threads)


def goldsmith(*arguments: object) -> dict:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_recipe_is_known_here(repository: Path) -> None:
    assert {path.parent.name for path in (repository / "examples").rglob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_only_what_lies_beside_it(name: str, repository: Path) -> None:
    folder = repository / "examples" / name
    recipe = load_recipe(folder / "recipe.yaml")
    for source in [*recipe.data.train, *recipe.data.eval]:
        assert Path(source.path).parent == folder
        assert Path(source.path).name in (folder / "README.md").read_text(encoding="utf-8")
    assert recipe.model.path is None or Path(recipe.model.path).parent == folder


def test_pronunciation_trains_and_answers(examples: Path) -> None:
    folder = examples / "pronunciation"
    for split in ("train", "dev", "test"):
        (folder / f"hun_{split}.tsv").write_text(WORDS, encoding="utf-8")
    settings = ["--set", "training.max_steps=8", "--set", "training.batch_size=7"]
    result = goldsmith("train", folder / "recipe.yaml", *settings)
    assert result["training"]["nll_after"] < result["training"]["nll_before"]
    answers = goldsmith("generate", result["output_dir"], folder / "hun_test.tsv")
    assert answers["metrics"]["num_examples"] == 7
    assert {answer["gold"] for answer in answers["answers"]} == {line.split("\t")[1] for line in WORDS.splitlines()}


def test_gsm8k_stops_for_rows_that_are_too_long_and_goes_on_without_them(
    examples: Path, tiny_model_folder: Path
) -> None:
    folder = examples / "gsm8k"
    shutil.copytree(tiny_model_folder, folder / "stories260k")
    too_long = json.dumps({"question": "How long is this? " * 10, "answer": "#### 1"}) + "\n"
    (folder / "train.jsonl").write_text(SUMS + too_long, encoding="utf-8")
    (folder / "test.jsonl").write_text(too_long + SUMS, encoding="utf-8")
    stopped = CliRunner().invoke(app, ["train", str(folder / "recipe.yaml"), "--quiet"])
    assert stopped.exit_code == 3
    assert "1 of 13 rows of data.train cannot be used\n  longer than max_length: 1 row\n" in stopped.stderr
    assert f"{folder / 'train.jsonl'}:13:" in stopped.stderr
    assert not Path("runs").exists() or not any(Path("runs").iterdir())

    result = goldsmith("train", folder / "recipe.yaml", "--set", "data.on_bad_row=skip")
    assert result["rows"] == {"read": 13, "used": 12}
    assert result["training"]["nll_after"] < result["training"]["nll_before"]
    report = json.loads((Path(result["output_dir"]) / "data.json").read_text(encoding="utf-8"))
    for split in ("train", "eval"):
        (file,) = report[split]["files"]
        assert (file["rows_in"], file["used"], file["rejected"]) == (13, 12, {"longer than max_length": 1})


@pytest.mark.parametrize("language", ["hun", "kor"])
def test_pronunciation_takes_the_shared_tasks_files(
    language: str, repository: Path, shared_folder: Path, tmp_path: Path
) -> None:
    data = shared_folder / "data" / "sigmorphon2021"
    result = goldsmith(
        "train",
        repository / "examples" / "pronunciation" / "recipe.yaml",
        *("--set", f"data.train.0.path={data / f'{language}_train.tsv'}"),
        *("--set", f"data.eval.0.path={data / f'{language}_dev.tsv'}", "--set", "data.eval.0.limit=50"),
        *("--set", "training.max_steps=3", "--set", f"output_dir={tmp_path / 'run'}"),
    )
    assert result["rows"] == {"read": 8000, "used": 8000}
    assert result["training"]["nll_after"] < result["training"]["nll_before"]
