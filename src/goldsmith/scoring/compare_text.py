"""How a comparison of two models reads in a terminal."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from goldsmith.scoring.display import text_table

if TYPE_CHECKING:
    from goldsmith.scoring.compare import Comparison

__all__ = ["plural", "render_comparison", "row_lines", "shortened"]

_SHOWN_TOKENS = 24
_FEW_EXAMPLES = 20


def render_comparison(comparison: Comparison) -> str:
    paragraphs = [_heading(comparison)]
    if comparison.num_shared == 1:
        paragraphs += [text_table(_rows_of_one(comparison)), _verdict_of_one(comparison)]
    else:
        paragraphs += [
            text_table(_rows_of_many(comparison)),
            _counts(comparison),
            *_groups(comparison),
            *_largest(comparison),
            _tokens(comparison),
            _kinds(comparison),
            _verdict_of_many(comparison),
        ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _heading(comparison: Comparison) -> str:
    name_a, name_b = comparison.names
    lines = [f"{name_a} and {name_b} on {plural(comparison.num_shared, 'example')} of the same gold"]
    if comparison.num_shared == 1:
        lines[0] = f"{name_a} and {name_b} on the gold of {comparison.pairs[0].example_id!r}"
    lines += row_lines(comparison)
    num_other_gold = sum(not pair.has_same_length for pair in comparison.pairs)
    if num_other_gold:
        lines.append(f"careful: the gold differs in byte length on {plural(num_other_gold, 'example')}")
    if comparison.num_other_contexts:
        lines.append(
            f"careful: the context differs on {plural(comparison.num_other_contexts, 'example')}: "
            "the rows were rendered otherwise (a separator, a chat template); --rendering RUN gives all the same"
        )
    if comparison.num_differently_tokenized:
        lines.append(
            f"the gold is tokenised differently on {plural(comparison.num_differently_tokenized, 'example')}: "
            "compared in nats per example and bits per byte, never per token"
        )
    return "\n".join(lines)


def row_lines(comparison: Comparison) -> list[str]:
    """What was done to the rows, and what is left out."""
    lines, (name_a, name_b) = list(comparison.notes), comparison.names
    if comparison.num_only_a or comparison.num_only_b:
        lines.append(
            f"left out: {plural(comparison.num_only_a, 'example')} only in {name_a}, "
            f"{comparison.num_only_b:,} only in {name_b}"
        )
    return lines


def _rows_of_one(comparison: Comparison) -> list[list[str]]:
    rows = [["", *comparison.names]]
    tokens = list(comparison.tokens)
    if len(tokens) > _SHOWN_TOKENS:
        by_difference = sorted(tokens, key=lambda token: -abs(token.difference))
        rows[0][0] = f"the {_SHOWN_TOKENS} of {len(tokens):,} tokens that differ most"
        tokens = sorted(by_difference[:_SHOWN_TOKENS], key=lambda token: token.position)
    for token in tokens:
        label = f"P(token {token.position})" + (f"  {token.text!r}" if token.text else "")
        rows.append([label, *map(_probability, token.log_probs)])
    (log_a, log_b), mean_nll, bits = comparison.log_probs, comparison.mean_nll, comparison.bits_per_byte
    rows.append(["P(gold), their product" if len(rows) > 1 else "P(gold)", _probability(log_a), _probability(log_b)])
    rows.append(["log P(gold)", f"{log_a:.4f}", f"{log_b:.4f}"])
    if mean_nll is not None:
        rows.append(["mean nll per token", f"{mean_nll[0]:.4f}", f"{mean_nll[1]:.4f}"])
    if bits is not None:
        rows.append(["bits per byte", f"{bits[0]:.4f}", f"{bits[1]:.4f}"])
    return rows


def _verdict_of_one(comparison: Comparison) -> str:
    pair, (name_a, name_b) = comparison.pairs[0], comparison.names
    if comparison.higher is None:
        return f"{name_a} and {name_b} give the gold the same likelihood (within {comparison.tie_tolerance:g} nats)."
    factor = _factor(abs(pair.difference))
    sentence = f"{comparison.higher} gives the gold the higher likelihood, {factor} times that of {_other(comparison)}"
    if any(comparison.comebacks) and pair.start_log_probs is not None:
        low, high = map(_probability, sorted(pair.start_log_probs))
        sentence += f", though {_other(comparison)} starts better ({high} against {low} on the first token)"
    return sentence + "."


def _rows_of_many(comparison: Comparison) -> list[list[str]]:
    name_a, name_b = comparison.names
    (log_a, log_b), size = comparison.log_probs, comparison.num_shared
    rows = [["", name_a, name_b, f"{name_a} - {name_b}"]]
    rows.append(["log P, total", f"{log_a:,.2f}", f"{log_b:,.2f}", f"{log_a - log_b:+,.2f}"])
    mean_a, mean_b = log_a / size, log_b / size
    rows.append(["log P per example", f"{mean_a:,.4f}", f"{mean_b:,.4f}", f"{mean_a - mean_b:+,.4f}"])
    for label, values in (("nll per token", comparison.mean_nll), ("bits per byte", comparison.bits_per_byte)):
        if values is not None:
            rows.append([label, f"{values[0]:.4f}", f"{values[1]:.4f}", f"{values[0] - values[1]:+.4f}"])
    counts = comparison.num_target_tokens
    if counts is not None:
        rows.append(["gold tokens", f"{counts[0]:,}", f"{counts[1]:,}", f"{counts[0] - counts[1]:+,}"])
    return rows


def _counts(comparison: Comparison) -> str:
    name_a, name_b = comparison.names
    interval = comparison.mean_difference
    lines = [f"mean difference of log P, {name_a} - {name_b}: {interval.estimate:+.4f} nats per example"]
    if interval.is_known:
        lines[0] += (
            f", {interval.confidence:.0%} interval {interval.low:+.4f} to {interval.high:+.4f}"
            f" (paired bootstrap, {comparison.num_resamples:,} resamples)"
        )
        if comparison.num_shared < _FEW_EXAMPLES:
            lines.append(f"the interval comes from {comparison.num_shared} examples only and is likely too narrow")
    lines.append(
        f"higher likelihood: {name_a} on {comparison.wins:,}, {name_b} on {comparison.losses:,}, "
        f"{plural(comparison.ties, 'tie')} (within {comparison.tie_tolerance:g} nats)"
    )
    if comparison.wins + comparison.losses:
        of_what = "" if comparison.num_rows == comparison.num_shared else f" of {comparison.num_rows:,} rows"
        # Below what a float holds it comes out as 0, which no chance is.
        shown_p = f"= {comparison.sign_p:.2g}" if comparison.sign_p > 0 else f"< {sys.float_info.min:.0e}"
        lines[-1] += f"; sign test{of_what}: p {shown_p}"
    if comparison.num_starts_known:
        (start_a, start_b), (back_a, back_b) = comparison.starts, comparison.comebacks
        of = (
            ""
            if comparison.num_starts_known == comparison.num_shared
            else f" (of {comparison.num_starts_known:,} known)"
        )
        lines.append(f"better first token: {name_a} on {start_a:,}, {name_b} on {start_b:,}{of}")
        lines.append(f"starts worse but wins: {name_a} on {back_a:,}, {name_b} on {back_b:,}")
    return "\n".join(lines)


_GROUP_TITLES = {
    "source": "by source, nats per example",
    "role": "by role of gold, nats per example",
    "position": "by position in gold, nats per example",
}


def _groups(comparison: Comparison) -> list[str]:
    blocks = []
    name_a, name_b = comparison.names
    for by, title in _GROUP_TITLES.items():
        groups = [group for group in comparison.groups if group.by == by]
        if len(groups) < 2:
            continue
        rows = [[title, "examples", f"{name_a} - {name_b}", "", f"{name_a} higher", f"{name_b} higher"]]
        for group in groups:
            interval = group.difference
            rows.append(
                [
                    group.label,
                    f"{group.num_examples:,}",
                    f"{interval.estimate:+,.4f}",
                    f"({interval.low:+,.4f} to {interval.high:+,.4f})" if interval.is_known else "",
                    f"{group.wins:,}",
                    f"{group.losses:,}",
                ]
            )
        blocks.append(text_table(rows))
    return blocks


def _tokens(comparison: Comparison) -> str:
    tokens = comparison.largest_tokens(5)
    if not tokens:
        return ""
    rows = [["tokens that differ most", *(f"P under {name}" for name in comparison.names), "nats", ""]]
    for token in tokens:
        rows.append(
            [
                f"{shortened(token.text, 24)!r}",
                _probability(token.log_probs[0]),
                _probability(token.log_probs[1]),
                f"{token.difference:+,.4f}",
                f"token {token.position:,} of {shortened(token.example_id)}",
            ]
        )
    return text_table(rows)


def _kinds(comparison: Comparison) -> str:
    kinds = comparison.largest_kinds(8)
    if all(kind.count == 1 for kind in kinds):  # the table of tokens says it
        return ""
    rows = [["kinds of token that differ most", "tokens", "nats, mean", "nats, sum"]]
    for kind in kinds:
        label = f"{shortened(kind.text, 24)!r}"
        rows.append([label, f"{kind.count:,}", f"{kind.mean_difference:+,.4f}", f"{kind.difference:+,.2f}"])
    return text_table(rows)


def _largest(comparison: Comparison) -> list[str]:
    blocks = []
    for name, pairs in zip(comparison.names, comparison.largest(4), strict=True):
        if not pairs:
            continue
        rows = [[f"furthest ahead: {name}", *comparison.names, "difference", "on token 1", ""]]
        has_starts = any(pair.start_difference is not None for pair in pairs)
        for pair in pairs:
            start = pair.start_difference
            row = [
                shortened(pair.example_id),
                f"{pair.a.log_prob:,.4f}",
                f"{pair.b.log_prob:,.4f}",
                f"{pair.difference:+,.4f}",
                "" if start is None else f"{start:+.4f}",
                shortened(pair.a.source or pair.b.source),
            ]
            rows.append(row)
        if not has_starts:
            rows = [row[:4] + row[5:] for row in rows]
        blocks.append(text_table(rows))
    return blocks


def _verdict_of_many(comparison: Comparison) -> str:
    name_a, name_b = comparison.names
    if comparison.higher is None:
        return f"{name_a} and {name_b} give the gold the same likelihood (within {comparison.tie_tolerance:g} nats)."
    sentence = f"{comparison.higher} gives the gold the higher likelihood"
    winner = comparison.names.index(comparison.higher)
    starts = comparison.starts
    if starts[1 - winner] > starts[winner]:
        sentence += f", though {_other(comparison)} starts better on more examples"
    if comparison.is_clear is False:
        sentence += "; the interval holds 0, so these examples do not settle it"
    return sentence + "."


def _other(comparison: Comparison) -> str:
    return comparison.names[1] if comparison.higher == comparison.names[0] else comparison.names[0]


def _probability(log_prob: float) -> str:
    """exp(log_prob) in four digits, also where no float could hold it."""
    if log_prob > -700:
        return f"{math.exp(log_prob):.4g}"
    exponent = math.floor(log_prob / math.log(10))
    return f"{10 ** (log_prob / math.log(10) - exponent):.3f}e{exponent}"


def _factor(nats: float) -> str:
    """exp(nats), a factor above 1."""
    return f"{math.exp(nats):.4g}" if nats < 700 else f"e^{nats:.0f}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def shortened(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
