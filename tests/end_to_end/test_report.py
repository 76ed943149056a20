"""The report in a real browser, from its file: what it shows, how it is used, and that it asks for nothing.

Debian's chromium, driven by playwright. One browser for all; a machine without either skips.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parent.parent / "unit" / "report"))

from report_examples import RECORDS, example, sides, step, write_run, write_side

from goldsmith.cli import app
from goldsmith.records import MEASURED_FIELDS
from goldsmith.report.page import page_of_payload, payload_of, render_page
from goldsmith.report.payload import Side
from goldsmith.report.run_files import read_run
from goldsmith.report.serve import report_server
from goldsmith.scoring.files import read_scores
from goldsmith.types import TokenScore, TokenScores

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE = Path(__file__).parent / "axe" / "axe.min.js"

NUM_EXAMPLES = 45
RIGHT_TO_LEFT = "\u202eabc\u202c \u05e9\u05dc\u05d5\u05dd"
HOSTILE = (
    f"<script>window.hacked = 1</script></script><img src=x onerror='window.hacked = 1'>\0 {RIGHT_TO_LEFT} \U0001f98a"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="waits for playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("waits for chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # Without a profile of its own playwright makes an empty one, and removes it.
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class Visit:
    """A tab, and what it did that it should not."""

    def __init__(self, browser: Any, **context: Any) -> None:
        self.context = browser.new_context(
            **{"viewport": {"width": 1440, "height": 900}, "color_scheme": "light"} | context
        )
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(10_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.complaints.append(message.text) if message.type != "log" else None)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))

    def open(self, address: str) -> Any:
        self.tab.goto(address)
        self.tab.wait_for_selector("html[data-ready=yes]")
        return self.tab


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """`visit(**context)` -> a tab of its own; at the end none of them may have complained."""
    visits: list[Visit] = []

    def make(**context: Any) -> Visit:
        visits.append(Visit(browser, **context))
        return visits[-1]

    yield make
    for one in visits:
        one.context.close()
        assert one.complaints == []


@pytest.fixture(scope="module")
def both() -> list[Side]:
    return sides(NUM_EXAMPLES)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, both: list[Side]) -> Path:
    """A finished run, with 45 examples before and after."""
    folder = tmp_path_factory.mktemp("report")
    run = read_run(write_run(folder / "fruits", RECORDS))
    path = folder / "report.html"
    path.write_text(render_page(runs=[run], sides=both, title="fruits"), encoding="utf-8")
    return path


def ids_shown(tab: Any) -> list[str]:
    return tab.locator(".example h3").all_inner_texts()


def test_it_loads_by_itself_and_every_section_draws(page_file: Path, visit: Callable[..., Visit]) -> None:
    one = visit()
    tab = one.open(page_file.as_uri())
    assert one.requests == [page_file.as_uri()], "the page itself, and nothing else"
    assert tab.locator("#title").inner_text() == "fruits"
    assert "3.500" in tab.locator("#overview .figures").inner_text()
    assert "EPYC 9V74" in tab.locator("#overview").inner_text()
    assert tab.locator("#overview canvas").count() == 5
    assert "layer 0" in tab.locator("#overview").inner_text()
    tab.get_by_role("button", name="Gold tokens").click()
    assert "gold tokens" in tab.locator("#overview .u-legend").first.inner_text()
    for name, wanted in {"Gold": "45 examples", "Compare": "Mean change", "Calibration": "Expected calibration error",
                         "Recipe": "acme/model"}.items():  # fmt: skip
        tab.get_by_role("link", name=name, exact=True).click()
        tab.get_by_text(wanted).first.wait_for()
        assert tab.evaluate("scrollY") == 0, name
    assert "12" in tab.locator("#recipe tbody").first.inner_text()
    assert len(one.requests) == 1


def test_what_the_browser_unpacks_is_what_was_scored(
    page_file: Path, both: list[Side], visit: Callable[..., Visit]
) -> None:
    tab = visit().open(page_file.as_uri())
    data = payload_of(sides=both, title="t")
    found = tab.evaluate(
        """async (bytes) => { const report = unpack(await inflate(new Uint8Array(bytes)));
        return report.sides.map((_, side) => report.ids.map((_, example) =>
            Array.from({length: report.numTokens(side, example)}, (_, token) => report.token(side, example, token)))); }""",
        list(data),
    )
    for side, examples in zip(both, found, strict=True):
        for score, tokens in zip(side.scores, examples, strict=True):
            for token, shown in zip(score.tokens or (), tokens, strict=True):
                assert (shown["text"], shown["tokenId"], shown["rank"]) == (token.text, token.token_id, token.rank)
                assert shown["logProb"] == pytest.approx(token.log_prob, abs=0.0011)
                assert shown["entropy"] == pytest.approx(token.entropy, abs=0.011)
                for own, other in zip(token.alternatives or (), shown["alternatives"], strict=True):
                    assert other["text"] == own[1]
                    assert other["logProb"] == pytest.approx(own[2], abs=0.025)


def test_sorting_searching_and_filtering(page_file: Path, both: list[Side], visit: Callable[..., Visit]) -> None:
    tab = visit().open(f"{page_file.as_uri()}#gold")
    before, after = (side.scores for side in both)
    assert ids_shown(tab)[0] == "row-0"
    orders: dict[str, Callable[[int], float]] = {
        "lowest": lambda at: after[at].log_prob,
        "highest": lambda at: -after[at].log_prob,
        "gain": lambda at: before[at].log_prob - after[at].log_prob,
        "loss": lambda at: after[at].log_prob - before[at].log_prob,
        "worst": lambda at: round(min(token.log_prob for token in after[at].tokens or ()) * 500),
    }
    for name, key in orders.items():
        tab.select_option("#sort", name)
        expected = [f"row-{at}" for at in sorted(range(NUM_EXAMPLES), key=key)]
        assert ids_shown(tab) == expected[:20], name
    tab.get_by_role("button", name="Next").click()
    assert ids_shown(tab) == expected[20:40]
    tab.select_option("#source", "stories")
    assert tab.locator("#count").inner_text().endswith("of 15 examples")
    tab.select_option("#source", "")
    tab.locator("#search").fill("QUESTION 7:")
    tab.get_by_text("1–1 of 1 examples").wait_for()
    assert ids_shown(tab) == ["row-7"]
    tab.locator("#search").fill("no such text")
    tab.get_by_text("No example matches.").wait_for()


def test_a_token_tells_of_itself_to_the_pointer_and_the_keyboard(
    page_file: Path, both: list[Side], visit: Callable[..., Visit]
) -> None:
    tab = visit().open(f"{page_file.as_uri()}#gold")
    token = (both[1].scores[0].tokens or ())[4]
    card = tab.locator(".example").first
    half = card.locator(".half").nth(1)
    half.locator(".t").nth(4).hover()
    hint = tab.locator("#hint")
    shown = hint.inner_text()
    assert f"{math.exp(token.log_prob) * 100:.1f}"[:3] in shown
    assert "rank" in shown
    assert "before" in shown, "and what it was before"
    assert hint.locator("li").count() == 5
    assert hint.locator("li.gold").count() == (1 if (token.rank or 9) <= 5 else 0)
    half.locator("[tabindex='0']").focus()
    place = "document.activeElement.dataset.token"
    for key, expected in {"ArrowRight": "1", "End": "11", "ArrowLeft": "10", "Home": "0"}.items():
        tab.keyboard.press(key)
        assert tab.evaluate(place) == expected
    assert hint.is_visible()
    assert "probability" in tab.evaluate("document.activeElement.getAttribute('aria-label')")
    tab.keyboard.press("j")
    assert tab.evaluate("document.activeElement.closest('[data-example]').dataset.example") == "1"
    tab.keyboard.press("n")
    assert tab.evaluate("document.activeElement.classList.contains('p0')")
    tab.keyboard.press("Escape")
    assert hint.is_hidden()
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "search"
    tab.get_by_role("button", name="Change", exact=True).click()
    change = token.log_prob - (both[0].scores[0].tokens or ())[4].log_prob
    label = card.locator(".t").nth(4).get_attribute("aria-label")
    assert ("+" in label) == (change > 0)


def test_a_point_and_a_bar_lead_to_their_examples(
    page_file: Path, both: list[Side], visit: Callable[..., Visit]
) -> None:
    tab = visit().open(f"{page_file.as_uri()}#compare")
    before, after = (side.scores for side in both)
    differences = [b.log_prob - a.log_prob for a, b in zip(before, after, strict=True)]
    figures = tab.locator("#compare .figures").inner_text()
    assert f"{sum(differences) / NUM_EXAMPLES:+.2f}" in figures
    tab.locator("#compare canvas").nth(1).wait_for()
    lowest = min(range(NUM_EXAMPLES), key=lambda at: before[at].log_prob)
    over = tab.locator("#compare .u-over").nth(1)
    over.scroll_into_view_if_needed()
    place = tab.evaluate(
        "([x, y]) => { const { plot } = [...charts][1]; return [plot.valToPos(x, 'x'), plot.valToPos(y, 'y')]; }",
        [before[lowest].log_prob, after[lowest].log_prob],
    )
    over.click(position={"x": place[0], "y": place[1]})
    assert tab.locator("#point h3").inner_text() == f"row-{lowest}"

    counts, edges = tab.evaluate(
        "() => { const { plot } = [...charts][0]; return [plot.data[1], plot.data[0].map((x) => plot.valToPos(x, 'x'))]; }"
    )
    tallest = max(range(len(counts)), key=lambda index: counts[index])
    assert sum(counts) == NUM_EXAMPLES
    tab.locator("#compare .u-over").first.click(position={"x": edges[tallest], "y": 100})
    tab.locator("#gold .chip").wait_for()
    assert tab.locator("#count").inner_text().endswith(f"of {counts[tallest]} examples")
    tab.locator("#gold .chip").click()
    assert tab.locator("#count").inner_text().endswith("of 45 examples")


def largest_changes(both: list[Side], sign: int = 0) -> list[tuple[str, int, float]]:
    """(example, token, change), largest first, as the page keeps log-probabilities."""
    found = []
    for before, after in zip(both[0].scores, both[1].scores, strict=True):
        for place, (one, other) in enumerate(zip(before.tokens or (), after.tokens or (), strict=True)):
            change = (round(-one.log_prob * 500) - round(-other.log_prob * 500)) / 500
            if change * sign > 0 or sign == 0:
                found.append((after.example_id, place, change))
    return sorted(found, key=lambda item: (-abs(item[2]), int(item[0].removeprefix("row-")), item[1]))


def test_the_tokens_that_differ_most(page_file: Path, both: list[Side], visit: Callable[..., Visit]) -> None:
    tab = visit().open(f"{page_file.as_uri()}#compare")
    rows = tab.locator("#differing tbody tr")

    def shown() -> list[tuple[str, int, str]]:
        places = zip(
            tab.locator("#differing td.place a bdi").all_inner_texts(),
            tab.locator("#differing td.place .note").all_inner_texts(),
            tab.locator("#differing .delta").all_inner_texts(),
            strict=True,
        )
        return [(name, int(token.split()[1]) - 1, change.split()[1]) for name, token, change in places]

    def expected(sign: int = 0) -> list[tuple[str, int, str]]:
        signs = {True: "+", False: "\N{MINUS SIGN}"}
        return [
            (name, token, f"{signs[change > 0]}{abs(change):.2f}")
            for name, token, change in largest_changes(both, sign)
        ][:25]

    assert shown() == expected()
    name, token, _ = expected()[0]
    of_example = [next(one for one in side.scores if one.example_id == name).tokens or () for side in both]
    for cell, tokens in zip(("p-a", "p-b"), of_example, strict=True):
        probability = math.exp(tokens[token].log_prob) * 100
        assert float(rows.first.locator(f"td.{cell}").inner_text().split()[0]) == pytest.approx(probability, rel=0.06)
    before_it = "".join(one.text for one in of_example[0][:token]).lstrip()
    assert rows.first.locator("th").inner_text().replace("\u23ce", "\n") == before_it + of_example[0][token].text
    for direction, sign in (("Higher", 1), ("Lower", -1)):
        tab.locator("#differing").get_by_role("button", name=direction, exact=True).click()
        assert shown() == expected(sign)

    # By the keyboard; the order is told, and the focus stays.
    differing = tab.locator("#differing")
    by_after = differing.get_by_role("button", name="p, after")
    by_after.focus()
    for _ in range(2):
        tab.keyboard.press("Enter")
    assert differing.get_by_role("columnheader", name="p, after").get_attribute("aria-sort") == "descending"
    assert differing.get_by_role("columnheader", name="Change, nats").get_attribute("aria-sort") == "none"
    assert tab.evaluate("document.activeElement.id") == "tokens-by-after"
    assert "descending" in tab.locator("#announce").inner_text()
    values = [float(one.split()[0]) for one in tab.locator("#differing td.p-b").all_inner_texts()]
    assert values == sorted(values, reverse=True)

    name, token, _ = shown()[0]
    rows.first.get_by_role("link").press("Enter")
    tab.locator("#gold .chip", has_text=f"only {name}").wait_for()
    assert ids_shown(tab) == [name]
    # By its own locator: the page's policy forbids what `wait_for_function` evaluates while it waits.
    tab.locator("[data-token]:focus").wait_for()
    assert tab.evaluate("document.activeElement.dataset.token") == str(token)
    assert tab.locator("#hint").is_visible()
    tab.locator("#gold .chip").click()
    assert tab.locator("#count").inner_text().endswith("of 45 examples")


def test_why_no_tokens_are_compared(tmp_path: Path, both: list[Side], visit: Callable[..., Visit]) -> None:
    one = both[0].scores[0]
    bare = replace(one, tokens=None)
    halves = tuple(
        replace(token, text=text) for token in one.tokens or () for text in (token.text[:1], token.text[1:]) if text
    )
    cut = replace(one, tokens=halves)
    found = []
    for other in (bare, cut, one):
        path = tmp_path / "page.html"
        path.write_text(render_page(sides=[Side(name="a", scores=[one]), Side(name="b", scores=[other])], title="t"))
        found.append(visit().open(f"{path.as_uri()}#compare").locator("#differing").inner_text())
    assert "\u201cb\u201d has no tokens" in found[0]
    assert "different tokens" in found[1]
    assert "Every token has the same probability under both." in found[2]


def test_light_and_dark(page_file: Path, visit: Callable[..., Visit]) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    tab = visit(color_scheme="dark").open(page_file.as_uri())
    dark = tab.evaluate(ground)
    tab.get_by_role("button", name="Dark theme").click()
    light = tab.evaluate(ground)
    assert sum(json.loads(f"[{dark[4:-1]}]")) < 150 < 600 < sum(json.loads(f"[{light[4:-1]}]"))
    assert tab.get_by_role("button", name="Dark theme").get_attribute("aria-pressed") == "false"
    tab.reload()
    tab.wait_for_selector("html[data-ready=yes]")
    assert tab.evaluate(ground) == light, "what was chosen stays"


def test_on_a_phone(page_file: Path, visit: Callable[..., Visit]) -> None:
    tab = visit(viewport={"width": 390, "height": 844}, has_touch=True).open(f"{page_file.as_uri()}#gold")
    for section in ("overview", "gold", "compare", "calibration", "recipe"):
        tab.evaluate(f"location.hash = '{section}'")
        tab.locator(f"#{section}:not([hidden])").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390, section
    tab.evaluate("location.hash = 'gold'")
    tab.locator(".t").nth(3).tap()
    box = tab.locator("#hint").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert box["y"] + box["height"] > 800, "at the bottom, where a thumb does not hide it"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_serious_fault(tmp_path: Path, visit: Callable[..., Visit], theme: str) -> None:
    run = read_run(write_run(tmp_path / "fruits", RECORDS))
    path = tmp_path / "report.html"
    path.write_text(render_page(runs=[run], sides=sides(4), title="fruits"), encoding="utf-8")
    tab = visit(color_scheme=theme).open(path.as_uri())
    tab.evaluate(AXE.read_text(encoding="utf-8"))
    for section in ("overview", "gold", "compare", "calibration", "recipe"):
        tab.evaluate(f"location.hash = '{section}'")
        tab.locator(f"#{section}:not([hidden])").wait_for()
        found = tab.evaluate("axe.run(document, {resultTypes: ['violations']}).then((one) => one.violations)")
        serious = [
            (fault["id"], fault["nodes"][0]["html"][:200], fault["nodes"][0]["failureSummary"])
            for fault in found
            if fault["impact"] in ("serious", "critical")
        ]
        assert serious == [], section


def hostile_side(name: str, log_prob: float = -1.0) -> Side:
    tokens = tuple(
        TokenScore(token_id=number, text=text, log_prob=log_prob, rank=2, best_log_prob=-0.5, entropy=1.0,
                   alternatives=((7, HOSTILE, -0.5), (number, text, log_prob)))
        for number, text in enumerate([HOSTILE, "x" * 50_000, RIGHT_TO_LEFT, "", "\ud800", "\n\t\r", "</s>"])
    )  # fmt: skip
    score = TokenScores(
        example_id=HOSTILE, source=f"/data/{HOSTILE}.jsonl:1", source_name=HOSTILE, log_prob=-7.0, num_target_tokens=7,
        num_bytes=9, tokens=tokens, context=HOSTILE + "y" * 50_000,
    )  # fmt: skip
    many = replace(example(1, 1.0, seed=0, num_tokens=5000), example_id="long", source="rows")
    return Side(name=name, scores=[score, many])


def test_a_hostile_example_is_text(tmp_path: Path, visit: Callable[..., Visit]) -> None:
    folder = write_run(tmp_path / "run", RECORDS)
    recipe = (folder / "recipe.yaml").read_text() + f"# {HOSTILE}\n"
    (folder / "recipe.yaml").write_text(recipe.replace("\0", ""), encoding="utf-8")
    path = tmp_path / "report.html"
    page = render_page(runs=[read_run(folder)], sides=[hostile_side(HOSTILE), hostile_side("b", -9.0)], title=HOSTILE)
    path.write_text(page, encoding="utf-8")
    one = visit()
    tab = one.open(f"{path.as_uri()}#gold")
    assert "<script>window.hacked = 1</script>" in tab.locator("#title").inner_text()
    card = tab.locator(".example").first
    first = card.locator(".t").first
    text = first.inner_text()
    assert text.startswith("<script>window.hacked = 1</script></script><img src=x onerror=")
    assert "\u2400" in text, "NUL has a picture"
    assert "\u27e8202E\u27e9" in text, "and what turns the direction of the line is named"
    assert "\u202e" not in tab.locator("#gold").inner_text()
    assert "\U0001f98a" in text
    assert "50,000 characters" in card.locator(".t").nth(1).inner_text()
    assert "y" * 100 in card.locator(".context").inner_text()
    card.get_by_role("button", name="Show all").click()
    assert card.locator(".context .text").evaluate("(one) => one.textContent.length") > 50_000
    first.hover()
    assert "<script>" in tab.locator("#hint").inner_text()
    long = tab.locator(".example").nth(1)
    assert long.locator(".half").first.locator(".t").count() == 600
    long.get_by_role("button", name="Show all 5,000 tokens").first.click()
    assert long.locator(".half").first.locator(".t").count() == 5000
    for section in ("overview", "compare", "calibration", "recipe"):
        tab.evaluate(f"location.hash = '{section}'")
        tab.locator(f"#{section}:not([hidden])").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1440, section
        assert "\u202e" not in tab.locator("body").inner_text(), section
        if section == "compare":
            differing = tab.locator("#differing tbody").inner_text()
            assert "<script>window.hacked = 1</script>" in differing
            assert "\u27e8202E\u27e9" in differing
            assert "x" * 40 in differing
            assert len(differing) < 10_000, "nothing is shown at its whole length"
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img, iframe, object, link").count() == 0
    assert len(one.requests) == 1


def test_it_follows_a_run_that_trains(tmp_path: Path, visit: Callable[..., Visit]) -> None:
    folder = write_run(tmp_path / "run", RECORDS[:2], is_finished=False)
    metrics = folder / "metrics.jsonl"
    server = report_server(
        lambda: payload_of(runs=[read_run(folder)], title="run"),
        title="run",
        port=0,
        stamp=lambda: metrics.stat().st_size,
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        one = visit()
        address = f"http://127.0.0.1:{server.server_port}"
        tab = one.open(f"{address}/")
        steps = tab.locator("#overview .figure", has_text="Steps").locator(".value")
        assert steps.inner_text() == "1"
        with metrics.open("a") as file:
            file.write(json.dumps(step(2)) + "\n")
        tab.locator("html[data-updates]").wait_for()
        assert steps.inner_text() == "2"
        assert {request.removeprefix(address) for request in one.requests} <= {"/", "/payload", "/favicon.ico"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_page_whose_data_is_damaged_says_so(tmp_path: Path, browser: Any) -> None:
    path = tmp_path / "report.html"
    path.write_text(page_of_payload(b"not gzip", title="t"), encoding="utf-8")
    one = Visit(browser)
    one.tab.goto(path.as_uri())
    one.tab.get_by_text("This page could not be drawn").wait_for()
    one.context.close()


# The commands, without a browser


def test_a_run_scores_its_held_out_gold_before_and_after(tmp_path: Path, tiny_model_folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(12)]
    for name, part in (("train", rows), ("eval", rows[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: '{tiny_model_folder}', device: cpu}}\ndata: {{train: train.jsonl, eval: eval.jsonl}}\n"
        "training: {epochs: 2, batch_size: 4}\noptimizer: {learning_rate: 0.01}\nreport: {examples: 3}\n"
    )
    folder = tmp_path / "run"
    try:
        done = CliRunner().invoke(app, ["train", str(recipe), "--set", f"output_dir={folder}", "--json", "--quiet"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["report"] == str(folder / "report.html")
        page = (folder / "report.html").read_bytes()
        before, after = (read_scores(folder / f"scores-{moment}.jsonl") for moment in ("before", "after"))
        assert [score.example_id for score in before] == [score.example_id for score in after]
        assert len(before) == 3
        first = (after[0].tokens or ())[0]
        assert first.rank is not None
        assert len(first.alternatives or ()) == 5
        assert after[0].context == "0 + 1 = "
        assert sum(score.log_prob for score in after) > sum(score.log_prob for score in before)

        (folder / "report.html").unlink()
        again = CliRunner().invoke(app, ["report", str(folder), "--json"])
        assert again.exit_code == 0, again.output
        assert json.loads(again.stdout) == {
            "path": str(folder / "report.html"),
            "num_bytes": len(page),
            "num_examples": 3,
        }
        assert (folder / "report.html").read_bytes() == page, "the same files make the same page"

        off = ["train", str(recipe), "--set", f"output_dir={folder}-off", "--set", "report.examples=0", "--quiet"]
        assert CliRunner().invoke(app, off).exit_code == 0
        assert not list(folder.with_name("run-off").glob("scores-*"))
        assert (folder.with_name("run-off") / "report.html").is_file()
        for name in ("metrics.jsonl", "examples.jsonl"):  # scoring changes nothing of what was learnt
            records = [
                [
                    {key: value for key, value in json.loads(line).items() if key not in MEASURED_FIELDS}
                    for line in (one / name).read_text().splitlines()
                ]
                for one in (folder, folder.with_name("run-off"))
            ]
            assert records[0] == records[1]
    finally:
        torch.set_num_threads(threads)


def test_two_score_files_by_the_command(tmp_path: Path, both: list[Side]) -> None:
    arguments: list[str] = ["report", "--output", str(tmp_path / "both.html"), "--examples", "10"]
    for side in both:
        file = tmp_path / f"{side.name}.jsonl"
        write_side(file, side)
        arguments += ["--scores", str(file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "10 examples" in done.stdout
    assert (tmp_path / "both.html").is_file()


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    nothing = CliRunner().invoke(app, ["report"])
    assert (nothing.exit_code, "a run folder or --scores" in nothing.output) == (2, True)
    no_run = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (no_run.exit_code, "recipe.yaml" in no_run.output) == (7, True)
    (tmp_path / "a.jsonl").write_text('{"example_id": "a", "log_prob": -1.0}\n')
    no_folder = CliRunner().invoke(app, ["report", "--scores", f"{tmp_path}/a.jsonl", "-o", f"{tmp_path}/none/x.html"])
    assert (no_folder.exit_code, "there is no folder" in no_folder.output) == (7, True)
    no_file = CliRunner().invoke(app, ["report", str(tmp_path), "--serve", "--output", "x.html"])
    assert no_file.exit_code == 2
