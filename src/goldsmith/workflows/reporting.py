"""The report of runs and score files: made when a run ends, on request, or served while a run trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from goldsmith import distributed
from goldsmith.data.dataset import Dataset
from goldsmith.errors import ConfigError, DataError, MachineError
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.step import autocast
from goldsmith.report.page import MAX_EXAMPLES, ReportConfig, payload_of, render_page
from goldsmith.report.payload import Side
from goldsmith.report.run_files import RUN_FILES, read_run
from goldsmith.report.serve import HOST, report_server
from goldsmith.scoring.files import read_scores, score_to_json
from goldsmith.scoring.score import Asked, score_windows
from goldsmith.scoring.texts import TokenTexts
from goldsmith.storage import require_no_input, write_asked_file, write_atomic
from goldsmith.workflows.saying import Say

__all__ = [
    "AFTER",
    "BEFORE",
    "REPORT",
    "ReportResult",
    "report",
    "score_for_report",
    "serve_report",
    "write_run_report",
]

REPORT = "report.html"
BEFORE, AFTER = "scores-before.jsonl", "scores-after.jsonl"


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """Where the page lies.

    Attributes:
        num_examples: examples with scores that it holds.
    """

    path: Path
    num_bytes: int
    num_examples: int

    def to_json(self) -> dict[str, Any]:
        """One machine-readable object."""
        return {"path": str(self.path), "num_bytes": self.num_bytes, "num_examples": self.num_examples}

    def __str__(self) -> str:
        examples = f"{self.num_examples:,} examples" if self.num_examples else "no scored examples"
        return f"{self.path}: {self.num_bytes / 1e6:.2f} MB, {examples}"


def report(
    runs: Sequence[str | Path] = (),
    scores: Sequence[str | Path] = (),
    *,
    output: str | Path | None = None,
    max_examples: int = MAX_EXAMPLES,
) -> ReportResult:
    """One HTML page of runs and score files.

    Args:
        runs: run folders, finished or not.
        scores: score files, as `goldsmith score --tokens --output` writes them.
        output: the page; default: `report.html` in the first run's folder, or in the current directory.
        max_examples: so many are shown token by token.

    Raises:
        GoldsmithError: neither runs nor scores, a folder that is no run's, a wrong score file, one of these as `output`, a full
            disk.
    """
    folders, files = _existing(runs, scores)
    if output is not None:
        require_no_input(output, _read_files(folders, files), writes="the page")
    path = Path(output) if output is not None else (folders[0] / REPORT if folders else Path(REPORT))
    if not path.parent.is_dir():
        raise MachineError(f"{path}: there is no folder {path.parent}", remedy="make it, or choose another --output")
    sides = _sides(folders, files)
    page = render_page(
        runs=[read_run(folder) for folder in folders],
        sides=sides,
        title=_title(folders, files),
        max_examples=max_examples,
    )
    data = page.encode("utf-8", "replace")
    write_asked_file(path if output is None else output, data)
    ids = {score.example_id for side in sides for score in side.scores}
    return ReportResult(path=path, num_bytes=len(data), num_examples=min(len(ids), max_examples))


def serve_report(
    runs: Sequence[str | Path] = (),
    scores: Sequence[str | Path] = (),
    *,
    port: int = 0,
    max_examples: int = MAX_EXAMPLES,
    say: Callable[[str], None] | None = None,
) -> None:
    """Serve the page on 127.0.0.1, with data as new as the files, until interrupted.

    Raises:
        GoldsmithError: as `report`, or the port is taken.
    """
    folders, files = _existing(runs, scores)
    watched = [file for _, file in _read_files(folders, files)]

    def stamp() -> tuple[tuple[int, int] | None, ...]:
        stats = [path.stat() if path.is_file() else None for path in watched]
        return tuple(None if stat is None else (stat.st_mtime_ns, stat.st_size) for stat in stats)

    title = _title(folders, files)

    def payload() -> bytes:
        return payload_of(
            runs=[read_run(folder) for folder in folders],
            sides=_sides(folders, files),
            title=title,
            max_examples=max_examples,
        )

    payload()  # what is wrong is said here, and not to a browser
    with report_server(payload, title=title, port=port, stamp=stamp) as server:
        (say or Say(quiet=False))(f"http://{HOST}:{server.server_port}/ until Ctrl-C")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def score_for_report(
    path: Path,
    model: LikelihoodModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    config: ReportConfig,
    *,
    tokens_per_microbatch: int,
) -> None:
    """Score the first examples token by token, as the model is now; the main process writes `path`.

    Every process computes the same, because a sharded model takes all of them. Only what is shown depends on it, and no random
    number is drawn, so a run ends the same with it or without.
    """
    if not config.examples:
        return
    shown = Dataset(dataset[: config.examples], report=dataset.report)
    with autocast(model):
        windows = score_windows(
            model,
            TokenTexts(tokenizer),
            shown,
            Asked(tokens=True, alternatives=config.alternatives),
            tokens_per_microbatch=tokens_per_microbatch,
        )
        lines = [
            json.dumps(score_to_json(example.scores), ensure_ascii=False, allow_nan=False) + "\n"
            for window in windows
            for example in window
        ]
    if distributed.is_main():
        write_atomic(path, "".join(lines).encode("utf-8", "surrogatepass"))


def write_run_report(folder: Path) -> Path:
    """`report.html` of a run folder."""
    return report([folder]).path


def _existing(runs: Sequence[str | Path], scores: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    if not runs and not scores:
        raise ConfigError("report wants a run folder or --scores", remedy="for example: goldsmith report runs/legal")
    folders, files = [Path(run) for run in runs], [Path(file) for file in scores]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file}: no such score file", remedy="write one: goldsmith score MODEL DATA --tokens -o FILE"
            )
    return folders, files


def _read_files(folders: Sequence[Path], files: Sequence[Path]) -> list[tuple[str, Path]]:
    """What the page is made of."""
    of_runs = [("a file of the run", folder / name) for folder in folders for name in (*RUN_FILES, BEFORE, AFTER)]
    return of_runs + [("a score file", file) for file in files]


def _sides(folders: Sequence[Path], files: Sequence[Path]) -> list[Side]:
    """Before and after of each run that has them, then each score file; the names tell them apart."""
    sides = []
    for folder in folders:
        is_held_out = "eval" in read_run(folder).values["data"]
        note = (
            ""
            if is_held_out
            else f"{folder.resolve().name} has no held-out data: its examples here are of its training data."
        )
        for moment, scored in (("before", folder / BEFORE), ("after", folder / AFTER)):
            if scored.is_file():
                name = moment if len(folders) == 1 and not files else f"{folder.resolve().name}, {moment}"
                sides.append(Side(name=name, scores=read_scores(scored), note=note))
    names = [file.name.removesuffix(".jsonl") for file in files]
    for file, name in zip(files, names, strict=True):
        sides.append(Side(name=name if names.count(name) == 1 else str(file), scores=read_scores(file)))
    return sides


def _title(folders: Sequence[Path], files: Sequence[Path]) -> str:
    return ", ".join([*(folder.resolve().name for folder in folders), *(file.name for file in files)])
