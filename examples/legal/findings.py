"""What is wrong with the gold of the legal summaries: rules that a person can check, each with the rows that break it.

    python examples/legal/findings.py all_v1.json
    python examples/legal/findings.py all_v1.json --scores scores.jsonl       # of `goldsmith score RUN DATA --output scores.jsonl`

`goldsmith inspect` knows what is wrong with rows whatever they are about; these rules know that the gold is a summary.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]

_SHOWN = 6
_COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a all an and any are as at be been but by can do does for from has have if in is it its may no not of on or our "
        "own service services such that the their them they this to under up us user users we when which will with you your",
    )
)
_FIRST_LETTERS = 5  # of a word: "terminated" and "terminate" are the same


def stems(text: str) -> set[str]:
    """The words of a text that carry meaning, each by its first letters."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {word[:_FIRST_LETTERS] for word in words if word not in _COMMON_WORDS}


def overlap(row: Row) -> float:
    """The share of the summary's words that the clause has, too."""
    words = stems(row["reference_summary"])
    return len(words & stems(row["original_text"])) / max(1, len(words))


def denies_notice(row: Row) -> bool:
    """The summary says that nobody is told, and the clause that one is."""
    denied = r"without (prior )?(notice|notif)"
    told = r"will notify|provide you (with )?(at least|notice)|days notice|days after"
    clause = row["original_text"]
    says_so = re.search(denied, row["reference_summary"]) and not re.search(denied, clause)
    return bool(says_so and re.search(told, clause))


def adds_numbers(row: Row) -> bool:
    """The summary has a number that the clause has not."""
    clause, summary = (set(re.findall(r"\d+", row[key])) for key in ("original_text", "reference_summary"))
    return not summary <= clause


def is_fragment(row: Row) -> bool:
    """The clause has lost the words that it hangs on: a list's item, or a disclaimer without what it disclaims."""
    return (
        re.match(
            r"(contains|advocates|poses|offer you|ii |disclaimer of \w+ ii)\b",
            row["original_text"],
        )
        is not None
    )


def is_no_summary(row: Row) -> bool:
    """Three words or fewer."""
    return len(row["reference_summary"].split()) <= 3


def doubted(row: Row) -> bool:
    """Whoever made the data set noted that the text does not say so, or that it is no summary."""
    note = str(row.get("note", ""))
    return (
        re.search(
            r"not (a |really a )?summary|isnt really|not (supported|contain|specify)|not really|really say that|not getting",
            note,
        )
        is not None
    )


def spells_waive(row: Row) -> bool:
    return re.search(r"\bwaves? your right", row["reference_summary"]) is not None


RULES: dict[str, Callable[[Row], bool]] = {
    "the summary denies the notice that the clause promises": denies_notice,
    "a number of the summary is not in the clause": adds_numbers,
    "the clause is a fragment": is_fragment,
    "a summary of three words or fewer": is_no_summary,
    "doubted by the data set's own annotator": doubted,
    "'wave' for 'waive'": spells_waive,
}


def show(title: str, count: int, rows: list[tuple[str, str]]) -> None:
    print(f"\n{title}: {count}")
    for place, text in rows[:_SHOWN]:
        print(f"  {place}: {text}")


def quote(row: Row) -> str:
    return f"{row['reference_summary'][:90]!r} for {row['original_text'][:90]!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--scores", type=Path, help="rows of `goldsmith score`")
    arguments = parser.parse_args()
    data: dict[str, Row] = json.loads(arguments.file.read_text(encoding="utf-8"))

    for title, rule in RULES.items():
        found = [(name, quote(row)) for name, row in data.items() if rule(row)]
        show(title, len(found), found)

    golds = Counter(row["reference_summary"] for row in data.values())
    stock = [name for name, row in data.items() if golds[row["reference_summary"]] > 1]
    kinds = len({data[name]["reference_summary"] for name in stock})
    print(f"\nstock sentences: {kinds} summaries stand in {len(stock)} rows")
    for text, count in golds.most_common(_SHOWN):
        print(f"  {count} rows: {text[:100]!r}")
    foreign = [name for name in stock if overlap(data[name]) == 0]
    show(
        "stock sentences of which no word is in the clause",
        len(foreign),
        [(name, quote(data[name])) for name in foreign],
    )

    inputs: dict[str, list[str]] = defaultdict(list)
    for name, row in data.items():
        inputs[row["original_text"]].append(name)
    same = [
        (", ".join(names), repr([data[n]["reference_summary"] for n in names]))
        for names in inputs.values()
        if names[1:]
    ]
    show("one clause, several summaries", len(same), same)

    if arguments.scores is not None:
        scores = [json.loads(line) for line in arguments.scores.read_text(encoding="utf-8").splitlines()]
        nlls = {score["example_id"]: -score["log_prob"] / score["num_target_tokens"] for score in scores}
        worst = sorted(nlls, key=lambda name: -nlls[name])
        title = f"least likely under the model, nats a token (the median row has {median(nlls.values()):.2f})"
        show(title, len(nlls), [(name, f"{nlls[name]:.2f} {quote(data[name])}") for name in worst])


if __name__ == "__main__":
    main()
