"""Run every command of the tutorial in an empty folder, and put what it printed below it.

python docs/run_tutorial.py            prints the page
python docs/run_tutorial.py --write    writes it
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parent / "tutorial.md"
MAX_LINES = 100
# In place of the temporary folder, and as long as its name, so that columns stay in line.
SHOWN_FOLDER = "/home/ada/digits"


def files(text: str) -> dict[str, str]:
    """Name -> content of the blocks below `<!-- file: name -->`."""
    return dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL))


def commands(text: str) -> list[str]:
    """Every line that begins with `$ ` in a console block, in order."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def run(command: str, folder: Path) -> str:
    """What a person would see: standard output and standard error as they come.

    Raises:
        SystemExit: the command failed.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "110"}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"$ {command}\n{done.stdout}\nexit code {done.returncode}")
    lines = [line.rstrip() for line in done.stdout.replace(str(folder), SHOWN_FOLDER).splitlines()]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], "..."]
    return "\n".join(lines)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files(text).items():
            (folder / file).write_text(content, encoding="utf-8")

        def block(match: re.Match[str]) -> str:
            shown = []
            for command in commands(match.group(0)):
                print(f"$ {command}", file=sys.stderr, flush=True)
                shown.append("\n".join(filter(None, [f"$ {command}", run(command, folder)])))
            return "```console\n" + "\n".join(shown) + "\n```"

        text = re.sub(r"```console\n.*?```", block, text, flags=re.DOTALL)
    if "--write" in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
