"""The house as a whole: its public names, its floors, and what every file of it begins with."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import goldsmith

SOURCE = Path(goldsmith.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(file.relative_to(SOURCE)) for file in FILES]

# Frozen: a name is added or taken away here on purpose, with a line in CHANGELOG.md, and never by the way.
PUBLIC_NAMES = {
    "Comparison",
    "GoldsmithError",
    "Ranking",
    "Recipe",
    "ScoreSummary",
    "TokenScore",
    "TokenScores",
    "compare",
    "compare_models",
    "generate",
    "inspect",
    "load_recipe",
    "read_scores",
    "score",
    "scores_from_probabilities",
    "train",
    "verify",
}

PICKLES = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}

# From the roof down, as in the design. import-linter checks who imports whom; here, that nothing stands outside.
FLOORS = [
    {"cli"},
    {"workflows"},
    {"recipe"},
    {"report"},
    {"training", "inspection", "scoring", "generation"},
    {"models"},
    {"data", "objective", "statistics", "distributed"},
    {"storage", "records"},
    {"types", "errors"},
]


def test_public_names_are_frozen() -> None:
    assert set(goldsmith.__all__) == PUBLIC_NAMES


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(goldsmith, name) is not None
    assert name in dir(goldsmith)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = goldsmith.no_such_name


def test_importing_goldsmith_costs_nothing() -> None:
    program = "import sys, goldsmith; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(SOURCE.parent)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "[]\n"


def test_every_room_stands_on_a_floor() -> None:
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} == set().union(*FLOORS)


@pytest.mark.parametrize("name", ["utils", "common", "core", "helpers", "tools", "misc"])
def test_no_room_for_kinds_of_code(name: str) -> None:
    assert not [file for file in FILES if name in file.relative_to(SOURCE).with_suffix("").parts]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_begins_as_the_style_says(name: str) -> None:
    text = (SOURCE / name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "says in its first line what it is"
    code = [node for node in tree.body if not isinstance(node, ast.Expr)]
    if name.endswith("__init__.py") and len(code) == 0:
        return
    if not name.endswith("__init__.py"):
        assert "from __future__ import annotations\n" in text
    public = import_module(f"goldsmith.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__"))
    assert public.__all__
    assert len(set(public.__all__)) == len(public.__all__)
    for exported in public.__all__:
        assert hasattr(public, exported), exported


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_and_no_remote_code(name: str) -> None:
    tree = ast.parse((SOURCE / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & {
                module.split(".")[0] for module in modules
            }
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "torch.save"}, f"line {node.lineno}: {called} reads or writes pickle"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant), f"line {node.value.lineno}"
            assert node.value.value is False, f"line {node.value.lineno}"
