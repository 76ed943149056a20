"""The dialogues of the schema-guided data set (DSTC8) -> chats in JSON Lines, one a dialogue; every tenth is held out.

    python examples/dstc8/prepare.py FOLDER        # with dialogues_*.json; writes prepared/ beside this file

What the system looked up becomes the assistant's tool call and the tool's answer, cut to its first result: the one that
the system goes on to speak of.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def messages_of(dialogue: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The turns of a dialogue as messages."""
    calls = 0
    for turn in dialogue["turns"]:
        if turn["speaker"] == "USER":
            yield {"role": "user", "content": turn["utterance"]}
            continue
        for frame in turn["frames"]:
            if "service_call" not in frame:
                continue
            calls += 1
            call = {"name": frame["service_call"]["method"], "arguments": frame["service_call"]["parameters"]}
            name = f"call_{calls}"
            yield {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": name, "type": "function", "function": call}],
            }
            answer = json.dumps(frame["service_results"][:1])
            yield {"role": "tool", "tool_call_id": name, "name": call["name"], "content": answer}
        yield {"role": "assistant", "content": turn["utterance"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows = [
        {"id": dialogue["dialogue_id"], "messages": list(messages_of(dialogue))}
        for file in sorted(folder.glob("dialogues_*.json"))
        for dialogue in json.loads(file.read_text(encoding="utf-8"))
    ]
    if not rows:
        parser.error(f"no dialogues_*.json in {folder}")
    (HERE / "prepared").mkdir(exist_ok=True)
    for name, chosen in (("train", [row for n, row in enumerate(rows) if n % 10]), ("eval", rows[::10])):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        (HERE / "prepared" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}.jsonl: {len(chosen)} dialogues")


if __name__ == "__main__":
    main()
