"""The settings of rendering, and the chat templates that are built in."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from goldsmith.errors import ConfigError

__all__ = ["BUILT_IN_TEMPLATES", "RenderingConfig", "template_text"]

# For base models, which have no template of their own. Each turn has its own end token.
BUILT_IN_TEMPLATES: Final[dict[str, str]] = {
    "chatml": (
        "{%- for message in messages -%}\n"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        "{{- '<|im_start|>assistant\\n' -}}\n"
        "{%- endif -%}\n"
    ),
}


def _as_text(value: object) -> object:
    """YAML reads a date as one."""
    return value.isoformat() if isinstance(value, datetime.date) else value


class RenderingConfig(BaseModel):
    """How a row becomes tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    boundary: Literal["separate", "joint"] = Field(
        default="separate",
        description="plain rows. separate: prompt and completion are tokenised apart, as a server does; "
        "joint: as one text, and a token that straddles the boundary is gold",
    )
    separator: str = Field(
        default="", description="text between prompt and completion of plain rows; it goes with the prompt"
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description=f"a jinja file, or a built-in one ({', '.join(BUILT_IN_TEMPLATES)}); null: the tokenizer's own",
    )
    control_tokens: tuple[str, ...] = Field(
        default=(),
        description="control tokens of `chat_template` to add to the tokenizer, besides those that it writes as `<|...|>`",
    )
    date: Annotated[str | None, BeforeValidator(_as_text)] = Field(
        default=None,
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="the day that templates which write the date are told; null: today",
    )
    turns: Literal["auto", "together", "expanded"] = Field(
        default="auto",
        description="chats. together: a conversation is one example, and one of which this cannot be is rejected; expanded: one "
        "example a gold turn; auto: together where each turn's context begins with all that came before it, else expanded",
    )
    serving_mismatch: Literal["reject", "train"] = Field(
        default="reject",
        description="chats of which the turn as the template writes it does not continue what a server is given. reject; or "
        "train, after as much of what the server is given as the two share",
    )
    unwritten: Literal["reject", "ignore"] = Field(
        default="reject",
        description="chats with gold that the template does not write as it is (reasoning or tool calls that it has no place "
        "for). reject; or ignore, and train on what it writes",
    )
    allow_control_tokens: Literal["none", "assistant", "all"] = Field(
        default="none",
        description="whose words may spell control tokens (`<|im_end|>`): nobody's, then they are encoded as text; the "
        "assistant's (a plain row's completion); or everybody's",
    )
    train_on: Literal["assistant", "all"] | tuple[str, ...] = Field(
        default="assistant",
        description="whose words are gold: the assistant's, a list of roles, or all (the whole text but its first token)",
    )
    last_turn_only: bool = Field(default=False, description="of several gold turns only the last is gold")
    append_end_token: bool = Field(
        default=True,
        description="gold ends with the end token, once; in chat only where the template itself writes none",
    )
    train_on_end_token: bool = Field(
        default=True, description="whether the token that ends a turn is gold; else it is there with weight 0"
    )
    first_tokens: int = Field(default=0, ge=0, description="so many gold tokens of each turn have another weight")
    first_tokens_weight: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="what the weight of `first_tokens` is multiplied by"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.train_on, tuple) and (not self.train_on or not all(self.train_on)):
            raise ValueError("train_on is assistant, all, or a list of at least one role")
        if self.train_on == "all" and self.last_turn_only:
            raise ValueError("train_on all is the whole text, which has no last turn; remove last_turn_only")
        if self.control_tokens and self.chat_template is None:
            raise ValueError("control_tokens are those of a chat_template, and none is given")
        if any(not token.strip() for token in self.control_tokens):
            raise ValueError("control_tokens holds an empty one")
        if (self.first_tokens > 0) != (self.first_tokens_weight != 1.0):
            raise ValueError("first_tokens and first_tokens_weight go together; give both or neither")
        return self

    def trains(self, role: str) -> bool:
        """Whether messages of `role` are gold."""
        if self.train_on == "all":
            return True
        return role == self.train_on if isinstance(self.train_on, str) else role in self.train_on


def template_text(config: RenderingConfig) -> str | None:
    """The template that the recipe gives; None where it is the tokenizer's own.

    Raises:
        ConfigError: the file cannot be read.
    """
    name = config.chat_template
    if name is None:
        return None
    if name in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template {name} cannot be read: {error}",
            remedy=f"mend rendering.chat_template: a jinja file, or a built-in name ({', '.join(BUILT_IN_TEMPLATES)})",
        ) from error
