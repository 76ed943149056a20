"""The documentation says what is so: its links, its generated pages, its examples and its figures."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
import yaml

from goldsmith.cli import app
from goldsmith.recipe import load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# To write docs/recipe.md anew: GOLDSMITH_WRITE_DOCS=1 pytest tests/end_to_end/test_docs.py
WRITE = os.environ.get("GOLDSMITH_WRITE_DOCS") == "1"
# Of each command, in every spelling.
OPTIONS = {
    name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}


def script(path: Path) -> ModuleType:
    """A file of docs/ as a module."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(text: str) -> set[str]:
    """Those that it names itself, and of its headings, as mkdocs and GitHub both make them of plain words."""
    named = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return named | {re.sub(r"[ -]+", "-", re.sub(r"[^\w -]", "", heading.lower())).strip("-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "README.md"], ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if page.parent == DOCS:
            assert DOCS in file.resolve().parents, f"{page.name}: {target} is no part of the site"
        if anchor and not anchor.startswith("goldsmith."):  # those are of docstrings, which the site's build checks
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "README.md"], ids=lambda page: page.name)
def test_commands_have_the_options_that_they_are_given(page: Path) -> None:
    for line in re.findall(r"^ *\$? ?goldsmith ([^\n]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        command, *words = line.split("#")[0].split()
        if command in OPTIONS:  # else a sentence that begins with the name
            assert {word for word in words if word.startswith("-")} <= OPTIONS[command], f"{page.name}: {line}"


def test_every_option_of_a_command_stands_in_some_page() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in [*PAGES, REPOSITORY / "README.md"])
    named = set(re.findall(r"--[a-z][\w-]*", text))
    options = {option for command in OPTIONS.values() for option in command if option.startswith("--")}
    assert options - named - {"--measure"} == set()  # the default of --no-measure


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"))],
    ids=lambda page: page.name if page.parent == DOCS else str(page.relative_to(REPOSITORY)),
)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        for name in re.findall(r"(?<![\w/])(?:tests|benchmarks|src|design|docs)/[\w./-]+\w(?![\w/]*[*A-Z])", code):
            assert (REPOSITORY / name).exists(), f"{page.name}: {name}"


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)]

    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages(config["nav"])) == [page.name for page in PAGES]
    assert config["strict"] is True


def test_the_recipe_reference_is_current() -> None:
    """docs/recipe.md is what docs/recipe_page.py makes of the settings."""
    page = script(DOCS / "recipe_page.py")
    computed = page.page()
    if WRITE:
        page.PAGE.write_text(computed, encoding="utf-8")
    assert page.PAGE.read_text(encoding="utf-8") == computed
    # Every key at every depth has a row.
    for key in ("model.path", "data.on_too_long", "optimizer.learning_rate", "trackers.N.project", "output_dir"):
        assert f"| `{key}` |" in computed
    assert "| `training.batch_size` | integer > 0 | `64` |" in computed


@pytest.mark.parametrize("name", ["objective.md", "python.md"])
def test_examples_print_what_is_written(name: str) -> None:
    failed, attempted = doctest.testfile(
        str(DOCS / name), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert failed == 0
    assert attempted > 5


def test_the_figures_show_what_the_page_says() -> None:
    figures = script(DOCS / "figures" / "draw.py")
    found = figures.gradient()
    np.testing.assert_allclose(found.gradient, found.probabilities - np.eye(5)[0], rtol=0, atol=1e-12)
    assert abs(found.gradient.sum()) < 1e-12
    losses = figures.losses_by_cut()
    assert np.ptp([one for one, _ in losses.values()]) < 1e-12
    means = [mean for _, mean in losses.values()]
    assert f"goes from {means[0]:.2f} to {means[-1]:.2f} nats" in (DOCS / "objective.md").read_text(encoding="utf-8")
    drawn = {path.stem for path in (DOCS / "figures").glob("*.svg")}
    assert drawn == set(re.findall(r"figures/(\w+)\.svg", (DOCS / "objective.md").read_text(encoding="utf-8")))


def test_the_tutorial_begins_as_it_says(tmp_path: Path) -> None:
    """Its rows and its recipe. (docs/run_tutorial.py runs all of it.)"""
    tutorial = script(DOCS / "run_tutorial.py")
    text = tutorial.PAGE.read_text(encoding="utf-8")
    for name, content in tutorial.files(text).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    subprocess.run([sys.executable, "make_gold.py"], cwd=tmp_path, check=True)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows[0] == {"prompt": "6311:", "completion": "six thousand three hundred eleven"}
    assert json.dumps(rows[2]) in text
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.training.epochs == 12
    assert f"{len(rows)} rows in, {len(rows)} used" in text
    commands = tutorial.commands(text)
    assert {command.split()[1] for command in commands if command.startswith("goldsmith ")} == {
        "inspect",
        "train",
        "generate",
        "score",
        "compare",
    }


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: every link leads somewhere, and every name of the reference is there. (`--quiet` would count no warning.)"""
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="waits for mkdocs-material and mkdocstrings (extra `docs`)")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "goldsmith.workflows.run.train" in (tmp_path / "site" / "python.html").read_text(encoding="utf-8")


def test_examples_in_docstrings_are_fenced() -> None:
    pytest.importorskip("griffe", reason="waits for griffe (extra `docs`)")
    fenced = script(DOCS / "doctests_in_fences.py").fenced
    assert fenced("One line.\n\n    >>> 1 + 1\n    2\n\n    Args:\n        a: b") == (
        "One line.\n\n    ```pycon\n    >>> 1 + 1\n    2\n    ```\n\n    Args:\n        a: b"
    )
