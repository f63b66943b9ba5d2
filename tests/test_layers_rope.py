"""Each RoPE kind against its formula written out number by number."""

import cmath
import math

import pytest
import torch

from checkpoints.config import RopeConfig
from kernels.rope import apply_rope
from layers import rope
from zoo.family import rotary_embedding

DIM, TRAINED = 16, 64
PAIRS = range(DIM // 2)
SHORT, LONG = tuple(1 + 0.25 * i for i in PAIRS), tuple(2.0 + i for i in PAIRS)


def plain(theta=10_000.0):
    return [theta ** (-2 * i / DIM) for i in PAIRS]


def dynamic(factor, context):
    stretched = max(1.0, factor * context / TRAINED - (factor - 1))
    return plain(10_000.0 * stretched ** (DIM / (DIM - 2)))


def llama3(factor, low, high):
    result = []
    for frequency in plain():
        wavelength = 2 * math.pi / frequency
        if wavelength < TRAINED / high:
            result.append(frequency)
        elif wavelength > TRAINED / low:
            result.append(frequency / factor)
        else:
            smooth = (TRAINED / wavelength - low) / (high - low)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return result


def yarn(factor, fast, slow, truncate):
    """The dimension that turns `turns` times within the trained context solves TRAINED * theta^(-2i/D) = 2 pi turns."""
    first, last = (DIM / 2 * math.log(TRAINED / (2 * math.pi * turns), 10_000.0) for turns in (fast, slow))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, DIM - 1)
    result = []
    for i, frequency in enumerate(plain()):
        stretched = 0.0 if i <= first else 1.0 if i >= last else (i - first) / (last - first)
        result.append(frequency * (1 - stretched) + frequency / factor * stretched)
    return result


def divided(factors):
    return [frequency / factor for frequency, factor in zip(plain(), factors, strict=True)]


def log_scale(weight, factor):
    return 0.1 * weight * math.log(factor) + 1


def case(kind, frequencies, *, scale=1.0, context=TRAINED, **fields):
    config = RopeConfig(kind=kind, original_max_position=None if kind in ("default", "linear") else TRAINED, **fields)
    return pytest.param(config, context, frequencies, scale)


_longrope = {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG}
_sqrt = math.sqrt(1 + math.log(4) / math.log(TRAINED))
CASES = [
    case("default", plain()),
    case("default", plain(500.0), theta=500.0),
    case("linear", [frequency / 3 for frequency in plain()], factor=3.0),
    case("dynamic", plain(), factor=2.0),
    case("dynamic", dynamic(2.0, 65), factor=2.0, context=65),
    case("dynamic", dynamic(2.0, 200), factor=2.0, context=200),
    case("llama3", llama3(8.0, 1.0, 4.0), factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    case("llama3", llama3(4.0, 0.5, 9.0), factor=4.0, low_freq_factor=0.5, high_freq_factor=9.0, context=300),
    case("yarn", yarn(4.0, 32, 1, True), scale=log_scale(1, 4), factor=4.0),
    case(
        "yarn", yarn(4.0, 9, 0.5, False), scale=log_scale(1, 4), factor=4.0, beta_fast=9, beta_slow=0.5, truncate=False
    ),
    case("yarn", yarn(4.0, 9, 0.5, True), scale=1.5, factor=4.0, beta_fast=9, beta_slow=0.5, attention_factor=1.5),
    case(
        "yarn",
        yarn(4.0, 32, 1, True),
        scale=log_scale(1, 4) / log_scale(0.5, 4),
        factor=4.0,
        mscale=1.0,
        mscale_all_dim=0.5,
    ),
    case("yarn", plain(), factor=1.0),
    case("longrope", divided(SHORT), scale=_sqrt, context=TRAINED, **_longrope),
    case("longrope", divided(LONG), scale=_sqrt, context=TRAINED + 1, **_longrope),
    case("longrope", divided(LONG), scale=1.2, context=TRAINED + 1, attention_factor=1.2, **_longrope),
]


@pytest.mark.parametrize(("config", "context", "frequencies", "scale"), CASES)
def test_angles_follow_the_formula(config, context, frequencies, scale):
    position_BT = torch.tensor([[0, 1, 7], [200, 3, 63]])
    cos_BTd, sin_BTd = rotary_embedding(config, DIM)(position_BT, context)
    angle_BTd = position_BT[..., None].double() * torch.tensor(frequencies, dtype=torch.float64)
    torch.testing.assert_close(cos_BTd, (angle_BTd.cos() * scale).float(), atol=5e-5, rtol=0)
    torch.testing.assert_close(sin_BTd, (angle_BTd.sin() * scale).float(), atol=5e-5, rtol=0)


def test_a_model_can_be_described_without_memory_for_it():
    """As `load` does: the frequencies are real although the weights are not there yet."""
    for case in CASES:
        config, context, _, _ = case.values
        with torch.device("meta"):
            module = rotary_embedding(config, DIM)
        expected = rotary_embedding(config, DIM)(torch.tensor([[5]]), context)
        torch.testing.assert_close(module(torch.tensor([[5]]), context), expected, atol=0, rtol=0)


def test_rotation_turns_each_pair_as_a_complex_number():
    x_BTHD = torch.randn(1, 3, 2, DIM, generator=torch.Generator().manual_seed(0))
    position_BT = torch.tensor([[0, 5, 40]])
    got_BTHD = apply_rope(x_BTHD, *rope.RotaryEmbedding(rope.default_frequencies(DIM, 10_000.0))(position_BT))
    for t, position in enumerate(position_BT[0].tolist()):
        for head in range(2):
            x, got = x_BTHD[0, t, head].tolist(), got_BTHD[0, t, head].tolist()
            for i, frequency in enumerate(plain()):
                turned = complex(x[i], x[i + DIM // 2]) * cmath.exp(1j * position * frequency)
                assert got[i] == pytest.approx(turned.real, abs=1e-5)
                assert got[i + DIM // 2] == pytest.approx(turned.imag, abs=1e-5)


def test_attention_sees_only_distances():
    q_BTHD, k_BTHD = torch.randn(2, 1, 1, 1, DIM, generator=torch.Generator().manual_seed(0))
    embedding = rope.RotaryEmbedding(rope.default_frequencies(DIM, 10_000.0))

    def score(q_position, k_position):
        q = apply_rope(q_BTHD, *embedding(torch.tensor([[q_position]])))
        return (q * apply_rope(k_BTHD, *embedding(torch.tensor([[k_position]])))).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_a_wrong_number_of_factors_is_refused():
    with pytest.raises(ValueError, match="8 frequencies, but 3 factors"):
        rope.divided(rope.default_frequencies(DIM, 10_000.0), (1.0, 2.0, 3.0))
