"""Compare models on the same gold: score files, or models that are scored here and now."""

from __future__ import annotations

import glob
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from goldsmith.data.config import Columns
from goldsmith.data.loader import require_iterable
from goldsmith.data.truncation import TOO_LONG, LengthPolicy, Losses
from goldsmith.errors import ConfigError
from goldsmith.models.precision import DtypeName
from goldsmith.scoring.compare import Comparison
from goldsmith.scoring.compare_text import plural
from goldsmith.scoring.files import stream_scores
from goldsmith.scoring.ranking import Ranking
from goldsmith.scoring.ranking import compare as compare_scores
from goldsmith.scoring.summary import ScoreSummary, lost_text, skipped_lines
from goldsmith.workflows.materials import Rows
from goldsmith.workflows.models import LENGTH_OPTIONS, open_model, require_sizes, row_limit_of, vocabulary_of
from goldsmith.workflows.saying import RowCounter, Say
from goldsmith.workflows.scoring import score_opened

__all__ = ["compare", "compare_models"]

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz")


def compare(
    *subjects: str,
    columns: Columns | None = None,
    limit: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    max_length: int | None = None,
    on_too_long: LengthPolicy | None = None,
    rendering: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
    tokens_per_microbatch: int | None = None,
    quiet: bool = True,
) -> Comparison | Ranking:
    """`goldsmith compare A B [C...] [DATA]`: score files; or models, and then the file of gold comes last.

    Args:
        subjects: what is a file is a score file, but for the last where something else is a model.
        columns, limit, on_bad_row, max_length, on_too_long, rendering, device, dtype, tokens_per_microbatch, quiet: of scoring;
            see `compare_models`.

    Raises:
        ConfigError: fewer than two to compare; models but no data; a limit of rows, but score files only.
    """
    models = [subject for subject in subjects if not _is_file(subject)]
    if not models:
        _require_two(subjects)
        if max_length is not None or on_too_long is not None or rendering is not None:
            raise ConfigError(
                "--max-length, --on-too-long and --rendering are of rows that are scored here, but only score files are given",
                remedy="give them to goldsmith score, which writes these files",
            )
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
        max_length=max_length,
        on_too_long=on_too_long,
        rendering=rendering,
        device=device,
        dtype=dtype,
        tokens_per_microbatch=tokens_per_microbatch,
        quiet=quiet,
    )


def compare_models(
    *models: str,
    data: str | Path | Rows,
    columns: Columns | None = None,
    limit: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    max_length: int | None = None,
    on_too_long: LengthPolicy | None = None,
    rendering: str | None = None,
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
        max_length, on_too_long: what is too long, and what becomes of it, the same for all models, so that all have the same
            gold. By default the shortest of the models' limits, and `reject`, also where a model is a run that cut rows. What was
            done, and which rows were skipped, stands in `notes` of the result.
        rendering: a run whose separator, template and columns all models are given; by default each has its own.

    Raises:
        GoldsmithError: as `score` and `goldsmith.compare`.
        ConfigError: `right` or `split`, which cut the gold by tokens, and models of different vocabularies.
    """
    _require_two(models)
    require_sizes(tokens_per_microbatch, max_length)
    if len(set(models)) < len(models):
        raise ConfigError(f"a model is named twice: {', '.join(models)}", remedy="name each once")
    for model in models:
        if _is_file(model):  # hours of scoring would be lost
            deque(stream_scores(model), maxlen=0)
    if not isinstance(data, str | Path):
        require_iterable(data)
    rows = str(data) if isinstance(data, str | Path) else list(data)
    names = _short_names(models)
    scored = {name: model for name, model in zip(names, models, strict=True) if not _is_file(model)}
    cut = _same_for_all(scored, max_length=max_length, on_too_long=on_too_long)
    summaries: dict[str, ScoreSummary] = {}
    files: list[str] = []
    with tempfile.TemporaryDirectory(prefix="goldsmith-compare-") as folder:
        for number, (name, model) in enumerate(zip(names, models, strict=True)):
            if name not in scored:
                files.append(model)
                continue
            opened = open_model(
                model,
                device=device,
                dtype=dtype,
                max_length=cut.max_length,
                on_too_long=cut.policy,
                end_token_after_cut=cut.end_token_after_cut,
                length_options=LENGTH_OPTIONS,
                rendering=rendering,
            )
            files.append(str(Path(folder) / f"{number}.jsonl"))
            with opened.spool(
                rows,
                columns=columns,
                on_bad_row=on_bad_row,
                limit=limit,
                folder=Path(folder),
                note_row=RowCounter(Say(quiet=quiet), "read"),
            ) as spool:
                summaries[name] = score_opened(
                    opened,
                    spool,
                    with_tokens=True,
                    output=files[-1],
                    tokens_per_microbatch=tokens_per_microbatch,
                    quiet=quiet,
                )
            del opened
        found = compare_scores(*_as_scores(files), names=names)
    notes = [*cut.notes, *_notes_of_losses(summaries, cut, found), *_notes_of_skipped(summaries, cut, found)]
    rejected = {name: summary.rejected for name, summary in summaries.items()}
    return replace(found, notes=tuple(notes), rejected=rejected)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """What is too long for all models alike, and what becomes of it.

    Attributes:
        whose: what set the limit.
        notes: lines for who reads the result.
    """

    max_length: int | None
    policy: LengthPolicy
    end_token_after_cut: bool
    whose: str
    notes: tuple[str, ...]

    @property
    def too_long(self) -> str:
        """The reason for which rows are counted, with its figure."""
        return TOO_LONG if self.max_length is None else f"longer than {self.max_length:,} tokens ({self.whose})"


def _same_for_all(scored: Mapping[str, str], *, max_length: int | None, on_too_long: LengthPolicy | None) -> _Cut:
    """The models' limits made one: the shortest.

    Args:
        scored: name -> model.

    Raises:
        ConfigError: gold would be cut by tokens, and the tokens are not the same.
    """
    policy: LengthPolicy = on_too_long or "reject"
    limits = {name: row_limit_of(model) for name, model in scored.items()}
    known = {name: tokens for name, limit in limits.items() if (tokens := limit.tokens(policy)) is not None}
    shortest = min(known, key=lambda name: known[name], default=None)
    if policy in ("right", "split"):
        vocabularies = {name: vocabulary_of(model) for name, model in scored.items()}
        first = next(iter(scored), "")
        for name, vocabulary in vocabularies.items():
            if vocabulary != vocabularies[first]:
                raise ConfigError(
                    f"on_too_long {policy} cuts the gold by tokens, and those of {first} and of {name} are not the same: "
                    "they would be compared on other gold",
                    remedy="--on-too-long reject or drop leaves such rows out, left shortens the context only",
                )
    of_runs = [limit.of_run for limit in limits.values()]
    notes = []
    if on_too_long is None:
        for name, limit in limits.items():
            if limit.of_run is not None and limit.of_run.on_too_long != "reject":
                notes.append(
                    f"{name} was trained with on_too_long: {limit.of_run.on_too_long}; here rows are compared whole, "
                    "or rejected (--on-too-long)"
                )
    return _Cut(
        max_length=max_length or (None if shortest is None else known[shortest]),
        policy=policy,
        end_token_after_cut=all(run is not None and run.end_token_after_cut for run in of_runs),
        whose="--max-length" if max_length is not None or shortest is None else f"the limit of {shortest}",
        notes=tuple(notes),
    )


def _notes_of_losses(summaries: Mapping[str, ScoreSummary], cut: _Cut, found: Comparison | Ranking) -> list[str]:
    """What the limit cost but for rows that were rejected for it only, which are among those that were skipped."""
    costs = {}
    for name, summary in summaries.items():
        lost = summary.losses or Losses()
        costs[name] = lost_text(lost) if lost.rows_dropped or lost.rows_cut or lost.rows_split else ""
    return _told(f"rows {cut.too_long}", costs, found)


def _notes_of_skipped(summaries: Mapping[str, ScoreSummary], cut: _Cut, found: Comparison | Ranking) -> list[str]:
    """How many rows were skipped and why, the first of each reason, and what is compared where not all have the same rows."""
    lines = {name: skipped_lines(one.rejected, one.first_rejected) for name, one in summaries.items()}
    counts = {name: own[0].replace(TOO_LONG, cut.too_long) if own else "" for name, own in lines.items()}
    notes = _told("rows skipped", counts, found)
    for line in dict.fromkeys(line for own in lines.values() for line in own[1:]):
        names = [name for name, own in lines.items() if line in own]
        notes.append(line if len(names) == len(lines) else f"of {', '.join(names)}, {line}")
    if notes and not _has_same_rows(found):
        notes.append(f"only what all have scored is compared: {plural(found.num_shared, 'example')}")
    return notes


def _told(what: str, texts: Mapping[str, str], found: Comparison | Ranking) -> list[str]:
    """A line for each model of which there is something to tell, or one where it is told of the same rows of all."""
    shown = {name: text for name, text in texts.items() if text}
    # Equal counts may be of other rows; and of the rows of a score file nothing is known.
    if len(shown) == len(found.names) and len(set(shown.values())) == 1 and _has_same_rows(found):
        return [f"{what}: {next(iter(shown.values()))}, alike for all"]
    return [f"{what}, of {name}: {text}" for name, text in shown.items()]


def _has_same_rows(found: Comparison | Ranking) -> bool:
    if isinstance(found, Comparison):
        return not (found.num_only_a or found.num_only_b)
    return not any(found.num_left_out.values())


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
