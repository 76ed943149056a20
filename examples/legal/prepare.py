"""Plain-English summaries of contracts (Manor and Li 2019) -> prompt and completion in JSON Lines; every tenth row is held out.

python examples/legal/prepare.py all_v1.json        # writes prepared/ beside this file
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    # One object, from id to row.
    rows = [
        {"id": name, "clause": row["original_text"], "summary": row["reference_summary"], "document": row["doc"]}
        for name, row in json.loads(parser.parse_args().file.read_text(encoding="utf-8")).items()
    ]
    (HERE / "prepared").mkdir(exist_ok=True)
    for name, chosen in (("train", [row for n, row in enumerate(rows) if n % 10]), ("eval", rows[::10])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        (HERE / "prepared" / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(chosen)} rows")


if __name__ == "__main__":
    main()
