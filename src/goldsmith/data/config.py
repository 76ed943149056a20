"""What a recipe says of its rows: sources, columns, formats, and what becomes of a row that is bad or too long."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator, model_validator

__all__ = ["FIELDS", "HUB_PREFIX", "Columns", "DataConfig", "FormatName", "SourceConfig", "source_name"]

# What a row may be; see `docs/formats.md`.
FormatName = Literal["prompt_completion", "chat", "sharegpt", "alpaca", "text", "tokens"]

# What goldsmith reads of a row, and what `columns` may map.
FIELDS = (
    "prompt",
    "completion",
    "messages",
    "tools",
    "conversations",
    "system",
    "instruction",
    "input",
    "output",
    "text",
    "token_ids",
    "target_weights",
    "labels",
    "spans",
    "id",
    "weight",
)

# Begins the `path` of a source that is a data set of the Hugging Face hub.
HUB_PREFIX = "hf:"

Columns = dict[str, StrictInt | StrictStr]


def _checked_columns(columns: Columns | None) -> Columns | None:
    if columns is None:
        return None
    for field, column in columns.items():
        if field not in FIELDS:
            raise ValueError(f"{field!r} is not a field; columns maps {', '.join(FIELDS)} to the columns of the file")
        if isinstance(column, int) and column < 0:
            raise ValueError(f"column {column} of {field!r} is negative; positions count from 0")
    if len({isinstance(column, int) for column in columns.values()}) > 1:
        raise ValueError("columns mixes names and positions; positions are for a file without a header")
    return columns


class SourceConfig(BaseModel):
    """One source of rows: a file, several by a glob, or a data set of the hub."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        min_length=1,
        description="a file, a glob such as `data/*.jsonl.gz` (`.gz` is unpacked while reading), or `hf:NAME`, a data set of "
        "the Hugging Face hub",
    )
    name: str | None = Field(
        default=None, min_length=1, description="name in reports and example ids; default: the file's stem"
    )
    split: str | None = Field(default=None, min_length=1, description="of a hub data set, which has to name it")
    subset: str | None = Field(default=None, min_length=1, description="of a hub data set that has several")
    revision: str | None = Field(
        default=None, min_length=1, description="of a hub data set; null: the newest, and the run keeps to it"
    )
    format: FormatName | None = Field(
        default=None, description="of every row; null: that of `data`, else found in the first rows"
    )
    ignore_message_keys: list[str] = Field(
        default=[], description="keys of messages that mean nothing here; another unknown key rejects its row"
    )
    columns: Columns | None = Field(
        default=None,
        description="field -> column name, or -> position from 0 in a CSV or TSV file without a header",
    )
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="multiplies the example weight")
    repeat: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="how often an epoch holds each row")
    limit: int | None = Field(default=None, ge=1, description="take the first n rows that can be used")

    streaming: bool = Field(
        default=False,
        description="read it while training, again and again, in place of holding it; see docs/formats.md",
    )
    window: int | None = Field(
        default=None, ge=1, description="rows that a streamed source is shuffled within; null: 10,000"
    )

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: Columns | None) -> Columns | None:
        return _checked_columns(columns)

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        if self.window is not None and not self.streaming:
            raise ValueError(f"window ({self.window}) is for a streamed source; set `streaming: true`, or remove it")
        return self

    @model_validator(mode="after")
    def _check_hub(self) -> Self:
        if self.is_hub:
            if self.path == HUB_PREFIX:
                raise ValueError("path names no data set behind `hf:`; for example `hf:openai/gsm8k`")
            if self.split is None:
                raise ValueError(f"the data set {self.path} needs `split`, for example `split: train`")
            return self
        for key in ("split", "subset", "revision"):
            if (value := getattr(self, key)) is not None:
                raise ValueError(
                    f"{key} ({value}) is for a data set of the hub; {self.path} is a file (`hf:NAME` is none)"
                )
        return self

    @property
    def is_hub(self) -> bool:
        """Whether the rows come through the `datasets` library."""
        return self.path.startswith(HUB_PREFIX)


class DataConfig(BaseModel):
    """The rows to train on and to evaluate on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: list[SourceConfig] = Field(
        default=[], description="sources; a single path or mapping stands for a list of one"
    )
    eval: list[SourceConfig] = Field(default=[], description="held-out sources, never trained on")
    columns: Columns | None = Field(default=None, description="columns of every source that gives none itself")
    format: FormatName | None = Field(default=None, description="format of every source that gives none itself")
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="tokens; `on_too_long` says what becomes of a longer row. null: the model's limit",
    )
    on_too_long: Literal["reject", "drop", "left", "right", "split"] = Field(
        default="reject",
        description="reject: a bad row, see on_bad_row; drop: left out and counted; left: its context is shortened from the left; "
        "right: its gold is cut from the right; split: several examples, the context repeated",
    )
    end_token_after_cut: bool = Field(
        default=False, description="on_too_long: right. gold that was cut still ends with its end token"
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop",
        description="stop: nothing is trained while a row is rejected; skip: rejected rows are left out and counted",
    )

    cache: bool | Annotated[str, Field(min_length=1)] = Field(
        default=True,
        description="keep tokenised rows, and take them from there where nothing changed: true (in the user's cache folder, if "
        "the files have 1 MiB or more), false, or a folder",
    )
    order: Literal["shuffled", "grouped"] = Field(
        default="shuffled",
        description="grouped: rows that begin with the same context meet in a step, which then computes it once: another "
        "statistical choice than shuffled",
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        if isinstance(value, (str, Mapping, SourceConfig)):
            value = [value]
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: Columns | None) -> Columns | None:
        return _checked_columns(columns)

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        streamed = [source for source in self.train if source.streaming and source.limit is None]
        if streamed and len(streamed) < len(self.train):
            held = next(source for source in self.train if source not in streamed)
            raise ValueError(
                f"train mixes streamed sources ({streamed[0].path}) with others ({held.path}); stream all of them, or none"
            )
        for source in self.eval:
            if source.streaming and source.limit is None:
                raise ValueError(f"eval: the streamed source {source.path} needs `limit`: its first rows are held")
        if streamed and self.order == "grouped":
            raise ValueError("order: grouped needs all rows at hand, but train is streamed; remove one of the two")
        return self

    @property
    def is_streamed(self) -> bool:
        """Whether training draws its rows from a stream. (A streamed source with a `limit` is read up to it, and held.)"""
        return any(source.streaming and source.limit is None for source in self.train)


def source_name(source: SourceConfig) -> str:
    """The source's `name`, else the stem of its path as written, `.gz` and the format's suffix taken off.

    >>> source_name(SourceConfig(path="data/train.jsonl.gz"))
    'train'
    """
    if source.name is not None:
        return source.name
    if source.is_hub:
        path = PurePath(source.path.removeprefix(HUB_PREFIX))
        return path.name or str(path)
    name = PurePath(source.path).name
    name = name.removesuffix(".gz")
    return PurePath(name).stem or name
