"""The seed tasks of self-instruct -> Alpaca rows in JSON Lines, one for each instance; every tenth task is held out.

python examples/self_instruct/prepare.py seed_tasks.jsonl        # writes prepared/ beside this file
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    lines = parser.parse_args().file.read_text(encoding="utf-8").splitlines()
    tasks = [json.loads(line) for line in lines]
    (HERE / "prepared").mkdir(exist_ok=True)
    for name, chosen in (("train", [task for n, task in enumerate(tasks) if n % 10]), ("eval", tasks[::10])):
        rows = [
            {"id": f"{task['id']}.{number}", "instruction": task["instruction"], **instance}
            for task in chosen
            for number, instance in enumerate(task["instances"])
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / "prepared" / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
