"""The invariance law as a matrix: every pair of factors of `matrix.FACTORS`, and by `make invariance` their whole product.

make invariance                 the product; an hour or two on one core
make invariance SHARD=2/8       the second of eight parts, which may run on other machines or at another time
make invariance ARGS=--last-failed
"""

from __future__ import annotations

import ast
import os
import time
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import covering_array, full_product
from families import BY_HAND, FAMILIES
from matrix import CUT, FACTORS, Outcome, canonical, fast_model, run_case, typical

from goldsmith.models.likelihood import LikelihoodModel

SEED = 1
CASES = covering_array(FACTORS, seed=SEED)
_seen: dict[str, float] = {}


def name_of(case: dict[str, Any]) -> str:
    return " ".join(str(value) for value in case.values())


def test_the_cases_cover_every_pair() -> None:
    for first, second in combinations(FACTORS, 2):
        seen = {(case[first], case[second]) for case in CASES}
        assert seen == set(product(FACTORS[first], FACTORS[second])), (first, second)
    assert covering_array(FACTORS, seed=SEED) == CASES  # the same on every machine
    assert len(CASES) < 60


def test_the_plain_side_imports_nothing_of_the_fast_path(repository: Path) -> None:
    """Nor do the files that it gets its models and its float64 from: torch, transformers, peft and the standard library only."""
    allowed = {"torch", "transformers", "peft", "collections", "contextlib", "dataclasses", "typing", "__future__"}
    for name in ("numeric/plain.py", "numeric/lift.py", "invariance/families.py"):
        tree = ast.parse((repository / "tests" / name).read_text())
        modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        modules += [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert {module.partition(".")[0] for module in modules} <= allowed, name
    # The plain path of `goldsmith verify` may know what an example is, and nothing else of the package.
    tree = ast.parse((repository / "src/goldsmith/inspection/plain.py").read_text())
    own = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {module for module in own if module.startswith("goldsmith")} == {"goldsmith.types"}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_pairs(case: dict[str, Any], record_property: Any) -> None:
    outcome = run_case(case)
    _note(outcome)
    for name, value in _figures(outcome).items():
        record_property(name, value)
    assert not outcome.broken, outcome.broken


@pytest.mark.skipif("activation_checkpointing" not in CUT, reason="waits for training.activation_checkpointing")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", CUT["layers"])
def test_activations_are_computed_again_where_a_case_says_so(family: str, layers: str) -> None:
    """The factor does what it is called: with it much less is kept for the backward pass."""
    kept = {}
    for value in CUT["activation_checkpointing"]:
        case = typical(family=family, layers=layers, activation_checkpointing=value)
        run_case(case, in_float32=False, evaluates=False)  # the plain side is cached from here on
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            run_case(case, in_float32=False, evaluates=False)
        kept[value] = sum(sizes)
    assert 0 < kept["layers"] < 0.6 * kept["none"], kept


def test_the_errors_that_were_seen() -> None:
    """The table of docs/exactness.md (with `-s`); and that there was something to see: float32 does err."""
    if not _seen:
        pytest.skip("waits for test_pairs, which ran in no or another process")
    print()
    for name, value in _seen.items():
        print(f"{name:<28}{value:.1e}")
    assert _seen["float32 gradient"] > 1e-8
    assert 0 < _seen["float64 gradient"] < _seen["float32 gradient"] / 1000


def _figures(outcome: Outcome) -> dict[str, float]:
    sides = {"float64": outcome.float64, "float32": outcome.float32, "plain float32": outcome.plain_float32}
    figures = {
        f"{side} {name}": getattr(errors, name)
        for side, errors in sides.items()
        if errors is not None
        for name in ("loss", "log_prob", "gradient")
    }
    return {**figures, "float64 evaluation": outcome.evaluation}


def _note(outcome: Outcome) -> None:
    for name, value in _figures(outcome).items():
        _seen[name] = max(_seen.get(name, 0.0), value)


# ------------------------------------------------------------------------------------------------------ the full product

GROUPS = list(product(FACTORS["family"], FACTORS["trained"]))


def shard() -> list[tuple[str, str]]:
    """The groups of this part of the product: `GOLDSMITH_SHARD=i/n`, i from 1."""
    part, _, parts = os.environ.get("GOLDSMITH_SHARD", "1/1").partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"GOLDSMITH_SHARD={os.environ['GOLDSMITH_SHARD']!r}: give i/n with 1 <= i <= n")
    return GROUPS[int(part) - 1 :: int(parts)]


def product_of(family: str, trained: str) -> list[dict[str, Any]]:
    """All cases of a family and what is trained of it, without those that run the same code as another."""
    factors = {**FACTORS, "family": (family,), "trained": (trained,)}
    del factors["evaluation_tokens"]  # an evaluation knows of no step: it goes through its sizes in turn
    cases = [canonical(case) for case in full_product(factors)]
    distinct = list({name_of(case): case for case in cases}.values())
    sizes, met = CUT["evaluation_tokens"], Counter()
    for case in distinct:
        case["evaluation_tokens"] = sizes[met[evaluation_of(case)] % len(sizes)]
        met[evaluation_of(case)] += 1
    return distinct


def evaluation_of(case: dict[str, Any]) -> tuple[Any, ...]:
    """What an evaluation depends on, besides its own size."""
    return tuple(case[name] for name in ("family", "trained", "example_weights", "token_weights", "layers"))


def test_the_product_has_every_case() -> None:
    """Checked where it is not run: each choice occurs, the same number of times as the others of its factor."""
    cases = product_of("llama", "all")
    for name, values in FACTORS.items():
        counts = Counter(case[name] for case in cases)
        assert name in ("family", "trained") or set(counts) == set(values)
        assert len(set(counts.values())) == 1, name
    assert len(product_of("gpt2", "all")) == len(cases) // 2  # no layers by hand
    assert len(product_of("mistral", "all")) == len(cases) // 2  # a window: no shared contexts
    assert set(BY_HAND) < set(FAMILIES)


@pytest.mark.full_product
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(("family", "trained"), shard(), ids="-".join)
def test_product(family: str, trained: str) -> None:
    """In float64, where nothing can hide in rounding."""
    cases = product_of(family, trained)
    # Layers by hand and checkpointing change the model itself: one for each way, in turn around new trainers.
    models: dict[tuple[str, str], LikelihoodModel] = {}
    place, groups = shard().index((family, trained)) + 1, len(shard())
    started = time.monotonic()
    evaluated: set[tuple[Any, ...]] = set()
    worst_loss = worst_gradient = 0.0
    for number, case in enumerate(cases, start=1):
        way = (case["layers"], case.get("activation_checkpointing", ""))
        if way not in models:
            models[way] = fast_model(case, torch.float64)
        evaluation = (*evaluation_of(case), case["evaluation_tokens"])
        outcome = run_case(
            case,
            in_float32=False,
            evaluates=evaluation not in evaluated,
            model=models[way],
        )
        evaluated.add(evaluation)
        assert not outcome.broken, (case, outcome.broken)
        worst_loss = max(worst_loss, outcome.float64.loss)
        worst_gradient = max(worst_gradient, outcome.float64.gradient)
        if number % 200 == 0 or number == len(cases):
            seconds = time.monotonic() - started
            print(
                f"group {place}/{groups} {family}, {trained}: {number:,}/{len(cases):,} cases, "
                f"loss {worst_loss:.0e}, gradient {worst_gradient:.0e}, {seconds:.0f} s",
                flush=True,
            )
    assert len(evaluated) == 4 * len({case["layers"] for case in cases}) * len(CUT["evaluation_tokens"])
