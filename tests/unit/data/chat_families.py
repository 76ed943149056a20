"""The published chat templates, small tokenizers with each family's control tokens, and conversations of every kind.

The templates lie beside the repository (`shared/data/chat_templates`), not in it; `glm` and `generation` are written here.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from goldsmith.types import Conversation, Message

FOLDER = Path(__file__).resolve().parents[4] / "shared" / "data" / "chat_templates"

# As GLM-4-MoE does it: a turn has no end of its own, the next role's marker stops it; reasoning is dropped from the history.
GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>\n{{ m.content }}"
    "{% elif m.role == 'system' %}<|system|>\n{{ m.content }}"
    "{% elif m.role == 'tool' %}<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|assistant|>\n"
    "{% if loop.index0 > ns.last and m.reasoning_content %}<think>{{ m.reasoning_content.strip() }}</think>\n"
    "{% else %}<think></think>\n{% endif %}"
    "{{ m.content.strip() }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}\n"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n{% endfor %}"
    "</tool_call>{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# With generation marks, which are of no use here and in nobody's way.
GENERATION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WRITTEN_HERE = {"glm": GLM, "generation": GENERATION}
PUBLISHED = (
    "cohere", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "gemma4", "gptoss", "lfm2", "llama3", "llama3_1", "llama3_2",
    "nemotron_3_super", "phi3", "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_instruct_2507",
)  # fmt: skip
FAMILIES = (*PUBLISHED, *WRITTEN_HERE)

# Beginning and end of the published tokenizers; None where the family has no beginning token.
BEGINNING = {
    "cohere": "<BOS_TOKEN>", "deepseek_r1_distill": "<｜begin▁of▁sentence｜>", "deepseekv3": "<｜begin▁of▁sentence｜>",
    "gemma": "<bos>", "gemma3": "<bos>", "gemma4": "<bos>", "lfm2": "<|startoftext|>", "llama3": "<|begin_of_text|>",
    "llama3_1": "<|begin_of_text|>", "llama3_2": "<|begin_of_text|>", "generation": "<s>",
}  # fmt: skip
END = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek_r1_distill": "<｜end▁of▁sentence｜>", "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<eos>", "gemma3": "<eos>", "gemma4": "<eos>", "gptoss": "<|return|>", "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>", "phi3": "<|endoftext|>", "glm": "<|endoftext|>", "generation": "</s>",
}  # fmt: skip
# What ends an assistant's turn: of words, and of tool calls where that is another.
TURN_ENDS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"], "deepseek_r1_distill": ["<｜end▁of▁sentence｜>"],
    "deepseekv3": ["<｜end▁of▁sentence｜>"], "gemma": ["<end_of_turn>"], "gemma3": ["<end_of_turn>"],
    "gemma4": ["<turn|>", "<|tool_response>"], "gptoss": ["<|return|>", "<|call|>"], "llama3": ["<|eot_id|>"],
    "llama3_1": ["<|eot_id|>"], "llama3_2": ["<|eot_id|>"], "phi3": ["<|end|>"], "glm": ["<|user|>", "<|observation|>"],
    "generation": ["<|end|>"],
}  # fmt: skip
IM_END = ["<|im_end|>"]

TEXT = (
    "user\nWhat is 2 + 2?\nassistant\nIt is 4.\nmodel\nHello!\nsystem\nYou are kind.\n\nHello! Hi there, how are you? "
    '{"city": "Paris"} {"name": "weather", "arguments": {}} 18 degrees think call tool_response im_end INST\n'
)


@functools.cache
def template(family: str) -> str:
    return WRITTEN_HERE.get(family) or (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")


@functools.cache
def markers(family: str) -> tuple[str, ...]:
    """Control tokens: what a template writes like one, and those that it makes of pieces."""
    text = template(family)
    found = set(re.findall(r"<[^<>\s'\"{}%=/-]{1,40}>|</?think>|</tool_call>|</tool_response>|\[gMASK\]", text))
    found |= {"<|user|>", "<|system|>", "<|tool|>"} if family == "generation" else set()
    found |= {'<|"|>'} if family == "gemma4" else set()
    found |= {"<|im_start|>", "<|im_end|>"} if "im_start" in text else set()
    found |= {"<think>", "</think>"} if "think>" in text else set()
    return tuple(sorted(found | {"[INST]", END.get(family, "<|im_end|>")} | {BEGINNING.get(family, "[INST]")}))


@functools.cache
def family_tokenizer(family: str, kind: str) -> PreTrainedTokenizerFast:
    """`byte`: byte-level BPE; `metaspace`: BPE with a mark for the space, and bytes for the unknown; `plain`: one a character.

    The merges of the first two reach over lines and words, so that they cross the edge between a prompt and its answer.
    """
    names = markers(family)
    backend = Tokenizer.from_str(_backend(kind))
    # As published: turn markers are special, those of reasoning and tools often are not.
    for name in names:
        is_special = not any(word in name for word in ("think", "tool_", "arg_"))
        backend.add_tokens([AddedToken(name, special=is_special, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGINNING.get(family),
        eos_token=END.get(family, "<|im_end|>"),
        unk_token="<unk>" if kind != "byte" else None,
        chat_template=template(family),
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def _backend(kind: str) -> str:
    if kind == "plain":
        characters = {chr(code): index for index, code in enumerate([10, *range(32, 127)])}
        tokenizer = Tokenizer(models.WordLevel({**characters, "<unk>": len(characters)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
    elif kind == "byte":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=alphabet, show_progress=False, max_token_length=12
        )
        tokenizer.train_from_iterator(_crossing_texts(), trainer)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=520, special_tokens=["<unk>", *bytes_], show_progress=False, max_token_length=12
        )
        tokenizer.train_from_iterator(_crossing_texts(), trainer)
        # The byte tokens are ordinary ones, not added.
        parts = json.loads(tokenizer.to_str())
        parts["added_tokens"] = parts["added_tokens"][:1]
        tokenizer = Tokenizer.from_str(json.dumps(parts))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return str(tokenizer.to_str())


def _crossing_texts() -> list[str]:
    return [line + "\n" + other for line in TEXT.splitlines() for other in TEXT.splitlines()] * 2


def asked(*messages: Message, **fields: Any) -> Conversation:
    return Conversation(messages=messages, is_chat=True, **{"example_id": "row:0", "source": "row.jsonl:1", **fields})


def says(role: str, content: str, **fields: Any) -> Message:
    return Message(role=role, content=content, **fields)


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "which"}},
                "required": ["city"],
            },
        },
    },
)


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": arguments}}


def conversations(family: str) -> dict[str, Conversation]:
    """Of every kind, by name."""
    text_calls = family.startswith("deepseek")  # which wants the arguments as text
    arguments = call(city="Paris")
    if text_calls:
        arguments = {**arguments, "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    return {
        "plain": asked(
            says("user", "Hi there"),
            says("assistant", "Hello!"),
            says("user", "What is 2 + 2?"),
            says("assistant", "It is 4."),
        ),
        "system": asked(says("system", "You are kind."), says("user", "Hi"), says("assistant", "Hello!")),
        "thinking": asked(
            says("user", "Hi there"),
            says("assistant", "Hello!", reasoning="A greeting."),
            says("user", "What is 2 + 2?"),
            says("assistant", "It is 4.", reasoning="2 + 2 = 4"),
        ),
        "tools": asked(
            says("user", "Weather in Paris?"),
            says("assistant", "", tool_calls=(arguments,)),
            says("tool", "18 degrees", name="weather", tool_call_id="c1"),
            says("assistant", "It is 18 degrees."),
            tools=TOOLS,
        ),
    }


def as_given(message: Message) -> dict[str, Any]:
    """As a user of `transformers` writes it."""
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        shown["reasoning_content"] = message.reasoning
    if message.tool_calls:
        shown["tool_calls"] = list(message.tool_calls)
    if message.name is not None:
        shown["name"] = message.name
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    return shown
