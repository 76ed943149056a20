"""`goldsmith score` and `goldsmith compare` on models: a run, a checkpoint, a folder; interrupted and gone on with."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import goldsmith
from goldsmith import workflows
from goldsmith.cli import app
from goldsmith.errors import CheckpointError, ConfigError, DataError, MachineError
from goldsmith.recipe import Recipe
from goldsmith.scoring.compare import Comparison
from goldsmith.scoring.files import score_to_json
from goldsmith.scoring.ranking import Ranking
from goldsmith.scoring.score import Asked, score_windows
from goldsmith.scoring.tally import summarize
from goldsmith.scoring.texts import TokenTexts
from goldsmith.scoring.writing import ScoreWriter
from goldsmith.types import TokenizedExample
from goldsmith.workflows.models import open_model

ROWS = [{"id": f"r{n}", "prompt": f"{n} + 1 = ", "completion": str(n + 1), "weight": 1 + n % 3} for n in range(30)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test's own folder is the current one; one thread; windows of a few examples, and blocks on the disk of fewer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("goldsmith.scoring.score._WINDOW_EXAMPLES", 7)
    monkeypatch.setattr("goldsmith.data.spool._ROWS_A_BLOCK", 4)
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def settings_of_a_run() -> dict[str, Any]:
    return {
        "model": {
            "init": {"architecture": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
            "dtype": "float64",
            "device": "cpu",
        },
        "tokenizer": {"train": {"kind": "character"}},
        "data": {"train": "gold.jsonl", "eval": [{"path": "gold.jsonl", "weight": 0.5}]},
        "training": {"epochs": 1, "batch_size": 10},
        "checkpoint": {"every_steps": 1, "keep": 3},
        "optimizer": {"learning_rate": 0.01},
        "output_dir": "runs/it",
    }  # fmt: skip


def test_a_base_model_is_given_what_the_tuned_one_was(here: Path) -> None:
    """`rendering` takes separator, chat template and columns of a run: the same weights in a folder then give the same numbers."""
    for name, own, rows in (
        ("plain", {"separator": " is "}, [{"q": row["prompt"], "completion": row["completion"]} for row in ROWS]),
        ("chat", {"chat_template": "chatml"}, [
            {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
            for row in ROWS
        ]),
    ):  # fmt: skip
        (here / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = settings_of_a_run() | {"rendering": own, "output_dir": f"runs/{name}"}
        if name == "plain":
            settings["data"] |= {"columns": {"prompt": "q"}}
        else:  # a new tokenizer learns the template's control tokens; what is compared has another one, without a template
            settings["model"]["init"]["max_position_embeddings"] = 256
        goldsmith.train(Recipe.from_mapping(settings), quiet=True)
        run = f"runs/{name}"
        base = Path(shutil.copytree(f"{run}/model", f"base-{name}"))
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = None
        (base / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(base)
        tuned = goldsmith.score(run, "gold.jsonl", with_tokens=True, output="tuned.jsonl")
        as_tuned = goldsmith.score(str(base), "gold.jsonl", rendering=run, with_tokens=True, output="base.jsonl")
        assert as_tuned.log_prob == tuned.log_prob
        assert Path("base.jsonl").read_bytes() == Path("tuned.jsonl").read_bytes()
        found = workflows.compare(str(base), run, "gold.jsonl", rendering=run)
        assert isinstance(found, Comparison)
        assert found.num_other_contexts == 0
        assert found.mean_difference.estimate == 0.0
    with pytest.raises(ConfigError, match=r"base-plain is no run: it has no recipe\.yaml"):
        goldsmith.score("runs/plain", "gold.jsonl", rendering="base-plain")
    with pytest.raises(ConfigError, match="only score files are given"):
        workflows.compare("base.jsonl", "tuned.jsonl", rendering="runs/chat")


def test_the_weighted_sum_is_the_runs_last_evaluation(here: Path) -> None:
    """In float64, of the result and of a checkpoint, whatever the packing."""
    result = goldsmith.train(Recipe.from_mapping(settings_of_a_run()), quiet=True)
    frame = result.to_pandas()
    nll = frame[frame["kind"] == "evaluation"]["nll"].iloc[-1]
    assert "runs/it" in result._repr_html_()
    for budget in (None, 16):
        summary = goldsmith.score("runs/it", "gold.jsonl", dtype="float64", tokens_per_microbatch=budget)
        assert summary.is_weighted
        assert summary.weighted_nll is not None
        assert summary.weighted_nll.estimate == pytest.approx(nll, rel=1e-9)
        assert summary.nll_per_token.estimate != pytest.approx(nll, rel=1e-6)
    last = sorted((here / "runs/it/checkpoints").iterdir())[-1]
    again = goldsmith.score(str(last), "gold.jsonl")
    assert again.weighted_nll is not None
    assert again.weighted_nll.estimate == pytest.approx(nll, rel=1e-9)


@pytest.mark.parametrize(
    ("policy", "normalization", "num_examples"),
    [("drop", "token", 10), ("left", "token", 30), ("right", "token", 30), ("split", "example", 50)],
)
def test_rows_that_are_too_long_are_scored_as_the_run_evaluated_them(
    here: Path, policy: str, normalization: str, num_examples: int
) -> None:
    """20 rows have 13 tokens, of which 12 fit: what the run did with them is done, or what is asked for by name."""
    settings = settings_of_a_run()
    settings["data"] |= {"max_length": 12, "on_too_long": policy}
    settings["objective"] = {"normalization": normalization}
    result = goldsmith.train(Recipe.from_mapping(settings), quiet=True)
    nll = result.to_pandas()[lambda frame: frame["kind"] == "evaluation"]["nll"].iloc[-1]
    last = sorted((here / "runs/it/checkpoints").iterdir())[-1]
    for model in ("runs/it", str(last)):
        summary = goldsmith.score(model, "gold.jsonl", dtype="float64")
        assert summary.weighted_nll is not None
        assert summary.weighted_nll.estimate == pytest.approx(nll, rel=1e-9)
        assert summary.num_examples == num_examples
        assert summary.losses is not None
        assert summary.losses.rows_too_long == 20
        assert "rows too long" in str(summary)
    rejected = goldsmith.score("runs/it", "gold.jsonl", dtype="float64", on_too_long="reject")
    assert rejected.num_examples == 30
    assert rejected.weighted_nll is not None
    assert rejected.weighted_nll.estimate != pytest.approx(nll, rel=1e-6)
    with pytest.raises(DataError, match="longer than max_length: 20 rows") as caught:
        goldsmith.score("runs/it", "gold.jsonl", dtype="float64", on_too_long="reject", max_length=12)
    assert "raise --max-length" in caught.value.message
    assert "say with --on-too-long" in caught.value.message
    with pytest.raises(DataError) as caught:
        goldsmith.score("runs/it", "gold.jsonl", dtype="float64", on_too_long="reject", max_length=4)
    assert caught.value.remedy == "raise --max-length where the model can take more, or cut rows with --on-too-long"
    assert "data." not in str(caught.value)
    result_folder = goldsmith.score("runs/it/model", "gold.jsonl", dtype="float64")
    assert (result_folder.num_examples, result_folder.losses and result_folder.losses.rows_too_long) == (30, 0)


def test_rows_are_dropped_by_a_flag_and_the_loss_is_told(tiny_model_folder: Path) -> None:
    command = [
        "score",
        str(tiny_model_folder),
        "gold.jsonl",
        "--on-too-long",
        "drop",
        "--max-length",
        "10",
        "--json",
        "-q",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["num_examples"] == 9
    assert values["losses"]["dropped"] == values["losses"]["too_long"] == 21
    assert values["losses"]["gold_tokens_lost"] == 3 * 21
    assert values["rejected"] == {}


def test_rows_that_are_skipped_are_counted(tiny_model_folder: Path) -> None:
    summary = goldsmith.score(str(tiny_model_folder), "gold.jsonl", max_length=10, on_bad_row="skip")
    assert summary.num_examples == 9
    values = summary.to_json()
    assert values["rejected"] == {"longer than max_length": 21}
    assert values["first_rejected"] == {"longer than max_length": summary.first_rejected["longer than max_length"]}
    assert summary.first_rejected["longer than max_length"].startswith(
        "gold.jsonl:10: 11 tokens, but max_length is 10; "
    )
    first = "longer than max_length: first gold.jsonl:10: 11 tokens, but max_length is 10"
    lines = str(summary).splitlines()
    place = lines.index("rows skipped     21 longer than max_length")
    assert lines[place + 1] == f"                 {first}"
    assert first in summary._repr_html_()
    assert "skipped" not in str(goldsmith.score(str(tiny_model_folder), "gold.jsonl", on_bad_row="skip"))


def test_a_bad_row_at_the_end_is_told_before_anything_is_scored(
    tiny_model_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (here / "gold.jsonl").open("a") as file:
        file.write('{"prompt": "no gold"}\n')
    monkeypatch.setattr("goldsmith.workflows.scoring.score_windows", lambda *_, **__: pytest.fail("it was scored"))
    before = sorted(path.name for path in here.iterdir())
    with pytest.raises(DataError, match=r"gold\.jsonl:31"):
        goldsmith.score(str(tiny_model_folder), "gold.jsonl", output="scores.jsonl", device="cpu")
    assert sorted(path.name for path in here.iterdir()) == before


def test_it_says_how_many_rows_were_read_and_scored(
    tiny_model_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad rows count too; nothing is said where quiet, and nothing on standard output."""
    monkeypatch.setattr("goldsmith.workflows.saying._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("goldsmith.workflows.scoring._SAY_EVERY", 0.0)
    with (here / "gold.jsonl").open("a") as file:
        file.write('{"prompt": "no gold"}\n')
    goldsmith.score(str(tiny_model_folder), "gold.jsonl", on_bad_row="skip", device="cpu", quiet=False)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert [line.partition(" rows")[0] for line in lines[:31]] == [f"read {count}" for count in range(1, 32)]
    assert lines[-1] == "scored 30 of 30 examples"
    goldsmith.score(str(tiny_model_folder), "gold.jsonl", on_bad_row="skip", device="cpu")
    assert capsys.readouterr().err == ""


def test_a_window_of_rows_is_in_memory_and_not_all(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted are the examples that live when a window is written: its own, and the block that is read."""
    original, live = ScoreWriter.write_window, []

    def counts(self: ScoreWriter, examples: Any) -> None:
        live.append(sum(type(thing) is TokenizedExample for thing in gc.get_objects()))
        original(self, examples)

    monkeypatch.setattr(ScoreWriter, "write_window", counts)
    rows = ({"prompt": f"{n}", "completion": "x"} for n in range(60))
    gc.collect()
    others = sum(type(thing) is TokenizedExample for thing in gc.get_objects())
    summary = goldsmith.score(str(tiny_model_folder), rows, output="scores.jsonl", device="cpu")
    assert summary.num_examples == 60
    assert len(live) == 9
    assert max(live) - others <= 7 + 4 + 7


def test_scores_are_to_the_bit_those_of_rows_in_memory(tiny_model_folder: Path) -> None:
    goldsmith.score(str(tiny_model_folder), "gold.jsonl", with_tokens=True, output="scores.jsonl", device="cpu")
    opened = open_model(str(tiny_model_folder), device="cpu")
    windows = score_windows(
        opened.model,
        TokenTexts(opened.tokenizer),
        opened.dataset("gold.jsonl", columns=None, on_bad_row="stop"),
        Asked(tokens=True),
        tokens_per_microbatch=2048,
        shares_contexts=opened.shares_contexts,
    )
    expected = [score_to_json(one.scores) for window in windows for one in window]
    assert [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()] == expected


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    options: dict[str, Any] = {"alternatives": 2, "without_context": True, "device": "cpu"}
    model = str(tiny_model_folder)
    whole = goldsmith.score(model, "gold.jsonl", output=f"whole.{suffix}", **options)

    original, windows = ScoreWriter.write_window, []

    def dies(self: ScoreWriter, examples: Any) -> None:
        if len(windows) == 2:
            raise KeyboardInterrupt
        windows.append(len(examples))
        original(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreWriter, "write_window", dies)
        with pytest.raises(KeyboardInterrupt):
            goldsmith.score(model, "gold.jsonl", output=f"cut.{suffix}", **options)
    assert windows == [7, 7]
    assert not Path(f"cut.{suffix}").exists()
    with pytest.raises(MachineError, match="alternatives: 2 there, 0 here"):
        goldsmith.score(model, "gold.jsonl", output=f"cut.{suffix}", without_context=True, device="cpu")
    resumed = goldsmith.score(model, "gold.jsonl", output=f"cut.{suffix}", **options)
    assert Path(f"cut.{suffix}").read_bytes() == Path(f"whole.{suffix}").read_bytes()
    assert {**resumed.to_json(), "output": None} == {**whole.to_json(), "output": None}
    assert not list(Path().glob("*.partial"))
    rows = goldsmith.read_scores(f"cut.{suffix}")
    assert [row.example_id for row in rows] == [row["id"] for row in ROWS]
    assert {row.source_name for row in rows} == {"gold"}
    assert (rows[0].context, rows[0].context_tokens) == ("0 + 1 = ", 8)
    assert rows[0].tokens is not None
    assert all(len(token.alternatives or ()) == 2 for token in rows[0].tokens)


def test_the_command_prints_one_object(tiny_model_folder: Path) -> None:
    result = CliRunner().invoke(
        app, ["score", str(tiny_model_folder), "gold.jsonl", "--limit", "9", "--without-context", "--json", "-q"]
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["num_examples"] == 9
    for name in ("nll_per_token", "nll_per_example", "perplexity_interval", "bits_per_byte", "token_accuracy", "exact"):
        assert values[name]["low"] <= values[name]["estimate"] <= values[name]["high"]
    assert values["weighted_nll"]["estimate"] != values["nll_per_token"]["estimate"]
    assert set(values["difficulty"]["quantiles"]) == {"5%", "25%", "50%", "75%", "95%"}
    roles = [group for group in values["groups"] if group["by"] == "role"]
    assert [(group["label"], group["num_examples"]) for group in roles] == [("assistant", 9)]


def test_roles_are_told_apart_where_several_are_trained(tiny_model_folder: Path) -> None:
    run = Path("run")
    run.mkdir()
    (run / "recipe.yaml").write_text(
        f"model: {{path: '{tiny_model_folder}', device: cpu}}\ndata: {{train: gold.jsonl}}\n"
        "rendering: {train_on: [user, assistant]}\noutput_dir: run\n"
    )
    shutil.copytree(tiny_model_folder, run / "model")
    result = CliRunner().invoke(app, ["score", "run", "gold.jsonl", "--limit", "9", "--json", "-q"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    groups = {(group["by"], group["label"]): group for group in values["groups"]}
    for by, labels in (("role", ("user", "assistant")), ("turn", ("1", "2"))):
        own = [groups[by, label] for label in labels]
        assert [group["num_examples"] for group in own] == [9, 9]
        assert sum(group["num_target_tokens"] for group in own) == values["num_target_tokens"]
        assert sum(group["log_prob"] for group in own) == pytest.approx(values["log_prob"], rel=1e-12)
    assert groups["role", "user"]["log_prob"] == groups["turn", "1"]["log_prob"]
    for suffix in ("jsonl", "parquet"):
        live = goldsmith.score("run", "gold.jsonl", limit=9, with_tokens=True, output=f"scores.{suffix}")
        of_file = summarize(goldsmith.read_scores(f"scores.{suffix}"))
        assert [group.to_json() for group in of_file.groups] == [group.to_json() for group in live.groups]
    printed = CliRunner().invoke(app, ["score", "run", "gold.jsonl", "--limit", "9", "-q"])
    assert "by role of gold" in printed.output


@pytest.mark.parametrize("normalization", ["token", "example"])
def test_several_roles_with_weights_and_parts_are_scored_as_the_run_evaluated_them(
    here: Path, monkeypatch: pytest.MonkeyPatch, normalization: str
) -> None:
    """And where the scoring was interrupted the bytes and the figures are those of one that was not."""
    settings = settings_of_a_run()
    settings["data"] |= {"max_length": 9, "on_too_long": "split"}
    settings["rendering"] = {"train_on": ["user", "assistant"], "first_tokens": 2, "first_tokens_weight": 3.0}
    settings["objective"] = {"normalization": normalization}
    result = goldsmith.train(Recipe.from_mapping(settings), quiet=True)
    nll = result.to_pandas()[lambda frame: frame["kind"] == "evaluation"]["nll"].iloc[-1]
    whole = goldsmith.score("runs/it", "gold.jsonl", dtype="float64", output="whole.jsonl")
    assert whole.weighted_nll is not None
    assert whole.weighted_nll.estimate == pytest.approx(nll, rel=1e-9)
    assert whole.nll_per_token.estimate != pytest.approx(nll, rel=1e-6)
    roles = {group.label: group for group in whole.groups if group.by == "role"}
    assert set(roles) == {"user", "assistant"}
    assert sum(group.num_target_tokens for group in roles.values()) == whole.num_target_tokens
    assert sum(group.log_prob for group in roles.values()) == pytest.approx(whole.log_prob, rel=1e-12)
    # Every answer and its end is the assistant's, in whichever part of its row it came to lie.
    assert roles["assistant"].num_target_tokens == sum(len(str(row["completion"])) + 1 for row in ROWS)

    original, windows = ScoreWriter.write_window, []

    def dies(self: ScoreWriter, examples: Any) -> None:
        if len(windows) == 2:
            raise KeyboardInterrupt
        windows.append(len(examples))
        original(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreWriter, "write_window", dies)
        with pytest.raises(KeyboardInterrupt):
            goldsmith.score("runs/it", "gold.jsonl", dtype="float64", output="cut.jsonl")
    resumed = goldsmith.score("runs/it", "gold.jsonl", dtype="float64", output="cut.jsonl")
    assert Path("cut.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert {**resumed.to_json(), "output": None} == {**whole.to_json(), "output": None}


def test_models_are_compared_in_one_go(tiny_model_folder: Path, here: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    others = []
    for number in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1 + number / 5)
        others.append(f"other-{number}")
        model.save_pretrained(others[-1])
        AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(others[-1])
    result = CliRunner().invoke(app, ["compare", str(tiny_model_folder), *others, "gold.jsonl", "--json", "-q"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert {model["name"] for model in values["models"]} == {tiny_model_folder.name, *others}
    assert len(values["tests"]) == 3

    goldsmith.score(others[0], ROWS, output="one.jsonl", with_tokens=True, device="cpu")
    pair = goldsmith.compare_models("one.jsonl", others[1], data=ROWS, device="cpu")
    assert isinstance(pair, Comparison)
    assert pair.names == ("one.jsonl", "other-2")
    assert pair.num_shared == 30
    assert {group.by for group in pair.groups} == {"position"}
    assert isinstance(goldsmith.compare("one.jsonl", "one.jsonl", "one.jsonl", names=("x", "y", "z")), Ranking)
    with pytest.raises(ConfigError, match="so the last must be a file of gold"):
        goldsmith.workflows.compare(str(tiny_model_folder), others[0])  # type: ignore[attr-defined]


def another_model(origin: Path, folder: str, *, positions: int = 128, words: str | None = None) -> str:
    """The same with other weights, perhaps of fewer positions, or whose tokenizer knows another character."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(origin)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.config.max_position_embeddings = positions
    tokenizer = AutoTokenizer.from_pretrained(origin)
    if words is not None:
        model.resize_token_embeddings(len(tokenizer) + tokenizer.add_tokens([words]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_shortest_limit_is_that_of_all(tiny_model_folder: Path) -> None:
    """20 rows of 12 tokens, which only one of the two can take: left out, or cut, for both alike, and said."""
    first, short = str(tiny_model_folder), another_model(tiny_model_folder, "short", positions=11)
    with pytest.raises(DataError, match="longer than max_length: 20 rows") as caught:
        goldsmith.compare_models(first, short, data="gold.jsonl", device="cpu")
    assert "--on-too-long" in caught.value.message
    for policy, num_shared in (("drop", 10), ("left", 30), ("right", 30), ("split", 50)):
        pair = goldsmith.compare_models(first, short, data="gold.jsonl", on_too_long=policy, device="cpu")  # type: ignore[arg-type]
        assert isinstance(pair, Comparison)
        assert (pair.num_shared, pair.num_only_a, pair.num_only_b) == (num_shared, 0, 0)
        assert all(one.has_same_tokens and one.has_same_length and one.has_same_context for one in pair.pairs)
        [note] = pair.notes
        assert note.startswith("rows longer than 11 tokens (the limit of short): 20 ")
        assert note.endswith(", alike for all")
        assert note in str(pair)
        assert pair.to_json()["notes"] == [note]
    skipped = goldsmith.compare_models(short, first, data="gold.jsonl", on_bad_row="skip", device="cpu")
    assert (skipped.num_shared, *skipped.notes) == (
        10,
        "rows skipped: 20 longer than 11 tokens (the limit of short), alike for all",
        "longer than max_length: first gold.jsonl:11: 12 tokens, but max_length is 11",
    )
    longer = goldsmith.compare_models(first, short, data="gold.jsonl", max_length=118, device="cpu")
    assert (longer.num_shared, longer.notes) == (30, ())


def test_rows_that_no_model_is_compared_on_are_said(tiny_model_folder: Path, here: Path) -> None:
    """Bad rows, the same for all: how many, why, and where the first of each lies; of two models and of three."""
    with (here / "gold.jsonl").open("a") as file:
        file.write('{"prompt": "no gold"}\nnot JSON\n{"prompt": "none"}\n')
    models = [str(tiny_model_folder), *(another_model(tiny_model_folder, name) for name in ("one", "two"))]
    counts = {"invalid JSON": 1, "no completion": 2}
    for subjects in (models[:2], models):
        found = goldsmith.compare_models(*subjects, data="gold.jsonl", on_bad_row="skip", device="cpu")
        values = json.loads(json.dumps(found.to_json()))
        assert values["num_shared"] == 30
        assert values["rejected"] == {Path(name).name: counts for name in subjects}
        assert sorted(note.partition(": ")[0] for note in values["notes"]) == [
            "invalid JSON",
            "no completion",
            "rows skipped",
        ]
        assert values["notes"][0] in {
            f"rows skipped: {reasons}, alike for all"
            for reasons in ("1 invalid JSON, 2 no completion", "2 no completion, 1 invalid JSON")
        }
        firsts = ("no completion: first gold.jsonl:31: ", "invalid JSON: first gold.jsonl:32: ")
        for first in firsts:
            [note] = [note for note in values["notes"] if note.startswith(first)]
            assert note in str(found)
        assert "rows skipped: " in found._repr_html_()
        assert all(first in found._repr_html_() for first in firsts)
        assert len(found.to_pandas()) == (30 if isinstance(found, Comparison) else 3)
    command = ["compare", *models[:2], "gold.jsonl", "--skip-bad-rows", "-q"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].startswith("rows skipped: ")
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["rejected"]["one"] == counts


def model_of_one_token(origin: Path, folder: str, word: str) -> str:
    """The same, but for `word` its tokenizer has a token of its own."""
    from transformers import AutoModelForCausalLM

    another_model(origin, folder)
    settings = json.loads(Path(folder, "tokenizer.json").read_text())
    settings["pre_tokenizer"]["pattern"] = {"Regex": f"{word}|[^\\n]"}
    vocabulary = settings["model"]["vocab"]
    vocabulary[word] = len(vocabulary)
    Path(folder, "tokenizer.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def test_models_that_skip_other_rows_are_not_said_to_skip_the_same(tiny_model_folder: Path) -> None:
    """As many rows of both, but others: the row with `10` is short enough for the one, that with `30` for the other."""
    ten, thirty = (model_of_one_token(tiny_model_folder, f"of-{word}", word) for word in ("10", "30"))
    pair = goldsmith.compare_models(ten, thirty, data="gold.jsonl", on_bad_row="skip", max_length=11, device="cpu")
    assert isinstance(pair, Comparison)
    assert (pair.num_shared, pair.num_only_a, pair.num_only_b) == (10, 1, 1)
    too_long = "longer than 11 tokens (--max-length)"
    assert pair.notes == (
        f"rows skipped, of of-10: 19 {too_long}",
        f"rows skipped, of of-30: 19 {too_long}",
        "of of-10, longer than max_length: first gold.jsonl:12: 12 tokens, but max_length is 11",
        "of of-30, longer than max_length: first gold.jsonl:11: 12 tokens, but max_length is 11",
        "only what all have scored is compared: 10 examples",
    )
    dropped = goldsmith.compare_models(ten, thirty, data="gold.jsonl", on_too_long="drop", max_length=11, device="cpu")
    assert [note.partition(":")[0] for note in dropped.notes] == [
        f"rows {too_long}, of {name}" for name in ("of-10", "of-30")
    ]
    assert dropped.rejected == {"of-10": {}, "of-30": {}}

    goldsmith.score(ten, "gold.jsonl", output="ten.jsonl", on_bad_row="skip", max_length=11, device="cpu")
    mixed = goldsmith.compare_models(
        "ten.jsonl", thirty, data="gold.jsonl", on_bad_row="skip", max_length=11, device="cpu"
    )
    assert mixed.notes[0] == f"rows skipped, of of-30: 19 {too_long}"
    assert mixed.notes[-1] == "only what all have scored is compared: 10 examples"


def test_rows_that_a_cut_leaves_no_gold_are_said_beside_those_that_were_cut(
    tiny_model_folder: Path, here: Path
) -> None:
    (here / "gold.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "9" * 20, "completion": "1"}])
    )
    models = [str(tiny_model_folder), another_model(tiny_model_folder, "other")]
    pair = goldsmith.compare_models(
        *models, data="gold.jsonl", on_bad_row="skip", on_too_long="right", max_length=11, device="cpu"
    )
    assert pair.notes[0].startswith("rows longer than 11 tokens (--max-length): 20 cut, 1 rejected; ")
    assert pair.notes[1:] == (
        "rows skipped: 1 longer than 11 tokens (--max-length), alike for all",
        "longer than max_length: first gold.jsonl:31: 20 tokens stand before the gold, 2 from there on, and max_length is 11: "
        "no room is left",
    )


def test_rows_that_get_no_answer_are_said(tiny_model_folder: Path, here: Path) -> None:
    (here / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:3], {"prompt": "no gold"}]))
    command = ["generate", str(tiny_model_folder), "gold.jsonl", "--max-new-tokens", "2", "--device", "cpu", "-q"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 3
    command += ["--skip-bad-rows", "--output", "answers.jsonl"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    place = lines.index("rows skipped         1 no completion")
    assert lines[place + 1].startswith("                     no completion: first gold.jsonl:4: ")
    assert len(Path("answers.jsonl").read_text().splitlines()) == 3
    values = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert values["rejected"] == {"no completion": 1}
    assert values["first_rejected"]["no completion"].startswith("gold.jsonl:4: ")
    assert len(values["answers"]) == 3
    whole = workflows.generate(str(tiny_model_folder), data=ROWS[:2], max_new_tokens=2, on_bad_row="skip", device="cpu")
    assert whole.to_json()["rejected"] == {}
    assert "skipped" not in str(whole)


def test_gold_is_not_cut_by_other_tokens(tiny_model_folder: Path) -> None:
    first, other = str(tiny_model_folder), another_model(tiny_model_folder, "other", words="10")
    for policy in ("right", "split"):
        with pytest.raises(ConfigError, match=f"on_too_long {policy} cuts the gold by tokens") as caught:
            goldsmith.compare_models(first, other, data="gold.jsonl", on_too_long=policy, max_length=11)  # type: ignore[arg-type]
        assert "left" in str(caught.value.remedy)
    pair = goldsmith.compare_models(first, other, data="gold.jsonl", on_too_long="left", max_length=11, device="cpu")
    assert pair.num_shared == 30


def test_a_run_that_cut_rows_is_compared_on_whole_ones(here: Path) -> None:
    """And says so; asked for by name, its own limit holds for both."""
    settings = settings_of_a_run()
    settings["data"] |= {"max_length": 12, "on_too_long": "right", "end_token_after_cut": True}
    goldsmith.train(Recipe.from_mapping(settings), quiet=True)
    last = sorted((here / "runs/it/checkpoints").iterdir())[0]
    command = ["compare", "runs/it", str(last), "gold.jsonl", "--json", "-q"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["num_shared"] == 30
    assert [note.partition(";")[0] for note in values["notes"]] == [
        f"{name} was trained with on_too_long: right" for name in ("it", last.name)
    ]
    cut = json.loads(CliRunner().invoke(app, [*command, "--on-too-long", "right"]).stdout)
    assert cut["num_shared"] == 30
    assert [note.partition(":")[0] for note in cut["notes"]] == ["rows longer than 12 tokens (the limit of it)"]
    assert cut["num_target_tokens"][0] == cut["num_target_tokens"][1] == values["num_target_tokens"][0] - 20
    plain = goldsmith.compare_models("runs/it", "runs/it/model", data="gold.jsonl", on_too_long="right", device="cpu")
    assert isinstance(plain, Comparison)
    assert all(pair.has_same_tokens for pair in plain.pairs)  # neither ends with the end token where it was cut


def test_score_files_are_not_cut_and_a_wrong_one_is_told_first(
    tiny_model_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "a.jsonl").write_text('{"example_id": "r1", "log_prob": -1}\n')
    (here / "b.jsonl").write_text('{"example_id": "r1", "log_prob": 1}\n')
    result = CliRunner().invoke(app, ["compare", "a.jsonl", "a.jsonl", "--on-too-long", "drop"])
    assert result.exit_code == 2
    assert "only score files are given" in result.output
    monkeypatch.setattr("goldsmith.workflows.comparing.score_opened", lambda *_, **__: pytest.fail("it was scored"))
    with pytest.raises(DataError, match=r"b\.jsonl:1"):
        goldsmith.compare_models(str(tiny_model_folder), "b.jsonl", data="gold.jsonl", device="cpu")


def test_a_limit_beyond_learned_positions_is_refused(here: Path) -> None:
    settings = settings_of_a_run()
    settings["model"]["init"] = {"architecture": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    settings["output_dir"] = "learned"
    goldsmith.train(Recipe.from_mapping(settings), quiet=True)
    long = [{"prompt": "1 " * 40, "completion": "1"}]
    with pytest.raises(ConfigError, match="--max-length: 1000, but learned has 32 learned positions"):
        goldsmith.score("learned", long, max_length=1000)
    # Without a limit of its own a new model has its positions, by whatever name.
    settings["output_dir"] = "long"
    with pytest.raises(DataError, match="max_length is 32"):
        goldsmith.train(Recipe.from_mapping(settings), train_rows=[*ROWS, *long], quiet=True)
    # OPT's rows more than positions are an offset.
    opt = {"architecture": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for init in (settings["model"]["init"], {**opt, "max_position_embeddings": 32, "word_embed_proj_dim": 16}):
        settings["model"]["init"] = init
        settings["data"]["max_length"] = 33
        with pytest.raises(ConfigError, match=r"data\.max_length: 33, but .* has 32 learned positions"):
            goldsmith.train(Recipe.from_mapping(settings), quiet=True)
    settings["data"]["max_length"] = 1000
    settings["output_dir"] = "more"
    with pytest.raises(ConfigError, match=r"data\.max_length: 1000, but .* has 32 learned positions"):
        goldsmith.train(Recipe.from_mapping(settings), quiet=True)


def test_what_a_program_may_give_by_mistake_is_refused(here: Path, tiny_model_folder: Path) -> None:
    for options, said in (
        ({"tokens_per_microbatch": 0}, "tokens_per_microbatch: 0"),
        ({"tokens_per_microbatch": -1}, "tokens_per_microbatch: -1"),
        ({"max_length": 0}, "max_length: 0"),
        ({"limit": 0}, "limit: .* greater than or equal to 1"),
    ):
        with pytest.raises(ConfigError, match=said) as raised:
            goldsmith.score(str(tiny_model_folder), ROWS, **options)
        assert "--columns" not in str(raised.value)
        if "limit" not in options:
            with pytest.raises(ConfigError, match=said):
                goldsmith.compare_models("a", "b", data=ROWS, **options)
    with pytest.raises(ConfigError, match="dtype: 'int8' is not known"):
        goldsmith.score(str(tiny_model_folder), ROWS, dtype="int8")  # type: ignore[arg-type]
    for wrong in ("recipe.yaml", {"model": {}}):
        for workflow in (goldsmith.train, goldsmith.verify):
            with pytest.raises(ConfigError, match=f"the recipe is of type {type(wrong).__name__}"):
                workflow(wrong)  # type: ignore[arg-type]
    recipe = Recipe.from_mapping({**settings_of_a_run(), "output_dir": "nothing"})
    for call in (
        lambda: goldsmith.score(str(tiny_model_folder), 5),  # type: ignore[arg-type]
        lambda: goldsmith.compare_models("a", "b", data=5),  # type: ignore[arg-type]
        lambda: goldsmith.train(recipe, train_rows=5),  # type: ignore[arg-type]
    ):
        with pytest.raises(DataError, match="5 is of type int, and neither"):
            call()


def test_files_may_be_paths(here: Path, tiny_model_folder: Path) -> None:
    of_path, of_text = (
        goldsmith.score(str(tiny_model_folder), data) for data in (here / "gold.jsonl", str(here / "gold.jsonl"))
    )
    assert of_path == of_text
    other = shutil.copytree(tiny_model_folder, "other")
    found = goldsmith.compare_models(str(tiny_model_folder), str(other), data=here / "gold.jsonl", device="cpu")
    assert found.num_shared > 0
    with pytest.raises(ConfigError, match="the data itself"):
        goldsmith.generate(str(tiny_model_folder), here / "gold.jsonl", output=here / "gold.jsonl")


def test_one_prompt_is_one(tiny_model_folder: Path) -> None:
    assert len(goldsmith.generate(str(tiny_model_folder), prompts="1 + 1", max_new_tokens=1).answers) == 1


def test_a_pipe_or_a_device_is_not_replaced(
    here: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root could put a file in the place of /dev/null. Told before anything is computed."""
    monkeypatch.setattr("goldsmith.workflows.models.decode", None)
    pipe, link = here / "pipe", here / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for output in (pipe, link):
        with pytest.raises(ConfigError, match="no ordinary file"):
            goldsmith.score(str(tiny_model_folder), ROWS, output=output)
        with pytest.raises(ConfigError, match="no ordinary file"):
            goldsmith.generate(str(tiny_model_folder), prompts=["1"], max_new_tokens=1, output=output)
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_a_damaged_checkpoint_is_not_scored(here: Path) -> None:
    folder = goldsmith.train(Recipe.from_mapping(settings_of_a_run()), quiet=True).output_dir / "checkpoints"
    checkpoint = max(folder.glob("step-*"))
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"sha256 differs.*\n.*another checkpoint"):
        goldsmith.score(str(checkpoint), ROWS)
