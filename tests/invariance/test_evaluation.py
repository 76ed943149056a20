"""Evaluation nll is the same number for any batch size: in float64 to the last digits, in float32 within rounding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from families import FAMILIES
from matrix import ALL_AT_ONCE, EVALUATION_TOLERANCE, ROUNDING, evaluate, examples_of, fast_model, rows_of, typical

from goldsmith.data.dataset import Dataset
from goldsmith.models.evaluate import iterate_log_probs, sum_log_likelihood
from goldsmith.models.likelihood import LikelihoodModel

BUDGETS = (1, 17, 50, 64, 130, ALL_AT_ONCE)
# A mean of sixty log-probabilities, each of which rounds with its logits; relative.
FLOAT32_TOLERANCE = 16 * ROUNDING


def nlls(model: LikelihoodModel, budgets: Sequence[int]) -> list[tuple[float, float]]:
    dataset = Dataset(examples_of(rows_of(True, True)))
    found = [sum_log_likelihood(model, dataset, tokens_per_microbatch=budget) for budget in budgets]
    return [(sums.nll, sums.nll_per_example) for sums in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_number_for_any_batch_size(family: str) -> None:
    model = fast_model(typical(family=family), torch.float64)
    truth = evaluate(typical(family=family), model)[2:]  # of the plain side
    for budget, found in zip(BUDGETS, nlls(model, BUDGETS), strict=True):
        np.testing.assert_allclose(found, truth, rtol=EVALUATION_TOLERANCE, err_msg=str(budget))

    model = fast_model(typical(family=family), torch.float32)
    in_float32 = nlls(model, BUDGETS)
    print(family, [abs(found[0] / truth[0] - 1) for found in in_float32])
    for budget, found in zip(BUDGETS, in_float32, strict=True):
        np.testing.assert_allclose(found, truth, rtol=FLOAT32_TOLERANCE, err_msg=str(budget))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bit_equal_where_the_packs_are(dtype: torch.dtype) -> None:
    """The same packs give the same bits; and a row alone is the same pack whatever the budget, if it is too small for two."""
    model = fast_model(typical(), dtype)
    assert nlls(model, [50]) == nlls(model, [50])
    assert nlls(model, [1]) == nlls(model, [2]) == nlls(model, [4])


def test_a_rank_each_adds_up_to_the_whole() -> None:
    """Sums, not means, are what ranks give each other."""
    model = fast_model(typical(), torch.float64)
    dataset = Dataset(examples_of(rows_of(True, True)))
    whole = sum_log_likelihood(model, dataset, tokens_per_microbatch=50)
    parts = [
        sum_log_likelihood(model, dataset, tokens_per_microbatch=50, indices=range(rank, len(dataset), 3))
        for rank in range(3)
    ]
    total = sum(part.weighted_nll for part in parts) / sum(part.weight_sum for part in parts)
    assert total == pytest.approx(whole.nll, rel=EVALUATION_TOLERANCE)
    assert abs(np.mean([part.nll for part in parts]) - whole.nll) > 1e-3  # the mean of means is another number


def test_every_gold_token_whatever_it_is_packed_with() -> None:
    model = fast_model(typical(family="gpt2"), torch.float64)
    dataset = Dataset(examples_of(rows_of(True, True)))
    alone = dict(iterate_log_probs(model, dataset, tokens_per_microbatch=1))
    for index, log_probs in iterate_log_probs(model, dataset, tokens_per_microbatch=ALL_AT_ONCE):
        np.testing.assert_allclose(log_probs, alone[index], rtol=EVALUATION_TOLERANCE)
