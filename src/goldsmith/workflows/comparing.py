"""Compare models on the same gold: score files, or models that are scored here and now."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from goldsmith.data.config import Columns
from goldsmith.errors import ConfigError
from goldsmith.models.precision import DtypeName
from goldsmith.scoring.compare import Comparison
from goldsmith.scoring.files import read_scores
from goldsmith.scoring.ranking import Ranking, Scores
from goldsmith.scoring.ranking import compare as compare_scores
from goldsmith.workflows.materials import Rows
from goldsmith.workflows.scoring import score

__all__ = ["compare", "compare_models"]

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz")


def compare(
    *subjects: str,
    columns: Columns | None = None,
    limit: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    device: str = "auto",
    dtype: DtypeName = "auto",
    tokens_per_microbatch: int | None = None,
    quiet: bool = True,
) -> Comparison | Ranking:
    """`goldsmith compare A B [C...] [DATA]`: score files; or models, and then the file of gold comes last.

    Args:
        subjects: what is a file is a score file, but for the last where something else is a model.
        columns, limit, on_bad_row, device, dtype, tokens_per_microbatch, quiet: of scoring; see `score`.

    Raises:
        ConfigError: fewer than two to compare; models but no data.
    """
    models = [subject for subject in subjects if not _is_file(subject)]
    if not models:
        _require_two(subjects)
        return compare_scores(*_as_scores(subjects))
    *named, data = subjects
    if not _is_file(data):
        raise ConfigError(
            f"{models[0]}: a model and not a score file, so the last must be a file of gold, but {data} is none",
            remedy="for example: goldsmith compare MODEL-A MODEL-B test.jsonl",
        )
    _require_two(named)
    return compare_models(
        *named,
        data=data,
        columns=columns,
        limit=limit,
        on_bad_row=on_bad_row,
        device=device,
        dtype=dtype,
        tokens_per_microbatch=tokens_per_microbatch,
        quiet=quiet,
    )


def compare_models(
    *models: str,
    data: str | Rows,
    columns: Columns | None = None,
    limit: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    device: str = "auto",
    dtype: DtypeName = "auto",
    tokens_per_microbatch: int | None = None,
    quiet: bool = True,
) -> Comparison | Ranking:
    """Score the same gold under two models or more, one after the other, and compare them; of more than two, rank them.

    Args:
        models: each as in `score`, or a score file of the same gold.
        data: a file of gold, a glob, or rows in memory.
        columns, limit, on_bad_row, device, dtype, tokens_per_microbatch, quiet: as in `score`.

    Raises:
        GoldsmithError: as `score` and `goldsmith.compare`.
    """
    _require_two(models)
    if len(set(models)) < len(models):
        raise ConfigError(f"a model is named twice: {', '.join(models)}", remedy="name each once")
    rows = data if isinstance(data, str) else list(data)
    scores: list[Scores] = []
    with tempfile.TemporaryDirectory(prefix="goldsmith-compare-") as folder:
        for number, model in enumerate(models):
            if _is_file(model):
                scores.append(read_scores(model))
                continue
            output = Path(folder) / f"{number}.jsonl"
            score(
                model,
                rows,
                columns=columns,
                with_tokens=True,
                output=output,
                limit=limit,
                on_bad_row=on_bad_row,
                # What one model's run cut the other's would not have: then they would be compared on other gold.
                on_too_long="reject",
                device=device,
                dtype=dtype,
                tokens_per_microbatch=tokens_per_microbatch,
                quiet=quiet,
            )
            scores.append(read_scores(output))
    return compare_scores(*scores, names=_short_names(models))


def _is_file(subject: str) -> bool:
    """A file, or a glob of files, or what would be one: a model's name has none of these suffixes."""
    return Path(subject).is_file() or (
        not Path(subject).is_dir()
        and (subject.endswith(_SUFFIXES) or (glob.has_magic(subject) and bool(glob.glob(subject))))
    )


def _require_two(subjects: Sequence[str]) -> None:
    if len(subjects) < 2:
        raise ConfigError(
            f"compare wants two models or score files at least, not {len(subjects)}",
            remedy="for example: goldsmith compare a.jsonl b.jsonl, or goldsmith compare MODEL-A MODEL-B test.jsonl",
        )


def _as_scores(subjects: Sequence[str]) -> tuple[str, str, str]:
    """For the types: `compare` takes two or more, and its overloads cannot say so of a sequence."""
    a, b, *more = subjects
    return (a, b, *more)  # type: ignore[return-value]


def _short_names(models: Iterable[str]) -> list[str]:
    """The last part of each where these differ, else the whole."""
    whole = list(models)
    short = [Path(model).name for model in whole]
    return short if len(set(short)) == len(whole) else whole
