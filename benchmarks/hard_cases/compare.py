"""Both trainers on the twenty hard cases, judged by the answers in cases.py: writes docs/hard_cases.md.

    .venv/bin/python benchmarks/run.py --install trl
    .venv/bin/python benchmarks/hard_cases/compare.py [--trl PYTHON] [--output FILE]

Each trainer runs in its own interpreter. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cases import CASES, Case, Refused, Same, Trained, decode

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TRL_PYTHON = HERE.parent / ".venv-trl" / "bin" / "python"
PAGE = REPOSITORY / "docs" / "hard_cases.md"

VerdictName = Literal["right", "stops", "warns", "wrong"]
# As the page says it.
MEANINGS: dict[VerdictName, str] = {
    "right": "it is trained as it should be; or refused where it should be, with the row's place",
    "stops": "it raises an error: nothing is trained wrongly, but what is good is not trained, or the error names no row",
    "warns": "something else is trained, after a warning",
    "wrong": "something else is trained, or a row is left out, without a word",
}

Json = dict[str, Any]
Example = tuple[list[int], list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one trainer makes of a case.

    Attributes:
        shown: what it did, in Markdown.
    """

    name: VerdictName
    shown: str


def judge(case: Case, observed: Json) -> Verdict:
    """Compare what a runner saw with the case's answer."""
    right = case.right
    if (message := observed.get("refused")) is not None:
        names_row = isinstance(right, Refused) and f"rows.jsonl:{right.line}" in message
        return Verdict(name="right" if names_row else "stops", shown=f"Refuses: {_quoted(message)}")
    said = observed.get("messages", [])
    not_right: VerdictName = "warns" if said else "wrong"
    warning = "".join(f"\n  Warns: {_quoted(message)}" for message in said)
    if isinstance(right, Same):
        agrees = observed["number"] <= right.tolerance
        return Verdict(name="right" if agrees else not_right, shown=f"{observed['shown']}{warning}")
    examples = [(example["ids"], example["weights"]) for example in observed["examples"]]
    shown = _shown(examples) + warning
    if isinstance(right, Trained):
        wanted = [case.ids_and_weights(pieces) for pieces in right.examples]
        return Verdict(name="right" if _relevant(examples) == _relevant(wanted) else not_right, shown=shown)
    others = [case.ids_and_weights(pieces) for pieces in right.others]
    if _relevant(examples) == _relevant(others):
        return Verdict(name="right" if said else "wrong", shown=f"Leaves the row out{warning or ' in silence'}.")
    return Verdict(name=not_right, shown=shown)


def _relevant(examples: Sequence[Example]) -> list[Example]:
    """What training depends on: nothing after the last gold, and no weight of the first token, before which nothing stands."""
    result = []
    for ids, weights in examples:
        end = max((place + 1 for place, weight in enumerate(weights) if weight > 0), default=0)
        result.append((ids[:end], weights[1:end]))
    return result


def _shown(examples: Sequence[Example]) -> str:
    """Each example as text, gold in «»; a weight other than 1 behind it."""
    lines = []
    for ids, weights in _relevant([(ids, weights) for ids, weights in examples]):
        text, begin = "", 0
        own = [0.0, *weights]
        while begin < len(ids):
            end = begin
            while end < len(ids) and own[end] == own[begin]:
                end += 1
            piece = decode(ids[begin:end])
            factor = "" if own[begin] in (0.0, 1.0) else f"×{own[begin]:g}"
            text += piece if own[begin] == 0 else f"«{piece}»{factor}"
            begin = end
        lines.append(f"`{text}`")
    return "Trains " + " and ".join(lines)


def _quoted(message: str) -> str:
    """On one line, cut to a readable length."""
    text = " ".join(message.split()).replace("`", "'")
    return f"“{text if len(text) <= 420 else text[:417].rstrip() + '...'}”"


def _right(case: Case) -> str:
    right = case.right
    if isinstance(right, Trained):
        return _shown([case.ids_and_weights(pieces) for pieces in right.examples])
    if isinstance(right, Refused):
        return f"Refuses row {right.line}, by its place"
    return f"The same {right.what}"


# ---------------------------------------------------------------------------------------------------------------- the page


def page(ours: Json, theirs: Json, versions: Mapping[str, str]) -> str:
    """docs/hard_cases.md."""
    trl = f"TRL {versions['trl']}"
    verdicts = [(case, judge(case, ours[case.name]), judge(case, theirs[case.name])) for case in CASES]
    counts = [Counter(pair[side].name for pair in verdicts) for side in (1, 2)]
    summary = [
        f"- {name}: " + ", ".join(f"{count[verdict]} {verdict}" for verdict in MEANINGS if count[verdict])
        for name, count in zip(("goldsmith", trl), counts, strict=True)
    ]
    if chosen := sum(bool(case.policy) and other.name != "right" for case, _, other in verdicts):
        summary[-1] += f" ({chosen} of these are choices, *)"
    rows = [
        f"| [{case.title}](#{case.name}) | {_short_right(case)} | {mine.name} | {other.name}{' *' * bool(case.policy)} | "
        f"{case.threads or '-'} |"
        for case, mine, other in verdicts
    ]
    lines = [
        f"# {len(CASES)} hard cases, beside TRL",
        "",
        "Small files of gold that trainers get wrong. The right answer to each is written by hand and comes from no trainer. Both",
        "get the same file, tokenizer and template, with their defaults but for what the case is about; TRL trains conversations",
        "with `assistant_only_loss=True`. What is trained is read from the batch that the model is given.",
        "",
        "The cases were chosen from what users of trainers report, by the authors of goldsmith: they show what differs, and their",
        "counts are no score. Where the answer is a choice (*), what TRL chooses is said.",
        "",
        "This page is written by `benchmarks/hard_cases/compare.py`; goldsmith's side of it is a test,",
        "`tests/unit/data/test_hard_cases.py`.",
        "",
        f"{trl}, transformers {versions['transformers']}, datasets {versions['datasets']}.",
        "",
        *[f"- **{name}**: {meaning}." for name, meaning in MEANINGS.items()],
        "",
        "In sum:",
        "",
        *summary,
        "",
        f"| case | right | goldsmith | {trl} | seen by users in |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Below, ⟨...⟩ is one control token (and `<...>` the words that spell it), «...» is gold, ×2 its weight. What follows the",
        "last gold of an example is not shown.",
    ]
    for case, mine, other in verdicts:
        lines += [
            "",
            f'<a id="{case.name}"></a>',
            "",
            f"## {case.title}",
            "",
            "```jsonl",
            *(json.dumps(row) for row in case.rows),
            "```",
            "",
            f"- Right: {_right(case)}. {case.why}",
            f"- goldsmith{_settings(case)}: **{mine.name}**. {mine.shown}{case.own and f' ({case.own})'}",
            f"- {trl}: **{other.name}**. {other.shown}",
        ]
        if other.name != "right":
            lines += [f"- {said}" for said in (case.policy, case.known) if said]
        if case.remedy and other.name != "right":
            lines.append(f"- A way with {trl}: {case.remedy}.{_remedied(case, theirs[case.name])}")
    return "\n".join(lines) + "\n"


def _settings(case: Case) -> str:
    """What of goldsmith's is not the default."""
    named = [f"`{part}.{key}: {value}`" for part, own in case.goldsmith.items() for key, value in own.items()]
    return f" with {', '.join(named)}" if named else ""


def _short_right(case: Case) -> str:
    return {Trained: "trained", Refused: "refused", Same: "equal"}[type(case.right)]


def _remedied(case: Case, observed: Json) -> str:
    if "remedied" not in observed:
        return ""
    verdict = judge(case, observed["remedied"])
    return f" Tried: **{verdict.name}**. {verdict.shown}"


def _run(python: Path, script: str) -> Json:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if script == "run_goldsmith.py":
        environment["PYTHONPATH"] = str(REPOSITORY / "src")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "observed.json"
        log = Path(folder) / "log"
        with log.open("w") as stream:
            done = subprocess.run(
                [str(python), str(HERE / script), str(output)],
                stdout=stream,
                stderr=stream,
                env=environment,
                check=False,
            )
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{log.read_text()[-4000:]}")
        result: Json = json.loads(output.read_text(encoding="utf-8"))
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, default=TRL_PYTHON, metavar="PYTHON", help="an interpreter that has TRL")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE", help="default: docs/hard_cases.md")
    options = parser.parse_args()
    if not options.trl.is_file():
        raise SystemExit(f"{options.trl} is not there; `benchmarks/run.py --install trl` makes it")
    ours = _run(Path(sys.executable), "run_goldsmith.py")
    theirs = _run(options.trl, "run_trl.py")
    options.output.write_text(page(ours, theirs["cases"], theirs["versions"]), encoding="utf-8")
    for case in CASES:
        mine, other = judge(case, ours[case.name]), judge(case, theirs["cases"][case.name])
        print(f"{case.name:34} goldsmith {mine.name:6} TRL {other.name}")


if __name__ == "__main__":
    main()
