"""Sampling: filters against naive loops, frequencies against probabilities, rows against each other."""

import pytest
import torch

from layers.sampler import exponential, sample


def draw(logits, count, **filters):
    seeds = torch.arange(count)
    return sample(logits.expand(count, -1), seeds, torch.full((count,), 3), temperature=1.0, **filters)


def test_zero_temperature_is_argmax():
    logits = torch.randn(5, 100)
    assert torch.equal(sample(logits, torch.arange(5), torch.arange(5)), logits.argmax(-1))


def test_frequencies_are_the_probabilities():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = draw(p.log(), 40_000).bincount(minlength=4) / 40_000
    assert (counts - p).abs().max() < 0.01


def test_a_tiny_temperature_is_greedy():
    logits = 50 * torch.randn(4, 100)
    assert torch.equal(sample(logits, torch.arange(4), torch.arange(4), temperature=1e-45), logits.argmax(-1))
    assert torch.equal(sample(logits, torch.arange(4), torch.arange(4), temperature=1e-300), logits.argmax(-1))


def test_temperature_sharpens():
    p = torch.tensor([0.6, 0.4])
    tokens = sample(p.log().expand(20_000, -1), torch.arange(20_000), torch.zeros(20_000), temperature=0.5)
    assert abs(float((tokens == 0).float().mean()) - 0.36 / 0.52) < 0.02


@pytest.mark.parametrize(
    ("filters", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"min_p": 0.5}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.2}, {0, 1, 2}),
    ],
)
def test_filters_keep_exactly_their_set(filters, allowed):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert set(draw(p.log(), 4000, **filters).tolist()) == allowed


def test_a_row_does_not_depend_on_its_batch():
    logits, seeds, positions = torch.randn(4, 50), torch.tensor([7, 8, 9, 10]), torch.tensor([3, 99, 5, 0])
    together = sample(logits, seeds, positions, temperature=1.0, top_p=0.9)
    for row in range(4):
        one = slice(row, row + 1)
        alone = sample(logits[one], seeds[one], positions[one], temperature=1.0, top_p=0.9)
        assert alone[0] == together[row]


def test_random_numbers_are_exponential_and_independent():
    noise = exponential(torch.arange(300), torch.full((300,), 11), 1000)
    assert abs(float(noise.mean()) - 1) < 0.01 and abs(float(noise.var()) - 1) < 0.03 and float(noise.min()) > 0
    assert abs(float(torch.corrcoef(noise[:2])[0, 1])) < 0.1
    shifted = exponential(torch.arange(300), torch.full((300,), 12), 1000)
    assert abs(float(torch.corrcoef(torch.stack((noise.flatten(), shifted.flatten())))[0, 1])) < 0.01


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 2.0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        sample(torch.randn(1, 3), torch.tensor([0]), torch.tensor([0]), **{"temperature": 1.0, **wrong})
