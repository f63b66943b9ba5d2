"""Every family, every feature: the same logits and greedy tokens as transformers, dense and through the cache."""

import json
from types import SimpleNamespace

import pytest
import torch

from checkpoints.resolve import DEFAULT_MODEL
from tests import make_golden, reference, tiny
from zoo import Engine, load
from zoo.family import family_names

try:
    import transformers
except ImportError as error:
    raise ImportError("this file compares with transformers: pip install -c constraints.txt -e '.[test]'") from error

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE, DEFAULT_TOLERANCE = 1e-4, 2e-3
MODELS = [(family, feature) for family in family_names() for feature in tiny.features(family)]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def pair(request, tmp_path_factory):
    """One model twice: as transformers runs it, and what it saved as we run it."""
    written, saved = tmp_path_factory.mktemp("written"), tmp_path_factory.mktemp("saved")
    theirs = reference.from_directory(tiny.write(written, tiny.config_json(*request.param)))
    theirs.save_pretrained(saved)
    return SimpleNamespace(theirs=theirs, ours=tiny.load(saved))


def freeze_rope(model, context, monkeypatch):
    """Make transformers keep the angles of a prompt.

    With dynamic scaling it turns new keys by other angles whenever a conversation grows, over keys that it has stored.
    We turn all of them as the prompt asked, which is what the method defines.
    """
    for length in (1, context):
        model(torch.zeros(1, length, dtype=torch.long))
    monkeypatch.setattr(model.model.rotary_emb, "max_seq_len_cached", tiny.CONTEXT)


@pytest.mark.parametrize("length", [make_golden.SHORT, make_golden.LONG])
def test_dense(pair, length):
    ids_BT = torch.tensor([tiny.tokens(length), tiny.tokens(length, "another")])
    assert distance(pair.ours.model(ids_BT), pair.theirs(ids_BT).logits) <= TOLERANCE


@pytest.mark.parametrize("prompts", [(14, 9), (40, 9)], ids=["within", "beyond"])
def test_through_the_cache(pair, prompts, monkeypatch):
    """A ragged batch: prompts, four steps, another turn, one more step; each row as if it were alone."""
    steps, turns = 4, (8, 3)
    rows = [
        tiny.tokens(prompt + steps + turn + 1, f"row {prompt}") for prompt, turn in zip(prompts, turns, strict=True)
    ]

    engine = Engine(pair.ours, cache="full")
    got = [engine.prefill([row[:prompt] for row, prompt in zip(rows, prompts, strict=True)])]
    for step in range(steps):
        got.append(engine.step([row[prompt + step] for row, prompt in zip(rows, prompts, strict=True)]))
    got.append(engine.extend([row[prompt + steps : -1] for row, prompt in zip(rows, prompts, strict=True)]))
    got.append(engine.step([row[-1] for row in rows]))

    for logits_SV, row, prompt in zip(torch.stack(got, dim=1), rows, prompts, strict=True):
        freeze_rope(pair.theirs, prompt, monkeypatch)
        dense_TV = pair.theirs(torch.tensor([row])).logits[0]
        seen = [*range(prompt - 1, prompt + steps), len(row) - 2, len(row) - 1]
        assert distance(logits_SV, dense_TV[seen]) <= TOLERANCE


def test_generate(pair, monkeypatch):
    ids, new_tokens = tiny.tokens(tiny.TRAINED + 8, "generate"), 10
    freeze_rope(pair.theirs, len(ids), monkeypatch)
    new_ids = Engine(pair.ours, cache="full").generate([ids], max_new_tokens=new_tokens)
    assert new_ids == [reference.greedy(pair.theirs, ids, new_tokens)]


def test_default_model():
    """Real weights, dense and through the cache, over the prompts and greedy answers that test_golden.py asks for."""
    rows = list(json.loads((make_golden.GOLDEN / f"{DEFAULT_MODEL}.json").read_text()).values())
    steps = 16
    loaded, theirs = load(DEFAULT_MODEL, progress=False), reference.default_model()
    engine = Engine(loaded, cache="full", max_context=512)
    cached = [engine.prefill([row["ids"] for row in rows])]
    cached += [engine.step([row["new_ids"][step] for row in rows]) for step in range(steps)]
    for row, logits_SV in zip(rows, torch.stack(cached, dim=1), strict=True):
        ids_BT = torch.tensor([row["ids"] + row["new_ids"][:-1]])
        expected_TV = theirs(ids_BT).logits[0]
        answer_SV = expected_TV[len(row["ids"]) - 1 :]
        assert distance(loaded.model(ids_BT)[0], expected_TV) <= DEFAULT_TOLERANCE
        assert distance(logits_SV, answer_SV[: steps + 1]) <= DEFAULT_TOLERANCE
        assert answer_SV.argmax(-1).tolist() == row["new_ids"], "transformers no longer gives the golden tokens"


def distance(one, other):
    return (one - other).abs().max().item()
