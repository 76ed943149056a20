"""Rank, best token, entropy and alternatives against plain float64 formulas over full logits."""

from __future__ import annotations

import pytest
import torch

from goldsmith.objective.cross_entropy import OutputHead, cross_entropy
from goldsmith.objective.linear_cross_entropy import linear_cross_entropy
from goldsmith.objective.token_statistics import token_statistics


def case(
    dtype: torch.dtype, *, vocabulary: int = 123, with_extras: bool = False
) -> tuple[torch.Tensor, OutputHead, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(57, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, 12, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    head = OutputHead(
        weight_VD=weight.to(dtype),
        bias_V=bias.to(dtype) if with_extras else None,
        logit_scale=0.7 if with_extras else 1.0,
        soft_cap=5.0 if with_extras else None,
    )
    return hidden.to(dtype), head, torch.randint(vocabulary, (57,), generator=generator)


def plain_log_probs(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
    logits = hidden.double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits = logits + head.bias_V.double()
    logits = logits * head.logit_scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, None])
def test_every_figure_against_the_plain_formula(chunk_size: int | None, with_extras: bool) -> None:
    hidden, head, ids = case(torch.float64, with_extras=with_extras)
    found = token_statistics(hidden, head, ids, top=4, chunk_size=chunk_size)
    plain = plain_log_probs(hidden, head)
    gold = plain.gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(found.log_probs_K, gold, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.best_log_probs_K, plain.amax(dim=1), rtol=0, atol=1e-12)
    ranks = [1 + sum(other > own for other in row) for row, own in zip(plain.tolist(), gold.tolist(), strict=True)]
    assert found.ranks_K is not None
    assert found.ranks_K.tolist() == ranks
    assert found.is_best_K.tolist() == [rank == 1 for rank in ranks]
    assert found.entropies_K is not None
    torch.testing.assert_close(found.entropies_K, -(plain.exp() * plain).sum(dim=1), rtol=0, atol=1e-12)
    values, places = plain.sort(dim=1, descending=True)
    assert found.top_ids_KN is not None
    assert found.top_ids_KN.tolist() == places[:, :4].tolist()
    torch.testing.assert_close(found.top_log_probs_KN, values[:, :4], rtol=0, atol=1e-12)


def test_log_probs_are_those_of_the_objective_to_the_bit() -> None:
    for dtype in (torch.float32, torch.float64):
        hidden, head, ids = case(dtype, with_extras=True)
        own = linear_cross_entropy(hidden, head, ids, torch.ones(57)).log_probs_K
        for detailed in (False, True):
            found = token_statistics(hidden, head, ids, detailed=detailed)
            assert torch.equal(found.log_probs_K, own)


def test_what_is_not_asked_for_is_not_there() -> None:
    hidden, head, ids = case(torch.float32)
    found = token_statistics(hidden, head, ids, detailed=False)
    assert found.ranks_K is found.entropies_K is found.top_ids_KN is found.top_log_probs_KN is None
    torch.testing.assert_close(
        found.log_probs_K.double(), plain_log_probs(hidden, head).gather(1, ids[:, None]).squeeze(1), rtol=0, atol=1e-5
    )


def test_a_tie_does_not_push_gold_down() -> None:
    head = OutputHead(weight_VD=torch.tensor([[2.0], [2.0], [1.0], [1.0]]))
    found = token_statistics(torch.ones(4, 1), head, torch.tensor([0, 1, 2, 3]))
    assert found.ranks_K is not None
    assert found.ranks_K.tolist() == [1, 1, 3, 3]
    assert found.is_best_K.tolist() == [True, True, False, False]


def test_more_alternatives_than_tokens_are_all_of_them() -> None:
    hidden, head, ids = case(torch.float64, vocabulary=3)
    found = token_statistics(hidden, head, ids.remainder(3), top=9)
    assert found.top_log_probs_KN is not None
    torch.testing.assert_close(found.top_log_probs_KN.exp().sum(dim=1), torch.ones(57, dtype=torch.float64))


def test_a_token_that_can_never_come_has_no_part_in_the_entropy() -> None:
    head = OutputHead(weight_VD=torch.zeros(3, 1), bias_V=torch.tensor([0.0, 0.0, -torch.inf]))
    found = token_statistics(torch.ones(1, 1), head, torch.tensor([0]))
    assert found.entropies_K is not None
    assert found.entropies_K.item() == pytest.approx(0.6931472)


def test_half_precision_products_are_summed_in_float32() -> None:
    hidden, head, ids = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_statistics(hidden, head, ids, top=2)
        own = linear_cross_entropy(hidden, head, ids, torch.ones(57)).log_probs_K
    assert found.log_probs_K.dtype == torch.float32
    assert torch.equal(found.log_probs_K, own)
    exact = cross_entropy(hidden, head, ids, torch.ones(57)).log_probs_K
    torch.testing.assert_close(found.log_probs_K, exact, rtol=0, atol=0.2)
