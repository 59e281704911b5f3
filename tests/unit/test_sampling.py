"""Check that tokens follow the distribution and depend on their own seed alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from csr_vlm.generation.sampling import choose_diverse, sample, uniforms

CHI_SQUARE_4 = 18.47
"""99.9th percentile of the chi-square distribution with four degrees of freedom."""
LOGITS = [2.0, 1.0, 0.0, -1.0, 0.5]


def draw(logits: list[float], number: int, temperature: float = 1.0, top_p: float = 1.0) -> np.ndarray:
    uniform = torch.from_numpy(np.random.default_rng(0).random(number))
    tokens = sample(torch.tensor(logits).expand(number, -1), uniform, temperature, top_p)
    return np.bincount(tokens.numpy(), minlength=len(logits))


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def softmax(logits: list[float], temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(np.array(logits) / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    counts = draw(LOGITS, 20_000, temperature)
    assert chi_square(counts, softmax(LOGITS, temperature)) < CHI_SQUARE_4
    assert chi_square(counts, softmax(LOGITS, temperature * 1.5)) > CHI_SQUARE_4, "the test must be able to fail"


def test_a_hand_worked_inversion():
    # Probabilities 0.5, 0.25, 0.25: the cumulative distribution steps at 0.5, 0.75 and 1.
    logits = torch.tensor([math.log(2), 0.0, 0.0]).expand(6, -1)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.999])
    assert sample(logits, uniform, 1.0, 1.0).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("masked", [0, 2, 4])
def test_a_masked_token_is_never_drawn(masked):
    logits = [-math.inf if index == masked else value for index, value in enumerate(LOGITS)]
    counts = draw(logits, 20_000)
    assert counts[masked] == 0
    assert (np.delete(counts, masked) > 0).all()


def test_a_masked_token_is_not_drawn_at_either_end_of_the_vocabulary():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(5000, 40)))
    logits[:, [0, -1]] = -torch.inf
    for value in (0.0, math.nextafter(1.0, 0.0)):
        for top_p in (1.0, 0.9):
            tokens = sample(logits, torch.full((5000,), value, dtype=torch.float64), 1.0, top_p)
            assert tokens.min() >= 1
            assert tokens.max() <= 38


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, {0}), (0.49, {0}), (0.51, {0, 3}), (0.81, {0, 3}), (0.82, {0, 3, 1}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p, kept):
    probabilities = [0.5, 0.125, 0.0625, 0.3125]  # sorted: 0, 3, 1, 2, of mass 0.5, 0.8125, 0.9375, 1
    counts = draw([math.log(p) for p in probabilities], 5000, top_p=top_p)
    assert set(np.flatnonzero(counts).tolist()) == kept
    if len(kept) == 2:
        assert counts[0] / 5000 == pytest.approx(0.5 / 0.8125, abs=0.03), "the kept tokens are renormalized"


def test_a_row_does_not_depend_on_other_rows_or_their_order():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 500, generator=generator)
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    order = torch.randperm(64, generator=generator)
    for top_p in (1.0, 0.9):
        together = sample(logits, uniform, 0.8, top_p)
        alone = torch.cat([sample(logits[i : i + 1], uniform[i : i + 1], 0.8, top_p) for i in range(64)])
        assert torch.equal(together, alone)
        assert torch.equal(sample(logits[order], uniform[order], 0.8, top_p), together[order])
        assert together.unique().numel() > 30, "the rows differ"


def test_uniforms_depend_on_every_part_of_the_seed():
    base = (0, "photo", 1, "2.0", 3)
    drawn = [tuple(uniforms(base, 8))]
    for index, other in enumerate((1, "photo2", 2, "2.1", 4)):
        changed = (*base[:index], other, *base[index + 1 :])
        drawn.append(tuple(uniforms(changed, 8)))
    drawn.append(tuple(uniforms(base[:-1], 8)))
    assert len(set(drawn)) == len(drawn)
    assert len({value for row in drawn for value in row}) == 8 * len(drawn)


def test_uniforms_are_deterministic_and_a_longer_row_starts_with_the_shorter():
    assert np.array_equal(uniforms((0, "a"), 20), uniforms((0, "a"), 20))
    assert np.array_equal(uniforms((0, "a"), 20)[:5], uniforms((0, "a"), 5))


def test_seeds_that_join_to_the_same_string_differ():
    assert uniforms((1, "23"), 1) != uniforms((12, "3"), 1)
    assert uniforms(("a", ""), 1) != uniforms(("a",), 1)


def test_uniforms_are_the_same_on_every_machine():
    # Sampled tokens are part of what a resumed run must reproduce.
    assert uniforms((0, "p", 1, "", 0), 3).tolist() == [0.6881540689708318, 0.3560591749420219, 0.2975735569187722]


def test_uniforms_are_uniform():
    values = np.concatenate([uniforms((0, "a", number), 20) for number in range(1000)])
    assert values.min() >= 0
    assert values.max() < 1
    counts, _ = np.histogram(values, bins=5, range=(0, 1))
    assert chi_square(counts, np.full(5, 0.2)) < CHI_SQUARE_4


SIBLINGS = torch.tensor([0.0, -1.0, -2.5, -6.0]).expand(3, -1)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (0.0, [0, 0, 0]),  # greedy for all
        (0.5, [0, 0, 0]),  # 0, -0.5, -1 ties with -1 and the first wins
        (1.5, [0, 1, 0]),  # 0; then -1.5 < -1; then -1.5 against -2.5 and -2.5
        (3.0, [0, 1, 2]),  # 0; then -3 < -1; then -3, -4, -2.5
    ],
)
def test_three_siblings_of_four_tokens(penalty, expected):
    group, index = torch.zeros(3, dtype=torch.long), torch.arange(3)
    assert choose_diverse(SIBLINGS, group, index, penalty).tolist() == expected


def test_sibling_groups_are_independent():
    logits = SIBLINGS.repeat(2, 1)
    group, index = torch.tensor([7, 7, 7, 2, 2, 2]), torch.tensor([0, 1, 2, 0, 1, 2])
    assert choose_diverse(logits, group, index, 1.5).tolist() == [0, 1, 0, 0, 1, 0]
    # Siblings of one group are not: the fourth of six compares 0 - 3, -1 - 1.5 and -2.5.
    assert choose_diverse(logits, torch.zeros(6, dtype=torch.long), torch.arange(6), 1.5).tolist()[:4] == [0, 1, 0, 1]


def test_a_group_chooses_the_same_tokens_alone():
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))
    group, index = torch.arange(20) // 4, torch.arange(20) % 4
    together = choose_diverse(logits, group, index, 2.0).view(5, 4)
    for number in range(5):
        rows = slice(4 * number, 4 * number + 4)
        assert torch.equal(choose_diverse(logits[rows], group[rows], index[rows], 2.0), together[number])
    assert len(set(map(tuple, together.tolist()))) > 1


def test_the_order_of_siblings_matters_but_that_of_rows_does_not():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 6, generator=generator)
    group, index = torch.arange(12) // 4, torch.arange(12) % 4
    order = torch.randperm(12, generator=generator)
    together = choose_diverse(logits, group, index, 2.0)
    assert torch.equal(choose_diverse(logits[order], group[order], index[order], 2.0), together[order])
    assert not torch.equal(choose_diverse(logits, group, 3 - index, 2.0), together)


def test_a_masked_token_is_not_chosen_however_large_the_penalty():
    logits = torch.tensor([-math.inf, 0.0, -1.0]).expand(4, -1)
    tokens = choose_diverse(logits, torch.zeros(4, dtype=torch.long), torch.arange(4), 1000.0)
    assert 0 not in tokens.tolist()


def test_a_finished_sibling_does_not_change_the_indices_of_the_others():
    # Sibling 1 has finished: sibling 2 avoids only what sibling 0 chose.
    tokens = choose_diverse(SIBLINGS[:2], torch.zeros(2, dtype=torch.long), torch.tensor([0, 2]), 3.0)
    assert tokens.tolist() == [0, 1]
