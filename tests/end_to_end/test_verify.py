"""`goldsmith verify`: it holds on real paths, and a planted fault makes it fail with exit code 4."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from goldsmith import workflows
from goldsmith.cli import app
from goldsmith.errors import ConfigError, NumericalError
from goldsmith.inspection.verify import _gradient_difference
from goldsmith.models import attention_cpu, checkpointing, likelihood, step
from goldsmith.models.layout import PackLayout, current_layout, pack_layout
from goldsmith.objective import normalization
from goldsmith.recipe import Recipe, load_recipe

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": {"architecture": "llama", **SIZES, "num_key_value_heads": 2},
    "gemma2": {"architecture": "gemma2", **SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "mistral": {"architecture": "mistral", **SIZES, "num_key_value_heads": 2, "sliding_window": 6},
    "gpt2": {"architecture": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {"architecture": "mixtral", **SIZES, "num_key_value_heads": 2, "num_local_experts": 4},
}


def recipe_for(folder: Path, model: str = "llama", **objective: object) -> str:
    prompt = "the same long prompt stands before every row of this file, so that it can be shared. "
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(12):
            row = {"prompt": f"{prompt * (number % 3)}{number}", "completion": "gold " * (1 + number % 4) ** 2}
            file.write(json.dumps(row) + "\n")
    values = {
        "model": {"init": MODELS[model]},
        "tokenizer": {"train": {"kind": "character"}},
        "data": {"train": "rows.jsonl"},
        "objective": objective,
    }
    (folder / "recipe.yaml").write_text(json.dumps(values))
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("normalization", ["token", "example"])
def test_it_holds(tmp_path, model, normalization):
    recipe = load_recipe(recipe_for(tmp_path, model, normalization=normalization, label_smoothing=0.1))
    report = workflows.verify(recipe, num_rows=9)
    assert report.holds, str(report)
    assert report.dtype == "float64"
    assert report.cuts[0].microbatches == 2
    assert report.cuts[1].microbatches == 1
    shared = [cut for cut in report.cuts if cut.computed_tokens < report.tokens]
    assert report.cuts[-1].name == "one pack, layers computed again"
    assert bool(shared) == (model in ("llama", "gpt2", "mixtral"))
    assert not (tmp_path / "runs").exists()


def test_float32(tmp_path):
    report = workflows.verify(load_recipe(recipe_for(tmp_path)), dtype="float32")
    assert report.holds, str(report)
    assert report.dtype == "float32"


@pytest.mark.parametrize(("kind", "rank", "alpha"), [("rslora", 16, 512), ("lora", 1, 256), ("dora", 2, 1024)])
def test_an_adapter_of_a_large_scale_holds(tmp_path, tiny_model_folder, kind, rank, alpha):
    """Rounding only: random factors must not drown the model's own weights and raise what float32 norms leave."""
    recipe_for(tmp_path)
    values = {
        "model": {"path": str(tiny_model_folder)},
        "adapter": {"kind": kind, "rank": rank, "alpha": alpha},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 4096},
    }
    report = workflows.verify(Recipe.from_mapping(values), num_rows=4)
    assert report.holds, str(report)


@pytest.mark.parametrize(
    ("options", "said"), [({"num_rows": 1}, "num_rows is 1"), ({"dtype": "float16"}, "dtype is 'float16'")]
)
def test_options_that_mean_nothing_are_refused(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        workflows.verify(load_recipe(recipe_for(tmp_path)), **options)


def see_a_neighbour(monkeypatch):
    plan = PackLayout.plan

    def faulty(lengths, *arguments, segment_parents=None, **others):
        merged = [lengths[0] + lengths[1], *lengths[2:]] if len(lengths) > 1 else lengths
        return plan(merged, *arguments, **others)

    monkeypatch.setattr(PackLayout, "plan", faulty)


def mean_of_means(monkeypatch):
    def faulty(batch, name, *, denominator=1.0):
        own = normalization.token_coefficients(batch, name)
        return own / own.sum() / 2 if denominator != 1.0 else own

    monkeypatch.setattr(step, "token_coefficients", faulty)


def positions_go_on(monkeypatch):
    pack = step.pack

    def faulty(*arguments):
        batch = pack(*arguments)
        return dataclasses.replace(batch, position_ids=torch.arange(batch.num_tokens))

    monkeypatch.setattr(step, "pack", faulty)


def wrong_scale(monkeypatch):
    head = likelihood.LikelihoodModel.head
    monkeypatch.setattr(
        likelihood.LikelihoodModel, "head", lambda self: dataclasses.replace(head(self), logit_scale=1.001)
    )


def not_a_number(monkeypatch):
    objective = likelihood.linear_cross_entropy

    def faulty(*arguments, **others):
        sums = objective(*arguments, **others)
        return dataclasses.replace(sums, weighted_nll=sums.weighted_nll * float("nan"))

    monkeypatch.setattr(likelihood, "linear_cross_entropy", faulty)


def log_probs_not_a_number(monkeypatch):
    """The loss and its gradient are right; what evaluation and scoring read is not."""
    objective = likelihood.linear_cross_entropy

    def faulty(*arguments, **others):
        sums = objective(*arguments, **others)
        return dataclasses.replace(sums, log_probs_K=sums.log_probs_K * float("nan"))

    monkeypatch.setattr(likelihood, "linear_cross_entropy", faulty)


def a_gradient_not_a_number(monkeypatch):
    """Of one parameter out of many."""
    sound = step.forward_backward

    def faulty(model, *arguments, **others):
        sums = sound(model, *arguments, **others)
        next(model.parameters()).grad[0, 0] = float("nan")
        return sums

    monkeypatch.setattr("goldsmith.inspection.verify.forward_backward", faulty)


def shifted_twice(monkeypatch):
    pack = step.pack

    def faulty(*arguments):
        batch = pack(*arguments)
        return dataclasses.replace(batch, target_positions=batch.target_positions + 1)

    monkeypatch.setattr(step, "pack", faulty)


def shared_gradient_dropped(monkeypatch):
    backward = attention_cpu._flash_backward

    def faulty(*arguments, **others):
        query, key, value = backward(*arguments, **others)
        is_over_ancestor = not arguments[7] and others.get("attn_mask") is None
        return (query, torch.zeros_like(key), torch.zeros_like(value)) if is_over_ancestor else (query, key, value)

    monkeypatch.setattr(attention_cpu, "_flash_backward", faulty)


def layers_computed_again_otherwise(monkeypatch):
    """As where a random number is drawn anew."""

    def forward(own, hidden, *arguments, **keywords):
        layout = current_layout()

        def compute(hidden, *arguments, **keywords):
            is_again = torch._C._current_graph_task_id() != -1
            with pack_layout(layout):
                return own(hidden * (1.01 if is_again else 1.0), *arguments, **keywords)

        if not torch.is_grad_enabled():
            return own(hidden, *arguments, **keywords)
        return checkpointing.checkpoint(compute, hidden * 1.0, *arguments, use_reentrant=False, **keywords)

    monkeypatch.setattr(checkpointing, "_forward", forward)


# A model of learnt positions: rotary ones are relative, and do not care where a row begins.
@pytest.mark.parametrize(
    ("plant", "model"),
    [
        (see_a_neighbour, "llama"),
        (mean_of_means, "llama"),
        (positions_go_on, "gpt2"),
        (wrong_scale, "llama"),
        (not_a_number, "llama"),
        (log_probs_not_a_number, "llama"),
        (a_gradient_not_a_number, "llama"),
        (shifted_twice, "llama"),
        (shared_gradient_dropped, "llama"),
        (layers_computed_again_otherwise, "llama"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_fault_fails(tmp_path, monkeypatch, plant, model):
    recipe = recipe_for(tmp_path, model)
    # The proof would refuse most of these already; here it is the command's own comparison that must see them.
    proof = workflows.verify.__globals__["prove"](
        __import__("transformers").LlamaConfig(vocab_size=64, **SIZES), name="sound"
    )
    monkeypatch.setitem(workflows.verify.__globals__, "prove", lambda *_, **__: proof)
    plant(monkeypatch)
    outcome = CliRunner().invoke(app, ["verify", recipe, "--json"])
    assert outcome.exit_code == 4, outcome.output
    values = json.loads(outcome.stdout)
    assert values["holds"] is False
    assert not all(cut["holds"] for cut in values["cuts"])


@pytest.mark.parametrize("plant", [see_a_neighbour, mean_of_means, shifted_twice, shared_gradient_dropped])
def test_a_planted_fault_fails_in_float32_too(tmp_path, monkeypatch, plant):
    """Where a model is too large for float64, whose limits are a hundred times tighter."""
    recipe = load_recipe(recipe_for(tmp_path))
    proof = workflows.verify.__globals__["prove"](
        __import__("transformers").LlamaConfig(vocab_size=64, **SIZES), name="sound"
    )
    monkeypatch.setitem(workflows.verify.__globals__, "prove", lambda *_, **__: proof)
    plant(monkeypatch)
    report = workflows.verify(recipe, dtype="float32")
    assert not report.holds, str(report)


def test_a_gradient_that_is_not_a_number_is_not_hidden_by_the_next():
    fast, plain = ({key: torch.ones(2) for key in "abcd"} for _ in range(2))
    fast["b"] = torch.tensor([1.0, float("nan")])
    difference, where = _gradient_difference(fast, plain)
    assert difference != difference
    assert where == "b"


def test_a_model_that_is_not_finite_by_itself_is_no_fault_of_the_fast_path(tmp_path, monkeypatch):
    recipe = load_recipe(recipe_for(tmp_path))
    causal_lm_of = workflows.verify.__globals__["causal_lm_of"]

    def damaged(*arguments, **others):
        causal_lm = causal_lm_of(*arguments, **others)
        causal_lm.model.norm.weight.data[0] = float("nan")
        return causal_lm

    monkeypatch.setitem(workflows.verify.__globals__, "causal_lm_of", damaged)
    with pytest.raises(NumericalError, match="plain path gives a loss of nan"):
        workflows.verify(recipe)


def test_two_rows_are_packed_together(tmp_path):
    outcome = CliRunner().invoke(app, ["verify", recipe_for(tmp_path), "--rows", "2", "--json"])
    assert outcome.exit_code == 0
    assert [cut["microbatches"] for cut in json.loads(outcome.stdout)["cuts"]][:2] == [2, 1]
    assert CliRunner().invoke(app, ["verify", recipe_for(tmp_path), "--rows", "1"]).exit_code == 2


def test_the_command_prints_a_table(tmp_path):
    outcome = CliRunner().invoke(app, ["verify", recipe_for(tmp_path), "--rows", "4"])
    assert outcome.exit_code == 0
    for heading in ("d loss", "d log p", "d gradient", "allowed"):
        assert heading in outcome.stdout
    assert "The fast path gives what the plain path gives." in outcome.stdout


def test_one_row_proves_nothing(tmp_path):
    recipe = recipe_for(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    outcome = CliRunner().invoke(app, ["verify", recipe])
    assert outcome.exit_code == 3
    assert "at least two rows" in outcome.stderr
