"""Every recipe of `examples/` is read, and trains: a few steps on the first rows of its own data, or on rows like them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from goldsmith.cli import app
from goldsmith.recipe import load_recipe

RECIPES = ("banking77", "dstc8", "gsm8k", "legal", "pronunciation", "self_instruct")
# What their READMEs say to put beside them, in `shared/`; and what `prepare.py` is given.
BESIDE = {
    "banking77": ("data/banking77/train.csv", "data/banking77/test.csv", "models/stories260k"),
    "dstc8": (),
    "gsm8k": ("data/gsm8k/train.jsonl", "data/gsm8k/test.jsonl", "models/stories260k"),
    "legal": ("models/stories260k",),
    "pronunciation": tuple(f"data/sigmorphon2021/hun_{split}.tsv" for split in ("train", "dev", "test")),
    "self_instruct": ("models/stories260k",),
}
PREPARED = {
    "dstc8": "data/dstc8",
    "legal": "data/legal/all_v1.json",
    "self_instruct": "data/self_instruct/seed_tasks.jsonl",
}
# Fewer rows than the files hold: what is tried is the recipe.
FEWER = ["--set", "data.train.0.limit=48", "--set", "data.eval.0.limit=8"]

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
        assert Path(source.path).parent in (folder, folder / "prepared")
        assert Path(source.path).name in (folder / "README.md").read_text(encoding="utf-8")
    assert recipe.model.path is None or Path(recipe.model.path).parent == folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_inspects_and_trains_on_its_own_data(name: str, examples: Path, shared_folder: Path) -> None:
    folder = examples / name
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for path in BESIDE[name]:
        (folder / Path(path).name).symlink_to(shared_folder / path)
        assert Path(path).name in readme
    if name in PREPARED:
        prepare(folder, shared_folder / PREPARED[name])
        assert "prepare.py" in readme
    skipping = ["--set", "data.on_bad_row=skip"] if name == "gsm8k" else []
    seen = goldsmith("inspect", folder / "recipe.yaml", "--no-measure", *skipping, *FEWER)
    assert seen["splits"]["train"]["rows_used"] >= 40
    assert {finding["kind"] for finding in seen["findings"] if finding["level"] == "error"} == set()
    result = goldsmith("train", folder / "recipe.yaml", "--set", "training.max_steps=3", *skipping, *FEWER)
    assert result["training"]["nll_after"] < result["training"]["nll_before"]


def prepare(folder: Path, data: Path) -> None:
    """As a user does it; the script wants nothing but Python."""
    done = subprocess.run(
        [sys.executable, "-I", str(folder / "prepare.py"), str(data)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_dialogues_keep_every_turn_and_call(examples: Path, shared_folder: Path) -> None:
    prepare(examples / "dstc8", shared_folder / PREPARED["dstc8"])
    lines = [
        json.loads(line)
        for name in ("train", "eval")
        for line in (examples / "dstc8" / "prepared" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    messages = [message for line in lines for message in line["messages"]]
    calls = [message for message in messages if message.get("tool_calls")]
    # As the data's own README counts them.
    assert len(lines) == 128 + 62
    assert len(messages) - 2 * len(calls) == 1172 + 1202
    assert len(calls) == 314
    assert sum(message["role"] == "tool" for message in messages) == 314


def test_what_the_legal_rules_find(examples: Path, shared_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", str(examples / "legal" / "findings.py"), str(shared_folder / PREPARED["legal"])],
        capture_output=True,
        text=True,
        check=True,
    )
    # Named in docs/legal_findings.md.
    for found in ("65 summaries stand in 221 rows", "tosdr170", "tosdr338", "legalsum01: 'hi.'", "tosdr071, tosdr397"):
        assert found in done.stdout


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
