"""Recipes: strict reading, the place and nearest key in every error, overrides, paths, the way there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goldsmith.errors import ConfigError
from goldsmith.recipe import Recipe, load_recipe

SMALLEST = "model: {path: owner/name}\ndata: {train: train.jsonl}\n"

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """`load(text, *overrides)` writes `legal.yaml` and reads it."""

    def write_and_load(text: str | bytes, *overrides: str) -> Recipe:
        path = tmp_path / "legal.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_recipe(path, overrides)

    return write_and_load


def message_of(load: Load, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- what is read


def test_the_smallest_recipe_has_the_defaults_of_the_design(load: Load) -> None:
    recipe = load(SMALLEST)
    assert recipe.model.path == "owner/name"
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.training.tokens_per_microbatch) == (3, 64, 8192)
    assert recipe.optimizer.learning_rate == 2e-5
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.objective.normalization == "token"
    assert recipe.rendering.boundary == "separate"
    assert recipe.data.on_bad_row == "stop"
    assert (recipe.checkpoint.every_steps, recipe.checkpoint.keep) == (500, 2)
    assert recipe.evaluation.every_steps is None


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("2.0e-5", 2e-5), ("1E-3", 1e-3), ("+.5", 0.5), ("1e5", 1e5), ("1.", 1.0), ("3", 3.0)],
)
def test_numbers_are_numbers(load: Load, written: str, value: float) -> None:
    rate = load(f"{SMALLEST}optimizer: {{learning_rate: {written}}}\n").optimizer.learning_rate
    assert isinstance(rate, float)
    assert rate == value


def test_a_whole_number_may_be_written_as_a_float(load: Load) -> None:
    steps = load(f"{SMALLEST}training: {{max_steps: 1e5, batch_size: 32.0}}\n").training
    assert (steps.max_steps, steps.batch_size) == (100_000, 32)
    assert isinstance(steps.max_steps, int)


@pytest.mark.parametrize("written", ["no", "on", "2024-01-01", "1:30", "0b1", "1_000"])
def test_what_yaml_1_1_would_convert_stays_text(load: Load, written: str) -> None:
    assert load(f"{SMALLEST}rendering: {{separator: {written}}}\n").rendering.separator == written


def test_a_section_whose_keys_are_commented_out_means_its_defaults(load: Load) -> None:
    assert load(f"{SMALLEST}training:\n#  epochs: 9\ncheckpoint: null\n").training.epochs == 3


def test_utf8_with_byte_order_mark(load: Load) -> None:
    assert load(b"\xef\xbb\xbf" + f"{SMALLEST}rendering: {{separator: Größe}}".encode()).rendering.separator == "Größe"


def test_a_recipe_is_frozen(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(SMALLEST).output_dir = "elsewhere"  # type: ignore[misc]


# --- unknown keys


@pytest.mark.parametrize(
    ("text", "place", "key", "nearest"),
    [
        ("optimizer:\n  learnign_rate: 1e-4\n", ":4", "optimizer.learnign_rate", "`learning_rate`"),
        ("optimizer: {lr: 1e-4}\n", ":3", "optimizer.lr", "`learning_rate`"),
        ("training: {learning_rate: 1e-4}\n", ":3", "training.learning_rate", "`optimizer.learning_rate`"),
        ("batch_size: 3\n", ":3", "batch_size", "`training.batch_size`"),
        ("Objective: {}\n", ":3", "Objective", "`objective`"),
        ("outputdir: x\n", ":3", "outputdir", "`output_dir`"),
        ("adapters: {kind: lora}\n", ":3", "adapters", "`adapter`"),
        # keys of rooms that do not exist yet
        ("synthesis: []\n", ":3", "synthesis", "known here: model, "),
    ],
)
def test_unknown_key(load: Load, text: str, place: str, key: str, nearest: str) -> None:
    message = message_of(load, SMALLEST + text)
    assert f"legal.yaml{place}: {key}: unknown key; nearest known key: " in message
    assert nearest in message


def test_unknown_key_within_a_list_of_sources(load: Load) -> None:
    message = message_of(load, "model: {path: a/b}\ndata:\n  train:\n    - path: x\n      wieght: 2\n")
    assert "legal.yaml:5: data.train.0.wieght: unknown key; nearest known key: `weight`" in message


def test_unknown_key_of_a_source_that_stands_for_a_list(load: Load) -> None:
    message = message_of(load, "model: {path: a/b}\ndata:\n  train:\n    path: x\n    wieght: 2\n")
    assert "legal.yaml:5: data.train.wieght: unknown key; nearest known key: `weight`" in message


# --- wrong values


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training:\n  batch_size: many\n", [":4: training.batch_size: 'many' (text)", "expected an integer"]),
        ("training: {batch_size: '64'}\n", ["'64' (text)", "expected an integer"]),
        ("training: {epochs: true}\n", ["true (a boolean)", "expected an integer"]),
        ("training: {epochs: 1.5}\n", ["1.5 (a number)", "expected an integer"]),
        ("training: {batch_size: 0}\n", ["0 (an integer)", "greater than 0"]),
        ("training: {batch_size: [1]}\n", ["[1] (a list)", "expected an integer"]),
        ("optimizer: {learning_rate: fast}\n", ["optimizer.learning_rate", "'fast' (text)", "expected a number"]),
        ("optimizer: {betas: [1, 2, 3]}\n", ["optimizer.betas", "[1, 2, 3]"]),
        ("objective: {normalization: mean}\n", ["'mean' (text)", "'token', 'example' or 'sum'"]),
        ("objective: 3\n", [":3: objective: 3 (an integer)", "a mapping of keys"]),
        ("rendering: {separator: }\n", ["rendering.separator: null", 'write "" for an empty text']),
        ("output_dir: 3\n", ["output_dir: 3 (an integer)", "expected a string"]),
        ("output_dir: ''\n", ["output_dir: '' (text)", "at least 1"]),
    ],
)
def test_wrong_value(load: Load, text: str, parts: list[str]) -> None:
    message = message_of(load, SMALLEST + text)
    for part in parts:
        assert part in message


def test_members_of_a_union_are_one_problem(load: Load) -> None:
    message = message_of(load, "model: {path: a/b}\ndata:\n  train: x\n  columns:\n    prompt: 1.5\n")
    assert "legal.yaml:5: data.columns.prompt: 1.5 (a number) was seen; expected" in message
    assert "an integer" in message
    assert "a string" in message
    assert "problems" not in message


def test_every_problem_is_named_in_the_order_of_the_file(load: Load) -> None:
    message = message_of(load, "training: {epochs: x}\noptimizer: {lr: 1}\ndata: {train: a}\n")
    places = ["3 problems", "legal.yaml: model: missing", "legal.yaml:1: training.epochs", "legal.yaml:2: optimizer.lr"]
    assert [place for place in places if place in message] == places
    assert message.index("training.epochs") < message.index("optimizer.lr")


def test_what_has_no_default(load: Load) -> None:
    assert "model: missing, and it has no default" in message_of(load, "model:\ndata: {}\n")
    message = message_of(load, "model: {path: a/b}\ndata: {}\n")
    assert "legal.yaml:2: data.train: missing, and it has no default" in message


def test_a_model_is_a_path_or_an_init(load: Load) -> None:
    assert "legal.yaml:1: model: " in message_of(
        load, "model: {path: a/b, init: {architecture: llama}}\ndata: {train: a}\n"
    )


def test_a_model_from_nothing_needs_a_tokenizer(load: Load) -> None:
    text = "model: {init: {architecture: llama}}\ndata: {train: a}\n"
    assert "tokenizer.train" in message_of(load, text)
    assert load(f"{text}tokenizer: {{train: {{kind: character}}}}\n").tokenizer.train is not None


def test_a_published_model_keeps_its_token_ids(load: Load) -> None:
    assert "embeddings" in message_of(load, f"{SMALLEST}tokenizer: {{train: {{kind: character}}}}\n")


# --- what is no recipe

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "the recipe is empty"),
        ("# only a comment\n", "the recipe is empty"),
        ("- a\n- b\n", "a mapping of keys, but this file holds"),
        ("just text\n", "a mapping of keys, but this file holds 'just text'"),
        ("a:\n\tb: 2\n", "legal.yaml:2: a tab where YAML wants spaces"),
        ("model: {path: x\n", "legal.yaml:2: "),
        ("model: 'x\n", "legal.yaml:"),
        ("a: 1\nb: 2\na: 3\n", "legal.yaml:3: a: the same key again; it is on line 1 already"),
        ("a:\n  b: 1\n  b: 1\n", "legal.yaml:3: a.b: the same key again; it is on line 2 already"),
        (BOMB, "legal.yaml:1: anchors and aliases"),
        ("a: *b\n", "anchors and aliases (here 'b')"),
        ("? [a]\n: b\n", "legal.yaml:1: a key must be a name"),
        ("!!python/object/apply:os.system [echo]\n", "the YAML tag"),
        ("a: !!set {x}\n", "legal.yaml:1: a: the YAML tag"),
        ("a: !!int x\n", "a: 'x' (text) is not a number"),
        ("a: .inf\n", "legal.yaml:1: a: .inf is not a finite number"),
        ("a: 1e999\n", "not a finite number"),
        ("a: .nan\n", "not a finite number"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "[" * 50 + "]" * 50, "nested too deeply"),
        (b"a: 1\nb: \x80\n", "legal.yaml:2: byte 0x80 is not UTF-8"),
        (b"\x00\x01\x02", "not YAML text"),
        (b"x" * ((1 << 20) + 1), "larger than 1048576 bytes"),
        (SMALLEST + 'output_dir: "\\ud800"\n', "not Unicode"),
    ],
)
def test_what_is_no_recipe(load: Load, text: str | bytes, part: str) -> None:
    assert part in message_of(load, text)


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder, not a file"):
        load_recipe(tmp_path)


# --- overrides


def test_overrides_are_yaml_and_the_last_one_holds(load: Load) -> None:
    recipe = load(
        SMALLEST,
        "optimizer.learning_rate=1e-4",
        "optimizer.betas=[0.8, 0.95]",
        "rendering.separator=' = '",
        "training.max_steps=5",
        "training.max_steps=null",
        "optimizer.learning_rate=1e-3",
    )
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.optimizer.betas == (0.8, 0.95)
    assert recipe.rendering.separator == " = "
    assert recipe.training.max_steps is None


def test_overrides_reach_into_lists_and_free_mappings(load: Load) -> None:
    recipe = load(
        "model: {init: {architecture: llama, hidden_size: 8}}\ntokenizer: {train: {kind: byte}}\n"
        "data: {train: [{path: a}, {path: b}]}\n",
        "data.train.1.weight=2",
        "model.init.hidden_size=64",
        "data.columns.prompt=question",
    )
    assert [source.weight for source in recipe.data.train] == [1.0, 2.0]
    assert recipe.model.init == {"architecture": "llama", "hidden_size": 64}
    assert recipe.data.columns == {"prompt": "question"}


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optimizer.lr=1", "--set optimizer.lr=1: optimizer.lr: unknown key; nearest known key: `learning_rate`"),
        ("optimizer.learning_rate=fast", "'fast' (text) was seen; expected a number"),
        ("training.epochs", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("training..epochs=3", "not of the form key=value"),
        ("data.train.0.weight=2", "data.train holds 'train.jsonl' (text), which has no key '0'"),
        ("output_dir.name=2", "which has no key 'name'"),
        ("training.epochs=[", "--set training.epochs=[: "),
        ("training.epochs=&a 1", "anchors and aliases"),
        ("rendering.separator=", "null was seen"),
    ],
)
def test_wrong_override(load: Load, override: str, part: str) -> None:
    assert part in message_of(load, SMALLEST, override)


def test_override_of_a_position_that_is_not_there(load: Load) -> None:
    text = "model: {path: a/b}\ndata: {train: [{path: a}]}\n"
    for position in ("1", "-1", "x"):
        assert "a list of 1" in message_of(load, text, f"data.train.{position}.weight=2")


# --- paths


def test_what_is_read_lies_beside_the_recipe_and_what_is_written_here(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = load(
        "model: {path: a/b}\ndata: {train: [data/*.jsonl, /abs.jsonl], eval: ../e.csv}\n"
        "rendering: {chat_template: t.jinja}\noutput_dir: runs/x\n"
    )
    assert [source.path for source in recipe.data.train] == [f"{tmp_path}/data/*.jsonl", "/abs.jsonl"]
    assert [source.path for source in recipe.data.eval] == [f"{tmp_path}/../e.csv"]
    assert recipe.rendering.chat_template == f"{tmp_path}/t.jinja"
    assert recipe.output_dir == f"{here}/runs/x"


def test_paths_typed_with_set_are_relative_to_the_current_directory(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    text = "model: {path: a/b}\ndata: {train: [{path: a}, {path: b}]}\n"
    assert load(text, "data.train=c").data.train[0].path == f"{here}/c"
    train = load(text, "data.train.1.path=c").data.train
    assert [source.path for source in train] == [f"{tmp_path}/a", f"{here}/c"]


def test_a_model_path_is_a_folder_where_one_exists_else_a_hub_id(load: Load, tmp_path: Path) -> None:
    def path_of(written: str) -> str | None:
        return load(f"model: {{path: {written}}}\ndata: {{train: a}}\n").model.path

    assert path_of("owner/name") == "owner/name"
    assert path_of("gpt2") == "gpt2"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert path_of("owner/name") == f"{tmp_path}/owner/name"
    # Plainly a path: an error about it must name the folder that was meant.
    assert path_of("./none") == f"{tmp_path}/none"
    assert path_of("../models/x/y") == f"{tmp_path}/../models/x/y"
    assert path_of("~/model") == str(Path.home() / "model")
    assert path_of("a/b/c") == f"{tmp_path}/a/b/c"


def test_the_run_folder_is_named_after_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pronunciation"
    folder.mkdir()
    for file, name in (("recipe.yaml", "pronunciation"), ("small.yaml", "small")):
        (folder / file).write_text(SMALLEST)
        assert load_recipe(f"pronunciation/{file}").output_dir == f"{tmp_path}/runs/{name}"


# --- there and back


def test_to_yaml_gives_every_value_and_loads_back_equal(load: Load, tmp_path: Path) -> None:
    recipe = load(
        f"{SMALLEST}optimizer: {{learning_rate: 1e-7, max_grad_norm: null}}\nrendering: {{separator: '1e5'}}\n"
    )
    text = recipe.to_yaml()
    written = yaml.safe_load(text)
    assert set(written) == set(Recipe.model_fields)
    assert written["optimizer"] == {
        **recipe.optimizer.model_dump(mode="json"),
        "learning_rate": 1e-7,
        "max_grad_norm": None,
    }
    back = tmp_path / "deeper" / "recipe.yaml"
    back.parent.mkdir()
    back.write_text(text)
    assert load_recipe(back) == recipe
    assert load_recipe(back).differences(recipe) == {}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    separator=st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(
        ["1e5", "1e-4", "null", "~", "no", "0x1", "1_0", ".5", "1:30", "2024-01-01", "<<", "=", "\x85", "a\u2028 b"]
    ),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    free=st.dictionaries(st.sampled_from(["1", "on", "x y"]), st.integers() | st.floats(-1e9, 1e9) | st.booleans()),
)
def test_any_value_survives_the_way_there_and_back(
    tmp_path: Path, separator: str, rate: float, free: dict[str, Any]
) -> None:
    recipe = Recipe.from_mapping(
        {
            "model": {"init": {"architecture": "llama", **free}},
            "tokenizer": {"train": {"kind": "byte"}},
            "data": {"train": "a.jsonl"},
            "rendering": {"separator": separator},
            "optimizer": {"learning_rate": rate},
        }
    )
    path = tmp_path / "back.yaml"
    path.write_bytes(recipe.to_yaml().encode())
    assert load_recipe(path) == recipe


def test_differences_name_dotted_keys(load: Load) -> None:
    one = load(f"{SMALLEST}output_dir: a\n")
    other = load(
        "model: {path: owner/name}\ndata: {train: [train.jsonl, more.jsonl]}\noutput_dir: a\ntraining: {epochs: 4}\n"
    )
    differences = one.differences(other)
    assert differences["training.epochs"] == (3, 4)
    assert differences["data.train.1.weight"] == (None, 1.0)
    assert {key for key in differences if not key.startswith("data.train.1.")} == {"training.epochs"}


# --- from Python


def test_from_mapping_is_as_strict_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {"model": {"path": "a/b"}, "data": {"train": "x.jsonl"}}
    assert Recipe.from_mapping(values).data.train[0].path == f"{tmp_path}/x.jsonl"
    with pytest.raises(ConfigError, match=r"recipe: training\.epochs: '3' \(text\) was seen; expected an integer"):
        Recipe.from_mapping({**values, "training": {"epochs": "3"}})
    with pytest.raises(ConfigError, match="nearest known key: `epochs`"):
        Recipe.from_mapping({**values, "training": {"epoch": 3}})
    with pytest.raises(ConfigError, match="a value that a recipe cannot hold"):
        Recipe.from_mapping({**values, "training": {"epochs": object()}})
    with pytest.raises(ConfigError, match="a value that a recipe cannot hold"):
        Recipe.from_mapping({**values, "training": {"epochs": float("nan")}})
