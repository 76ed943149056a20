"""Size and load time of the report's page: examples of GSM8K's lengths, before and after training, five alternatives a token.

The scores are made up (no model is run) but have what decides the size: token texts with the frequencies of a large vocabulary, two
models that differ, alternatives that depend on the place, and contexts. Load time is from navigation to the page being drawn in
Debian's chromium, where one is installed.

    python benchmarks/report_size.py --examples 1000 --output report.html
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np

from goldsmith.report.page import render_page
from goldsmith.report.payload import Side
from goldsmith.report.run_files import read_run
from goldsmith.types import TokenScore, TokenScores

VOCABULARY = 49_152
# The n-th commonest token is 1 / (n + 2.7) ** 1.32 as common, which makes 8.4 bits a token; GSM8K's words, digits and signs
# have 7.5.
ZIPF_OFFSET, ZIPF_EXPONENT = 2.7, 1.32
GOLD_TOKENS, CONTEXT_TOKENS = 150, 150
ALTERNATIVES = 5


def made_up_sides(num_examples: int, *, seed: int = 0) -> list[Side]:
    """The scores of the same examples under two models, the second of which is the better one."""
    generator = np.random.default_rng(seed)
    texts = _vocabulary(generator)
    lengths = np.maximum(8, generator.lognormal(math.log(GOLD_TOKENS) - 0.08, 0.4, num_examples)).astype(int)
    golds = [_zipf(generator, length) for length in lengths]
    contexts = [
        "".join(texts[token] for token in _zipf(generator, int(max(10, generator.normal(CONTEXT_TOKENS, 40)))))
        for _ in range(num_examples)
    ]
    return [
        Side(
            name=name,
            scores=[
                _example(generator, number, gold, texts, context, sharpness)
                for number, (gold, context) in enumerate(zip(golds, contexts, strict=True))
            ],
        )
        for name, sharpness in (("before", 0.9), ("after", 1.6))
    ]


def _vocabulary(generator: np.random.Generator) -> list[str]:
    lengths = np.clip(generator.normal(4.6, 2, VOCABULARY), 1, 12).astype(int)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    weights = 1 / np.arange(1, 27) ** 0.7
    weights /= weights.sum()
    words = ["".join(generator.choice(letters, length, p=weights)) for length in lengths]
    return [(" " if place % 5 else "") + word for place, word in enumerate(words)]


def _zipf(generator: np.random.Generator, length: int) -> list[int]:
    """Token ids with the frequencies of text; the commonest is 0."""
    return np.searchsorted(_CUMULATIVE, generator.random(length)).tolist()


_FREQUENCIES = 1 / (np.arange(1, VOCABULARY + 1) + ZIPF_OFFSET) ** ZIPF_EXPONENT
_FREQUENCIES /= _FREQUENCIES.sum()
_CUMULATIVE = np.cumsum(_FREQUENCIES) / _FREQUENCIES.sum()


def _example(
    generator: np.random.Generator, number: int, gold: list[int], texts: list[str], context: str, sharpness: float
) -> TokenScores:
    tokens = []
    for token_id in gold:
        candidates = list(dict.fromkeys([token_id, *_zipf(generator, ALTERNATIVES + 2)]))
        logits = np.sort(generator.gumbel(0, 1.7 * sharpness, len(candidates)))[::-1]
        log_probs = logits - math.log(np.exp(logits).sum() + math.exp(logits[-1]))
        place = min(int(generator.geometric(0.35 + 0.25 * (sharpness - 0.4))) - 1, len(candidates) - 1)
        order = candidates[1:]
        order.insert(place, token_id)
        entropy = float(-(np.exp(log_probs) * log_probs).sum())
        tokens.append(
            TokenScore(
                token_id=token_id,
                text=texts[token_id],
                log_prob=float(log_probs[place]),
                rank=place + 1,
                best_log_prob=float(log_probs[0]),
                entropy=entropy,
                alternatives=tuple(
                    (one, texts[one], float(log_prob))
                    for one, log_prob in list(zip(order, log_probs, strict=True))[:ALTERNATIVES]
                ),
            )
        )
    return TokenScores(
        example_id=f"gsm8k:{number}",
        source=f"/data/gsm8k/{'test' if number % 3 else 'train'}.jsonl:{number + 1}",
        source_name="gsm8k-test" if number % 3 else "gsm8k-train",
        log_prob=math.fsum(token.log_prob for token in tokens),
        num_target_tokens=len(tokens),
        num_bytes=sum(len(token.text.encode()) for token in tokens),
        tokens=tuple(tokens),
        context=context,
        context_tokens=CONTEXT_TOKENS,
    )


def load_seconds(page: Path, *, executable: str, repeats: int = 5) -> dict[str, float]:
    """Seconds until the page is drawn, and until its examples are sorted by change; the median of a few loads."""
    from playwright.sync_api import sync_playwright

    drawn, sorting = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeats):
            tab = browser.new_page(viewport={"width": 1440, "height": 900})
            started = time.perf_counter()
            tab.goto(f"{page.resolve().as_uri()}#gold")
            tab.wait_for_selector("html[data-ready=yes]")
            drawn.append(time.perf_counter() - started)
            sorting.append(
                tab.evaluate(
                    """async () => { const box = document.querySelector("#sort"); const from = performance.now();
                    box.value = "worst"; box.dispatchEvent(new Event("change"));
                    document.body.offsetHeight; return (performance.now() - from) / 1000; }"""
                )
            )
            tab.close()
        browser.close()
    return {"drawn_seconds": float(np.median(drawn)), "sorted_seconds": float(np.median(sorting))}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.add_argument("--run", type=Path, help="a run folder whose curves are shown, too")
    arguments = parser.parse_args()
    sides = made_up_sides(arguments.examples)
    started = time.perf_counter()
    runs = [read_run(arguments.run)] if arguments.run else []
    page = render_page(
        runs=runs, sides=sides, title=f"{arguments.examples:,} made-up examples", max_examples=arguments.examples
    )
    figures: dict[str, float] = {"made_seconds": time.perf_counter() - started, "bytes": len(page.encode())}
    arguments.output.write_text(page, encoding="utf-8")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium:
        figures |= load_seconds(arguments.output, executable=chromium)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
