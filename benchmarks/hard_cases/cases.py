"""Twenty small files of gold that trainers get wrong, each with the right answer: what is learnt, or which row is refused.

The answer does not come from any trainer. It is written by hand as pieces of text with a weight each, and an encoder of a few
lines turns them into ids: one token a character, one a marker, and one merge where a case is about merges. The tokenizer that
the trainers get is built from the same vocabulary. Importing this file needs the standard library only; both environments do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["CASES", "Case", "Piece", "Refused", "Same", "Trained", "decode", "encode", "make_model", "make_tokenizer"]

# ------------------------------------------------------------------------------------------------------------ vocabulary

# Marker -> whether the tokenizer calls it special, as published tokenizers do or do not.
MARKERS: Final[Mapping[str, bool]] = {
    "<pad>": True, "<s>": True, "</s>": True, "<|im_start|>": True, "<|im_end|>": True, "<|user|>": True,
    "<|assistant|>": True, "<think>": False, "</think>": False, "<tool_call>": False, "</tool_call>": False,
}  # fmt: skip
MERGE: Final = (" ", "y")
VOCABULARY: Final[tuple[str, ...]] = (*MARKERS, "\n", *map(chr, range(32, 127)), "".join(MERGE))
_IDS: Final = {token: index for index, token in enumerate(VOCABULARY)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Text that is tokenised by itself.

    Attributes:
        weight: of predicting each of its tokens; 0 is context.
        is_words: somebody's words, in which a marker is spelled and not meant.
    """

    text: str
    weight: float = 0.0
    is_words: bool = False


def context(text: str) -> Piece:
    return Piece(text=text)


def gold(text: str, weight: float = 1.0) -> Piece:
    return Piece(text=text, weight=weight)


def encode(piece: Piece, *, merges: bool = False) -> list[int]:
    """Ids of a piece.

    >>> decode(encode(context("<s>a")))
    '⟨s⟩a'
    >>> decode(encode(Piece(text="<s>a", is_words=True)))
    '<s>a'
    """
    units = [*("".join(MERGE),) * merges, r"[\s\S]"]
    pattern = "|".join([] if piece.is_words else map(re.escape, MARKERS))
    return [_IDS[token] for token in re.findall("|".join(filter(None, [pattern, *units])), piece.text)]


def decode(ids: Sequence[int]) -> str:
    """For display: a control token `<s>` is written ⟨s⟩, so that it differs from the words that spell it."""
    tokens = [VOCABULARY[token] for token in ids]
    return "".join(f"⟨{token[1:-1]}⟩" if token in MARKERS else token for token in tokens).replace("\n", "\\n")


# --------------------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The examples that are trained, in order. What comes after the last gold of an example is of no account."""

    examples: tuple[tuple[Piece, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A row that must not be trained on, nor be left out in silence.

    Attributes:
        line: its line in the file, from 1.
        others: what may be trained where the trainer goes on without it and says so.
    """

    line: int
    others: tuple[tuple[Piece, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Same:
    """Two numbers, or two lists of them, that are to agree but for rounding.

    Attributes:
        examples: that are trained or evaluated.
        what: they are.
        tolerance: of the largest difference, relative to the largest number; float32.
    """

    examples: tuple[tuple[Piece, ...], ...]
    what: str
    tolerance: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hard case.

    Attributes:
        rows: of the training file.
        right: the answer.
        why: it is right.
        threads: where users of trainers met it.
        own: what is to be known of goldsmith's settings in it.
        policy: what the answer owes to a choice that TRL makes otherwise, knowingly.
        known: what TRL does with the published template that the case's is like.
        remedy: what of TRL's makes it right, or that nothing does.
        remedied: fields of the case that differ under the remedy, where it can be tried.
        measure: of a `Same`: `packing`, `accumulation` or `evaluation`.
        template: of chats; given to every trainer.
        end, pad: tokens of the tokenizer.
        merges: whether the tokenizer has its one merge.
        adds_beginning: whether the tokenizer puts `<s>` before every text.
        goldsmith: sections of the recipe -> settings, other than the defaults.
        trl: settings of `SFTConfig`, other than the defaults.
    """

    name: str
    title: str
    rows: tuple[Mapping[str, Any], ...]
    right: Trained | Refused | Same
    why: str
    threads: str = ""
    own: str = ""
    policy: str = ""
    known: str = ""
    remedy: str = ""
    remedied: Mapping[str, Any] = field(default_factory=dict)
    measure: str = ""
    template: str | None = None
    end: str = "</s>"
    pad: str = "<pad>"
    merges: bool = False
    adds_beginning: bool = False
    max_length: int | None = None
    goldsmith: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trl: Mapping[str, Any] = field(default_factory=dict)

    def ids_and_weights(self, pieces: Sequence[Piece]) -> tuple[list[int], list[float]]:
        """The example that the pieces make: its ids, and the weight of predicting each."""
        ids: list[int] = []
        weights: list[float] = []
        for piece in pieces:
            own = encode(piece, merges=self.merges)
            ids += own
            weights += [piece.weight] * len(own)
        return ids, weights

    def write(self, folder: Path) -> Path:
        """The training file."""
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        return path


# ------------------------------------------------------------------------------------------------------------- templates

_PROMPT: Final = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# As most models publish it.
CHATML: Final = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}" + _PROMPT
)
# With the marks that TRL masks by, for the cases that are about something else. Content may be null.
MARKED: Final = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | map(attribute='function') | map(attribute='name') | join(',') + "
    "'<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + ' ' + c.function.arguments | tojson + "
    "'</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}" + _PROMPT
)
# As Qwen3: reasoning is written for the turns after the last question only.
STRIPS_THINKING: Final = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}" + _PROMPT
)
# As DeepSeek R1: the server opens the reasoning, the conversation never shows it.
PREFILLS: Final = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ m.content + '</s>' }}"
    "{% endgeneration %}{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
# As GLM-4: what ends a turn is the marker of the next one.
NEXT_TURN_ENDS: Final = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' }}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ '<|user|>\\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# The same text but for its end, with the marker in the marks.
NEXT_TURN_MARKED: Final = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' }}{% generation %}{{ m.content + '<|user|>' }}"
    "{% endgeneration %}{% else %}{{ '<|user|>' if loop.first else '' }}{{ '\\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# Marks the assistant's turns whose weight is not 0.
MARKED_BY_WEIGHT: Final = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and m.weight != 0 %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}" + _PROMPT
)
# As Llama 3: the template writes the beginning token, and the tokenizer would add one.
WRITES_BEGINNING: Final = "{{ bos_token }}" + MARKED


def _turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def _call(**arguments: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "find", "arguments": arguments}}]


_TOOLS: Final = [
    {
        "type": "function",
        "function": {"name": "find", "description": "Finds it", "parameters": {"type": "object", "properties": {}}},
    }
]


def _asked(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


# ----------------------------------------------------------------------------------------------------------------- cases

_GOOD: Final = {"prompt": "Is it so? ", "completion": "Yes."}
_GOOD_EXAMPLE: Final = (context("Is it so? "), gold("Yes.</s>"))
_ANSWERS: Final = (
    ("Short?", "No"),
    ("Long?", "Well, that takes a while to say: here it is."),
    ("Then?", "That."),
)
_UNEVEN: Final = tuple(_chat(_turn("user", asked), _turn("assistant", answer)) for asked, answer in _ANSWERS)
_UNEVEN_EXAMPLES: Final = tuple((context(_asked(asked)), gold(f"{answer}<|im_end|>")) for asked, answer in _ANSWERS)

CASES: Final[tuple[Case, ...]] = (
    Case(
        name="all_gold_cut",
        title="`max_length` cuts off all gold",
        rows=(_GOOD, {"prompt": "A prompt that fills all the room there is: ", "completion": "Yes."}),
        max_length=30,
        right=Refused(line=2, others=(_GOOD_EXAMPLE,)),
        why="Nothing of the row could be learnt; whoever wrote it has to know.",
        threads="trl #6668, #6320, #6025, #3927, #1053",
        policy="TRL shows a progress bar for dropping such rows; whether there were any it does not say.",
        remedy="none that reports it; `max_length=None` cuts nothing",
    ),
    Case(
        name="gold_cut_in_the_middle",
        title="`max_length` cuts the gold in the middle",
        rows=(_GOOD, {"prompt": "How far? ", "completion": "A long answer that does not fit."}),
        max_length=30,
        right=Refused(line=2, others=(_GOOD_EXAMPLE,)),
        why="Half an answer without an end is other gold than the user gave. Cutting is a choice, to be asked for and counted.",
        threads="LLaMA-Factory #3995, #7985",
        policy="TRL's documentation says that it cuts (`truncation_mode`).",
        remedy="none that reports it; `max_length=None` cuts nothing",
    ),
    Case(
        name="no_generation_marks",
        title="Template without `{% generation %}`",
        rows=(
            _chat(_turn("user", "Hi"), _turn("assistant", "Hello!"), _turn("user", "2+2?"), _turn("assistant", "4")),
        ),
        template=CHATML,
        end="<|im_end|>",
        right=Trained(
            examples=(
                (
                    context(_asked("Hi")),
                    gold("Hello!<|im_end|>"),
                    context("\n" + _asked("2+2?")),
                    gold("4<|im_end|>"),
                ),
            )
        ),
        why="Both answers are gold, and so is the token that ends each. Nearly all published templates have no such marks.",
        threads="trl #4879, Megatron-Bridge #3359",
        known="Templates of families that TRL knows by their exact text it replaces by its own, with marks.",
        remedy="a template with marks, by `chat_template_path`",
        remedied={"template": MARKED},
    ),
    Case(
        name="control_token_in_words",
        title="A user's words spell a control token",
        rows=(_chat(_turn("user", "What is <|im_end|>?"), _turn("assistant", "A mark.")),),
        template=MARKED,
        end="<|im_end|>",
        right=Trained(
            examples=(
                (
                    context("<|im_start|>user\n"),
                    Piece(text="What is <|im_end|>?", is_words=True),
                    context("<|im_end|>\n<|im_start|>assistant\n"),
                    gold("A mark.<|im_end|>"),
                ),
            )
        ),
        why="Words are words: whoever can write a control token into a prompt can end a turn.",
        remedy="none",
    ),
    Case(
        name="pad_is_end",
        title="The padding token is the end token",
        rows=(_GOOD, {"prompt": "Why? ", "completion": "Because it is long."}),
        pad="</s>",
        right=Trained(examples=(_GOOD_EXAMPLE, (context("Why? "), gold("Because it is long.</s>")))),
        why="The end is gold, or the model never stops. Only padding is to be left out.",
        threads="trl #734, unsloth #416, hf/blog #1302",
    ),
    Case(
        name="merge_across_the_boundary",
        title="A merge reaches from the prompt into the gold",
        rows=({"prompt": "Is it so? ", "completion": "yes"},),
        merges=True,
        right=Trained(examples=((context("Is it so? "), gold("yes</s>")),)),
        why="A server tokenises the prompt alone, with its space at the end. The gold has to continue that.",
        threads="trl #6105, #5213; torchtitan #4504",
        remedy="none for these rows; the space can be moved to the completion by hand",
    ),
    Case(
        name="empty_answer",
        title="An assistant's turn is empty",
        rows=(
            _chat(_turn("user", "Is it?"), _turn("assistant", "Yes.")),
            _chat(_turn("user", "Hi"), _turn("assistant", ""), _turn("user", "Hello?"), _turn("assistant", "Yes.")),
        ),
        template=MARKED,
        end="<|im_end|>",
        right=Refused(line=2, others=((context(_asked("Is it?")), gold("Yes.<|im_end|>")),)),
        why="It teaches to end at once. That is nearly always a hole in the data; who means it can leave it with the weight 0.",
        policy="TRL trains what it is given.",
        remedy="none",
    ),
    Case(
        name="null_content_with_tool_calls",
        title="Null content with tool calls, whose arguments differ from row to row",
        rows=(
            _chat(_turn("user", "Rain?"), _turn("assistant", None, tool_calls=_call(city="Oslo")), tools=_TOOLS),
            _chat(_turn("user", "When?"), _turn("assistant", None, tool_calls=_call(day="Monday")), tools=_TOOLS),
        ),
        template=MARKED,
        end="<|im_end|>",
        right=Trained(
            examples=tuple(
                (
                    context("<|im_start|>system\nfind<|im_end|>\n" + _asked(question)),
                    gold(f"<tool_call>find {arguments}</tool_call><|im_end|>"),
                )
                for question, arguments in (("Rain?", '{"city": "Oslo"}'), ("When?", '{"day": "Monday"}'))
            )
        ),
        why="The call is the gold, with the arguments of its own row and no others.",
        threads="datasets #7322",
    ),
    Case(
        name="last_turn_is_the_users",
        title="The last turn is the user's",
        rows=(_chat(_turn("user", "Hi"), _turn("assistant", "Hello!"), _turn("user", "Bye")),),
        template=MARKED,
        end="<|im_end|>",
        right=Trained(examples=((context(_asked("Hi")), gold("Hello!<|im_end|>")),)),
        why="The answer is gold; what the user says after it is not.",
    ),
    Case(
        name="doubled_beginning",
        title="Template and tokenizer both write the beginning token",
        rows=(_chat(_turn("user", "Hi"), _turn("assistant", "Hello!")),),
        template=WRITES_BEGINNING,
        end="<|im_end|>",
        adds_beginning=True,
        right=Trained(examples=((context("<s>" + _asked("Hi")), gold("Hello!<|im_end|>")),)),
        why="One beginning token, as a server has it.",
        threads="OpenRLHF #393, lm-evaluation-harness #3333",
    ),
    Case(
        name="rendered_beforehand",
        title="Prompt and completion were rendered beforehand, with their beginning and end tokens",
        rows=({"prompt": "<s>" + _asked("Hi"), "completion": "Hello!<|im_end|>"},),
        end="<|im_end|>",
        adds_beginning=True,
        goldsmith={"rendering": {"allow_control_tokens": "all"}},
        right=Trained(examples=((context("<s>" + _asked("Hi")), gold("Hello!<|im_end|>")),)),
        why="The tokens are there already, and are not to be added again.",
        own="By default goldsmith takes the markers for words, since nobody's words may spell them; `goldsmith inspect` "
        "counts such rows.",
        threads="OpenRLHF #393, unsloth #10312",
        remedy="a tokenizer without a beginning token of its own, or text without it",
    ),
    Case(
        name="thinking_stripped_from_history",
        title="The template strips reasoning from earlier turns (Qwen3)",
        rows=(
            _chat(
                _turn("user", "Hi"),
                _turn("assistant", "Hello!", reasoning_content="A greeting."),
                _turn("user", "2+2?"),
                _turn("assistant", "4", reasoning_content="Sum."),
            ),
        ),
        template=STRIPS_THINKING,
        end="<|im_end|>",
        right=Trained(
            examples=(
                (context(_asked("Hi")), gold("<think>\nA greeting.\n</think>\n\nHello!<|im_end|>")),
                (
                    context(_asked("Hi") + "Hello!<|im_end|>\n" + _asked("2+2?")),
                    gold("<think>\nSum.\n</think>\n\n4<|im_end|>"),
                ),
            )
        ),
        why="A server is asked for each turn in turn: the first with its reasoning, the second after a history "
        "without it. No one text holds both, so they are two examples.",
        threads="ms-swift #4939; trl #6363, #6361; LLaMA-Factory #10773",
        known="For Qwen3's own template, without marks, TRL puts in another, which writes the reasoning of every turn: the gold is "
        "whole, but the second turn is trained after a history that a server does not give.",
        remedy="the turns expanded by hand to rows of `prompt` and `completion`, with `assistant_only_loss=True`",
        remedied={
            "rows": (
                {
                    "prompt": [_turn("user", "Hi")],
                    "completion": [_turn("assistant", "Hello!", reasoning_content="A greeting.")],
                },
                {
                    "prompt": [
                        _turn("user", "Hi"),
                        _turn("assistant", "Hello!", reasoning_content="A greeting."),
                        _turn("user", "2+2?"),
                    ],
                    "completion": [_turn("assistant", "4", reasoning_content="Sum.")],
                },
            ),
            "trl": {"assistant_only_loss": True},
        },
    ),
    Case(
        name="prefilled_think",
        title="The server opens `<think>`, the gold has no reasoning (DeepSeek R1)",
        rows=(_chat(_turn("user", "Hi"), _turn("assistant", "Hello!")),),
        template=PREFILLS,
        right=Refused(line=1),
        why="The model will always be asked to go on after `<think>`, and would be trained after something else.",
        threads="ms-swift #4939",
        known="The template that TRL puts in for DeepSeek R1's own, which has no marks, does the same.",
        remedy="none for `messages`; a row of `prompt` and `completion` instead",
        remedied={"rows": ({"prompt": [_turn("user", "Hi")], "completion": [_turn("assistant", "Hello!")]},)},
    ),
    Case(
        name="next_turn_ends_the_turn",
        title="The marker of the next turn is what ends a turn (GLM)",
        rows=(
            _chat(_turn("user", "Hi"), _turn("assistant", "Hello!"), _turn("user", "2+2?"), _turn("assistant", "4")),
        ),
        template=NEXT_TURN_ENDS,
        right=Trained(
            examples=(
                (
                    context("<|user|>\nHi<|assistant|>\n"),
                    gold("Hello!<|user|>"),
                    context("\n2+2?<|assistant|>\n"),
                    gold("4<|user|>"),
                ),
            )
        ),
        why="A model that never learns to write that marker never stops.",
        threads="trl #5988, #3299",
        known="For GLM-4-MoE's own template, without marks, TRL puts in another that does.",
        remedy="a template written anew, which puts the next turn's marker into the marks",
        remedied={"template": NEXT_TURN_MARKED},
    ),
    Case(
        name="packed_rows_see_each_other",
        title="Rows packed together",
        rows=_UNEVEN,
        template=MARKED,
        end="<|im_end|>",
        measure="packing",
        max_length=256,
        trl={"packing": True},
        right=Same(examples=_UNEVEN_EXAMPLES, what="log-probabilities of the gold: packed, and each row alone"),
        why="Rows do not see each other.",
        threads="trl #3728, #3067, #1230; transformers #46634; torchtune #875",
    ),
    Case(
        name="uneven_accumulation",
        title="Gradient accumulation over rows with uneven gold",
        rows=_UNEVEN,
        template=MARKED,
        end="<|im_end|>",
        measure="accumulation",
        right=Same(
            examples=_UNEVEN_EXAMPLES, what="gradient of a step: a row at a time, and the whole at once by a plain loop"
        ),
        why="Every gold token counts the same, however the step is cut.",
        threads="transformers #34191 and others; unsloth #1146; LLaMA-Factory #7443",
    ),
    Case(
        name="evaluation_batches",
        title="Batch size of the evaluation",
        rows=_UNEVEN,
        template=MARKED,
        end="<|im_end|>",
        measure="evaluation",
        right=Same(
            examples=_UNEVEN_EXAMPLES,
            what="loss of held-out gold in batches of 1, 2 and 3 rows, and the mean over its tokens by a plain loop",
        ),
        why="The loss is a property of model and data.",
        threads="transformers #39241, #24839, #41898",
        remedy="none; with one batch over all rows it is right",
    ),
    Case(
        name="weights",
        title="An answer has the weight 0, and a row the weight 2",
        rows=(
            _chat(
                _turn("user", "Hi", weight=None),
                _turn("assistant", "Go away.", weight=0),
                _turn("user", "Hello?", weight=None),
                _turn("assistant", "Yes.", weight=None),
            ),
            _chat(_turn("user", "Is it?"), _turn("assistant", "Yes."), weight=2.0),
        ),
        template=MARKED,
        end="<|im_end|>",
        right=Trained(
            examples=(
                (context(_asked("Hi") + "Go away.<|im_end|>\n" + _asked("Hello?")), gold("Yes.<|im_end|>")),
                (context(_asked("Is it?")), gold("Yes.<|im_end|>", 2.0)),
            )
        ),
        why="A bad answer is there to be seen, and not to be learnt. The other row counts twice.",
        threads="trl #5761, #5951, #5952, #6746",
        policy="TRL has no weights, and passes over columns and keys that it does not know.",
        remedy="for the message, a template written anew that marks by the weight; for the row, none",
        remedied={"template": MARKED_BY_WEIGHT},
    ),
    Case(
        name="another_format_in_the_middle",
        title="A row of another format in the middle of a file",
        rows=(_GOOD, _GOOD, _chat(_turn("user", "Hi"), _turn("assistant", "Hello!")), _GOOD),
        template=MARKED,
        right=Refused(line=3, others=(_GOOD_EXAMPLE,) * 3),
        why="The row is a mistake, and has a place. All others are good.",
        threads="axolotl #3303, datasets #5454",
    ),
    Case(
        name="null_prompt",
        title="A prompt is null",
        rows=(_GOOD, {"prompt": None, "completion": "Yes."}, _GOOD),
        right=Refused(line=2, others=(_GOOD_EXAMPLE,) * 2),
        why="A hole in the data is no empty prompt; the row has a place.",
        threads="LLaMA-Factory #2424",
    ),
)


# ------------------------------------------------------------------------- what both environments build: tokenizer and model


def make_tokenizer(case: Case) -> Any:
    """The case's tokenizer, as `transformers` has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab=dict(_IDS), merges=[MERGE] if case.merges else []))
    backend.decoder = decoders.Fuse()
    backend.add_tokens(
        [AddedToken(token, special=is_special, normalized=False) for token, is_special in MARKERS.items()]
    )
    if case.adds_beginning:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", _IDS["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if case.adds_beginning else None,
        eos_token=case.end,
        pad_token=case.pad,
        chat_template=case.template,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> Any:
    """A Llama of two layers, the same weights for every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=_IDS["<|im_end|>"],
        pad_token_id=_IDS["<pad>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LlamaForCausalLM(config).eval()


def plain_rows(case: Case) -> list[tuple[list[int], list[float]]]:
    """Ids and weights of the examples of a `Same`."""
    assert isinstance(case.right, Same)
    return [case.ids_and_weights(pieces) for pieces in case.right.examples]


def plain_log_probs(model: Any, ids: Sequence[int], weights: Sequence[float]) -> Any:
    """[gold tokens]: the log-probability of each, of one row by itself and nothing else."""
    import torch

    logits = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1]
    found = torch.log_softmax(logits, dim=-1)[torch.arange(len(ids) - 1), torch.tensor(list(ids[1:]))]
    return found[torch.tensor([weight > 0 for weight in weights[1:]])]


def plain_loss(model: Any, case: Case) -> Any:
    """The mean of -log P over all gold of the case: what training minimises and evaluation reports."""
    import torch

    return -torch.cat([plain_log_probs(model, ids, weights) for ids, weights in plain_rows(case)]).mean()


def plain_gradient(model: Any, case: Case) -> Any:
    """[parameters]: of `plain_loss`, all in one row."""
    import torch

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(plain_loss(model, case), parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])


def difference(found: Any, truth: Any) -> float:
    """The largest, relative to the largest number of the truth."""
    return float((found - truth).abs().max() / truth.abs().max())
