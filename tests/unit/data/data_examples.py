"""Small tokenizers built in code, conversations, and chat templates written for these tests."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from goldsmith.data.tokenizer import TrainedTokenizerConfig, train_tokenizer
from goldsmith.types import Conversation, Message

TEXTS = [
    "Once upon a time there was a little girl named Lily. She loved to play outside.",
    "What is 2 + 2? It is 4. Hello! Hi there, how are you? New York is a city.",
    "user assistant system\nYou are kind.\n\n### The end of it: ASSISTANT USER (hm) [x] {y} 0123456789",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Renders the beginning token itself, trims, and ends its header with a blank line.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}"
)
# Puts an empty reasoning block before the last answer only, as reasoning models' templates do.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Opens the reasoning in the generation prompt, and never writes it into the conversation: cannot be trained on.
OPENS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The next turn's header ends the assistant's turn; nothing stands behind the last one.
NO_END_OF_TURN = (
    "{% for m in messages %}<|start|>{{ m.role }}<|header|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|header|>{% endif %}"
)
# No control token anywhere: what ends a turn is a line that begins with a name.
MERE_TEXT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
MARKERS = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|header|>", "<|eot|>")


def learnt(kind: str, **settings: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of `TEXTS` with the markers of the templates above."""
    if kind in ("bpe", "unigram"):
        settings.setdefault("vocab_size", 340)
    config = TrainedTokenizerConfig.model_validate({"kind": kind, "special_tokens": MARKERS, **settings})
    return train_tokenizer(config, TEXTS)


def prepending_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece BPE in Hugging Face form: a word mark before every text, `<s>` in front, bytes for unknown text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    # The byte tokens are ordinary ones, not special.
    built = Tokenizer(
        models.BPE(
            vocab=tokenizer.get_vocab(),
            merges=_merges(tokenizer),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    built.normalizer, built.decoder = tokenizer.normalizer, tokenizer.decoder
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", built.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def plain(prompt: str, completion: str, **fields: Any) -> Conversation:
    return Conversation(
        messages=(Message(role="user", content=prompt), Message(role="assistant", content=completion)),
        **{"example_id": "row:0", "source": "row.jsonl:1", **fields},
    )


def chat(*turns: tuple[str, str] | tuple[str, str, float], **fields: Any) -> Conversation:
    messages = tuple(
        Message(role=turn[0], content=turn[1], weight=turn[2] if len(turn) == 3 else 1.0)  # type: ignore[misc]
        for turn in turns
    )
    return Conversation(messages=messages, is_chat=True, **{"example_id": "row:0", "source": "row.jsonl:1", **fields})
