"""The demo on a few words: trained, shown, and shown again without training."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from goldsmith import workflows
from goldsmith.cli import app
from goldsmith.errors import MachineError
from goldsmith.models.evaluate import sum_log_likelihood
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.recipe import load_recipe
from goldsmith.workflows import DemoResult, demo
from goldsmith.workflows.materials import causal_lm_of
from goldsmith.workflows.models import open_model

# Spelt as spoken, so that a few steps already learn something; some words with two pronunciations.
SOUNDS = {"a": "AA", "e": "EH", "g": "G", "k": "K", "m": "M", "o": "OW", "s": "S", "t": "T"}
WORDS = {
    f"{a}{b}{c}": (f"{SOUNDS[a]} {SOUNDS[b]} {SOUNDS[c]}", *([f"{SOUNDS[a]} {SOUNDS[c]}"] if a == b else []))
    for a in SOUNDS
    for b in SOUNDS
    for c in SOUNDS
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the steps are so small that a second thread only waits
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "runs" / "demo"


def small_demo(folder: Path, *, max_seconds: float = 60.0) -> DemoResult:
    return demo(folder, max_seconds=max_seconds, quiet=True, dictionary=WORDS, num_held_out=40, max_steps=40)


@pytest.fixture(scope="module")
def result(folder: Path) -> DemoResult:
    return small_demo(folder)


def test_it_learns_and_says_so(result: DemoResult, folder: Path) -> None:
    training = result.run.training
    assert not result.run.already_finished
    assert training.steps == 40
    assert training.nll_before is not None
    assert training.nll_after is not None
    assert training.nll_after < 0.5 * training.nll_before
    assert result.named.gold.log_prob > result.named_log_prob_before
    assert 0 <= result.phone_error_rate.estimate < 0.9
    assert len(result.words) == 10
    assert result.num_held_out == 40
    assert f"run folder: {folder}" in str(result)


def test_no_held_out_word_was_trained_on(result: DemoResult) -> None:
    words: dict[str, dict[str, list[str]]] = {}
    for name in ("train", "held-out"):
        rows = [json.loads(line) for line in (result.data_dir / f"{name}.jsonl").read_text().splitlines()]
        assert len({row["id"] for row in rows}) == len(rows)
        words[name] = {row["prompt"]: [] for row in rows}
        for row in rows:
            words[name][row["prompt"]].append(row["completion"])
    assert not words["train"].keys() & words["held-out"].keys()
    assert {word: tuple(variants) for split in words.values() for word, variants in split.items()} == WORDS
    assert {word.word for word in result.words} <= words["held-out"].keys()


def test_the_model_before_is_the_one_that_training_began_with(result: DemoResult, folder: Path) -> None:
    """Its nll is that of the evaluation before the first step, so its log P of a word is too."""
    recipe = load_recipe(folder / "recipe.yaml")
    opened = open_model(str(folder), device="cpu")
    model = LikelihoodModel(causal_lm_of(recipe, opened.tokenizer, torch.device("cpu")))
    held_out = opened.dataset(str(result.data_dir / "held-out.jsonl"), columns=None, on_bad_row="stop")
    nll = sum_log_likelihood(model, held_out, tokens_per_microbatch=4096).nll
    assert nll == pytest.approx(result.run.training.nll_before, rel=1e-6)
    index = held_out.example_ids.index(result.named.gold.example_id)
    own = sum_log_likelihood(model, held_out, tokens_per_microbatch=4096, indices=[index])
    assert own.log_prob == pytest.approx(result.named_log_prob_before, rel=1e-6)


def test_the_error_rates_are_those_of_a_plain_count(result: DemoResult, folder: Path) -> None:
    held_out = [json.loads(line) for line in (result.data_dir / "held-out.jsonl").read_text().splitlines()]
    variants: dict[str, list[str]] = {}
    for row in held_out:
        variants.setdefault(row["prompt"], []).append(row["completion"])
    answers = workflows.generate(str(folder), prompts=list(variants), max_new_tokens=48, device="cpu").answers
    wrong = sum(answer.text not in variants[answer.prompt] for answer in answers)
    assert result.word_error_rate.estimate == pytest.approx(wrong / len(variants))
    for word in result.words:
        assert word.is_right == (word.prediction in variants[word.word])
        tokens = word.gold.tokens
        assert tokens is not None
        assert math.fsum(token.log_prob for token in tokens) == pytest.approx(word.gold.log_prob)
        assert "".join(token.text for token in tokens).removesuffix("</s>") in variants[word.word]


def test_a_second_demo_trains_nothing_and_shows_the_same(result: DemoResult, folder: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.is_file()}
    again = small_demo(folder)
    assert again.run.already_finished
    assert again.phone_error_rate == result.phone_error_rate
    assert again.word_error_rate == result.word_error_rate
    assert again.words == result.words
    assert again.named_log_prob_before == result.named_log_prob_before
    assert "finished before" in str(again)
    after = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path.name != ".lock"} == {
        path: time for path, time in files.items() if path.name != ".lock"
    }


def test_the_run_is_an_ordinary_one(result: DemoResult, folder: Path) -> None:
    """`goldsmith train` knows its recipe, and the folder scores and generates like any other."""
    finished = CliRunner().invoke(app, ["train", str(folder / "recipe.yaml"), "--json"])
    assert finished.exit_code == 0, finished.output
    assert json.loads(finished.stdout)["already_finished"] is True
    scored = CliRunner().invoke(app, ["score", str(folder), str(result.data_dir / "held-out.jsonl"), "--json"])
    assert scored.exit_code == 0, scored.output
    nll = json.loads(scored.stdout)["nll_per_token"]["estimate"]
    assert nll == pytest.approx(result.run.training.nll_after, rel=1e-5)


def test_a_demo_of_another_length_wants_another_folder(result: DemoResult, folder: Path) -> None:
    with pytest.raises(MachineError, match=r"training\.max_seconds: 30\.0 here, 60\.0 there"):
        small_demo(folder, max_seconds=30.0)


def test_the_command_prints_one_object(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflows, "demo", functools.partial(demo, dictionary=WORDS, num_held_out=20))
    output = folder.with_name("timed")
    done = CliRunner().invoke(app, ["demo", "--output-dir", str(output), "--max-seconds", "1", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["num_held_out_words"] == 20
    assert values["nll_after"] < values["nll_before"]
    # The number of steps was settled before the first one, and is kept with the run.
    assert load_recipe(output / "recipe.yaml").training.max_steps == values["run"]["training"]["steps"]
