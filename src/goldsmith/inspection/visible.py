"""Text of the data as a person may safely see it: what a terminal or a page would obey or hide is written out."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from transformers import PreTrainedTokenizerBase

__all__ = ["HIDDEN", "near", "token_texts", "visible"]

# Control characters but for tab and line ends, marks that turn the direction of text, and those of no width. Joiners (U+200C,
# U+200D) and the marks of a script's direction (U+200E, U+200F) are part of ordinary text in several scripts.
HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡"}


def visible(text: str) -> str:
    """Every character that does not show, or that acts on what shows it, in a form that shows.

    >>> visible("a\\nb\\x1b[31m \\u202e")
    'a↵b␛[31m ‹U+202E›'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def near(text: str) -> str:
    """Absolute paths in a text, those that lie below the current directory, as they are from there.

    >>> near(f"as {Path.cwd()}/data/train.jsonl:3, /elsewhere/train.jsonl:4")
    'as data/train.jsonl:3, /elsewhere/train.jsonl:4'
    """
    folder = Path.cwd().as_posix()
    if folder == "/" or folder not in text:
        return text
    return re.sub(rf"(?<![\w.~/-]){re.escape(folder)}/", "", text)


def _shown(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    code = ord(character)
    if code < 32:
        return chr(0x2400 + code)
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"‹U+{code:04X}›"
    return character


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[str]:
    """The text that each token stands for, with the space in front that decoding it alone would take off."""
    added = tokenizer.added_tokens_decoder
    texts = []
    for token_id, token in zip(token_ids, tokenizer.convert_ids_to_tokens(token_ids), strict=True):
        if token is None:
            texts.append(f"<id {token_id}>")  # beyond the tokenizer: the model's vocabulary is larger
        elif token_id in added:
            texts.append(str(token))
        elif "▁" in token:
            texts.append(token.replace("▁", " "))
        else:
            texts.append(str(tokenizer.convert_tokens_to_string([token])) or str(token))
    return texts
