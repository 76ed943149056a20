"""`trackers:` of a recipe: a list of names, or of mappings where a tracker has settings of its own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from goldsmith.errors import ConfigError

__all__ = [
    "MlflowConfig",
    "TensorboardConfig",
    "TrackerConfig",
    "TrackerConfigs",
    "TrackioConfig",
    "WandbConfig",
    "require_installed",
]

TRACKER_NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


class TensorboardConfig(BaseModel):
    """Event files in `tensorboard/` of the run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["tensorboard"] = Field("tensorboard", description="event files in `tensorboard/` of the run folder")


class WandbConfig(BaseModel):
    """A run of Weights & Biases; its files lie in `wandb/` of the run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["wandb"] = Field("wandb", description="a run of Weights & Biases")
    project: str = Field("goldsmith", min_length=1, description="the project that the run belongs to")
    entity: str | None = Field(None, description="user or team; null: the one that is logged in")
    run_name: str | None = Field(None, description="null: the name of the run folder")
    group: str | None = Field(None, description="runs that are shown together")
    tags: list[str] = Field(default=[], description="labels of the run")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="null: as WANDB_MODE and wandb's own settings say; offline: nothing leaves the machine"
    )


class MlflowConfig(BaseModel):
    """A run of MLflow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["mlflow"] = Field("mlflow", description="a run of MLflow")
    experiment: str = Field("goldsmith", min_length=1, description="made where it does not exist")
    run_name: str | None = Field(None, description="null: the name of the run folder")
    tracking_uri: str | None = Field(None, description="null: as MLFLOW_TRACKING_URI and mlflow's own settings say")


class TrackioConfig(BaseModel):
    """A run of trackio."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["trackio"] = Field("trackio", description="a run of trackio")
    project: str = Field("goldsmith", min_length=1, description="the project that the run belongs to")
    run_name: str | None = Field(
        None, description="null: the name of the run folder and some digits, since trackio knows a run by its name"
    )
    space_id: str | None = Field(None, description="a Space of the Hugging Face hub; null: this machine only")


def _with_name(value: object) -> object:
    """A name stands for a mapping that says no more.

    Raises:
        ValueError: a name of none of the trackers.
    """
    values = {"name": value} if isinstance(value, str) else value
    name = values.get("name") if isinstance(values, Mapping) else None
    if isinstance(name, str) and name not in TRACKER_NAMES:
        nearest = difflib.get_close_matches(name, TRACKER_NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown tracker {name!r}; nearest: `{nearest}`; known: {', '.join(TRACKER_NAMES)}")
    return values


TrackerConfig = Annotated[
    Annotated[TensorboardConfig | WandbConfig | MlflowConfig | TrackioConfig, Field(discriminator="name")],
    BeforeValidator(_with_name),
]


def _each_once(configs: list[TrackerConfig]) -> list[TrackerConfig]:
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is named {names.count(name)} times; name it once")
    return configs


def _as_list(value: object) -> object:
    return [value] if isinstance(value, (str, Mapping)) else value


TrackerConfigs = Annotated[list[TrackerConfig], BeforeValidator(_as_list), AfterValidator(_each_once)]


def require_installed(configs: Sequence[TrackerConfig]) -> None:
    """See to it before anything is trained that every tracker of a recipe can be loaded.

    Raises:
        ConfigError: a library is missing.
    """
    for config in configs:
        spec = find_spec(config.name)
        # A folder `wandb/` or `mlflow/` in the current directory is found too, as a package without a file.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"trackers: {config.name} is not installed",
                remedy=f"pip install 'goldsmith[{config.name}]', or take {config.name} out of `trackers`",
            )
