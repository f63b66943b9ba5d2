"""Our logits and greedy tokens are those that transformers gave: `pytest tests/test_golden.py` needs none of it.

make_golden.py wrote them.
"""

import json
from itertools import combinations

import pytest
import torch

from checkpoints.resolve import DEFAULT_MODEL
from tests import make_golden, tiny
from zoo import Engine, load
from zoo.family import family_names

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = json.loads((make_golden.GOLDEN / "tiny.json").read_text())
DEFAULT = json.loads((make_golden.GOLDEN / f"{DEFAULT_MODEL}.json").read_text())


@pytest.mark.parametrize("family", family_names())
def test_tiny_models(family, tmp_path):
    for feature in tiny.features(family):
        model = tiny.load(tiny.write(tmp_path, tiny.config_json(family, feature))).model
        key = f"{family}/{feature}"
        assert key in TINY, f"{key} has no golden numbers: run `python -m tests.make_golden`"
        for length, expected in TINY[key].items():
            logits_V = model(torch.tensor([tiny.tokens(int(length))]))[0, -1]
            difference = (logits_V[: len(expected)] - torch.tensor(expected)).abs().max()
            assert difference <= 1e-4, f"{key} at {length} tokens: {difference}"


def test_every_feature_changes_the_numbers():
    """A feature that transformers ignores would be compared with nothing."""
    length = str(make_golden.LONG)
    for family in family_names():
        rows = {key: torch.tensor(row[length]) for key, row in TINY.items() if key.startswith(f"{family}/")}
        for one, other in combinations(rows, 2):
            if {one, other} != {f"{family}/plain", f"{family}/window-unused"}:
                assert (rows[one] - rows[other]).abs().max() > 0.01, f"{one} computes the same as {other}"


@pytest.fixture(scope="module")
def loaded():
    return load(DEFAULT_MODEL, progress=False)


@pytest.mark.parametrize("row", DEFAULT.values(), ids=range(len(DEFAULT)))
def test_default_model_logits(loaded, row):
    logits_V = loaded.model(torch.tensor([row["ids"]]))[0, -1]
    torch.testing.assert_close(logits_V[: len(row["logits"])], torch.tensor(row["logits"]), atol=2e-3, rtol=0)


def test_default_model_greedy_tokens(loaded):
    engine = Engine(loaded, cache="full", max_context=512)
    prompts = [row["ids"] for row in DEFAULT.values()]
    assert engine.generate(prompts, max_new_tokens=make_golden.NEW_TOKENS) == [
        row["new_ids"] for row in DEFAULT.values()
    ]
