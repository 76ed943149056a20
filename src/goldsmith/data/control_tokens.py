"""Control tokens: which there are, and how to keep what a user writes from becoming one.

A tokenizer reads `<|im_end|>` as its control token wherever it stands. Here words that spell one are *masked* before the
template sees them, letter for letter, with private-use characters; so it is known afterwards which of them the template wrote.
Those are *coded* as one private-use character each, and the words unmasked again. `Encoder.coded` reads that notation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from goldsmith.data.rendering_config import RenderingConfig, template_text
from goldsmith.data.tokenizer import words_of
from goldsmith.errors import ConfigError

__all__ = ["LOCATED", "ControlTokens", "Notation", "add_control_tokens", "template_control_tokens"]

# Planes 15 and 16 of Unicode are for private use, and no text of a data set is in them.
_CODES: Final = 0xF0000
_MASKS: Final = 0x100000
_PRIVATE: Final = re.compile("[\U000f0000-\U0010ffff]")
# Stands for every character of a message whose place is sought.
LOCATED: Final = "\U0010fffd"
# Left as they are within a mask, since JSON would write them otherwise.
_UNMASKED: Final = '"\\'


class Notation:
    """How the control tokens of a text are written: as they are, or coded.

    Attributes:
        is_coded: whether as one private-use character each; then all else is text.
        pattern: finds them.
    """

    def __init__(self, controls: ControlTokens, *, is_coded: bool) -> None:
        self._controls = controls
        self.is_coded = is_coded
        self.pattern = re.compile(f"[\U000f0000-{chr(_MASKS - 1)}]") if is_coded else controls.pattern

    def write(self, text: str) -> str:
        """A text of the template, whose words are masked if they have to be, in this notation."""
        return self._controls.unmask(self._controls.code(text)) if self.is_coded else text

    def write_code(self, text: str) -> str:
        """As `write`, but what is masked stays so."""
        return self._controls.code(text) if self.is_coded else text

    def read(self, text: str) -> str:
        """The text as a person writes it."""
        return self._controls.decode(text) if self.is_coded else text

    def token_id(self, found: str) -> int:
        """Of what `pattern` found."""
        return self._controls.ids[self._controls.names[ord(found) - _CODES] if self.is_coded else found]


class ControlTokens:
    """All added tokens of a tokenizer, special or not, but those of white space alone (which some use to indent) and its words.

    Attributes:
        ids: by text.
        names: in the order of their codes.
        pattern: finds them in a text, the longest where several begin.
        raw, coded: the notations.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {str(token): int(index) for index, token in tokenizer.added_tokens_decoder.items()}
        words = words_of(tokenizer)
        self.ids: dict[str, int] = {
            token: index for token, index in added.items() if token.strip() and token not in words
        }
        self.id_set = frozenset(self.ids.values())
        self.names = sorted(self.ids)
        self._codes = {token: chr(_CODES + index) for index, token in enumerate(self.names)}
        self.pattern = re.compile(_trie(self.names))
        characters = sorted({character for token in self.names for character in token} - set(_UNMASKED))
        self._to_mask = {ord(character): _MASKS + index for index, character in enumerate(characters)}
        self._from_mask = {mask: character for character, mask in self._to_mask.items()}
        # Some tokens are looked for in the normalised text, where other words may have become one.
        self._normalizer = None
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            self._normalizer = tokenizer.backend_tokenizer.normalizer
        normalised = [
            token for token in tokenizer.added_tokens_decoder.values() if token.normalized and str(token) in self.ids
        ]
        if self._normalizer is not None and normalised:
            names = (self._normalizer.normalize_str(str(token)).strip("▁ ") for token in normalised)
            self._normalised_pattern = re.compile(_trie(name for name in names if name))
        else:
            self._normalizer = None
        self.raw = Notation(self, is_coded=False)
        self.coded = Notation(self, is_coded=True)

    def spelt_in(self, text: str) -> set[str]:
        """The control tokens that the text spells, as it stands or once it is normalised."""
        found = set(self.pattern.findall(text))
        if self._normalizer is not None:
            found |= set(self._normalised_pattern.findall(self._normalizer.normalize_str(text)))
        return found

    def spells(self, text: str) -> bool:
        """Whether it spells any."""
        if self.pattern.search(text) is not None:
            return True
        if self._normalizer is None:
            return False
        return self._normalised_pattern.search(self._normalizer.normalize_str(text)) is not None

    def mask(self, text: str, *, keep: Iterable[str] = ()) -> str:
        """The text with every control token in it but `keep` written in private-use characters, one for one."""
        kept = set(keep)
        return self.pattern.sub(
            lambda found: found.group() if found.group() in kept else found.group().translate(self._to_mask), text
        )

    def mask_all(self, value: Any) -> Any:
        """As `mask`, for every string in a structure as JSON has them, keys too."""
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, Mapping):
            return {self.mask(str(key)): self.mask_all(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mask_all(item) for item in value]
        return value

    def unmask(self, text: str) -> str:
        return text.translate(self._from_mask)

    def code(self, text: str) -> str:
        """The text with every control token that is not masked written as its code."""
        return self.pattern.sub(lambda found: self._codes[found.group()], text)

    def code_with_places(self, text: str) -> tuple[str, list[int]]:
        """As `code`; and for each character of it, and its end, where it begins in `text`."""
        coded: list[str] = []
        places: list[int] = []
        begin = 0
        for found in self.pattern.finditer(text):
            coded += [text[begin : found.start()], self._codes[found.group()]]
            places += range(begin, found.start() + 1)
            begin = found.end()
        return "".join([*coded, text[begin:]]), [*places, *range(begin, len(text) + 1)]

    def decode(self, text: str) -> str:
        """The text with codes written out."""
        return self.unmask(text).translate({_CODES + index: name for index, name in enumerate(self.names)})

    def code_of(self, name: str) -> str:
        return self._codes[name]


def is_private(text: str) -> bool:
    """Whether the text holds characters of those that masks and codes are written in."""
    return _PRIVATE.search(text) is not None


def strings_in(value: Any) -> Iterable[str]:
    """Every string in a structure as JSON has them, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_in(item)


def template_control_tokens(text: str) -> list[str]:
    """The markers that a template writes as `<|...|>` (or with the wide bars of some families), as they stand in it."""
    return sorted(set(re.findall(r"<\|[^\s|<>'\"{}]{1,60}\|>|<｜[^\s｜<>'\"{}]{1,60}｜>", text)))


def add_control_tokens(tokenizer: PreTrainedTokenizerBase, config: RenderingConfig) -> list[str]:
    """Give a tokenizer the template of the recipe, and the control tokens that it needs; both are saved with it.

    Args:
        tokenizer: is changed, where `config.chat_template` is set.
        config: its `chat_template`, and `control_tokens` for markers that are not written as `<|...|>` in the template.

    Returns:
        The tokens that the vocabulary did not have, in the order of their new ids: the rows that a model's embedding lacks.

    Raises:
        ConfigError: the template cannot be read, or one of its control tokens is not to be had, or a word of texts.
    """
    text = template_text(config)
    if text is None:
        return []
    known = tokenizer.get_vocab()
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    wanted = list(dict.fromkeys([*template_control_tokens(text), *config.control_tokens]))
    for token in wanted:
        if token in words_of(tokenizer):
            raise ConfigError(
                f"model.new_tokens: {token!r} is a control token of the chat template, and no word of a text",
                remedy="take it out of model.new_tokens; what the template needs is added by itself",
            )
    missing = [token for token in wanted if token not in added]
    # One that is in the vocabulary without being a token of its own keeps its id.
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    now = tokenizer.get_vocab()
    lost = [token for token in missing if token not in now]
    if lost:
        raise ConfigError(
            f"the tokenizer does not take the control token {lost[0]!r}",
            remedy="choose another in rendering.control_tokens",
        )
    tokenizer.chat_template = text
    return sorted((token for token in missing if token not in known), key=lambda token: now[token])


def _trie(words: Iterable[str]) -> str:
    """A pattern for any of the words, the longest where several begin; it looks at a character once, however many there are."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return _alternatives(root) if root else "(?!)"


def _alternatives(node: dict[str, Any]) -> str:
    prefix = ""
    while len(node) == 1 and "" not in node:
        [(character, node)] = node.items()
        prefix += re.escape(character)
    branches = [re.escape(character) + _alternatives(below) for character, below in node.items() if character]
    if not branches:
        return prefix
    return f"{prefix}(?:{'|'.join(branches)}){'?' if '' in node else ''}"
