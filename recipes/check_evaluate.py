"""Whether the lm-eval adapter scores as lm-eval's own backend does, and what batches gain it.

    python -m recipes.check_evaluate --output recipes/results/check_evaluate.json

With the full cache, on prose that ships inside Python: choices, whole texts and generated answers, by both backends
with the same weights. Then prompts of different lengths are continued through a compressed cache, one by one and eight
at a time, in turns.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from checkpoints.resolve import DEFAULT_MODEL, resolve
from recipes.perplexity import manual, windows
from zoo import Loaded, cli, machine


def texts(loaded: Loaded, count: int, tokens: int) -> list[str]:
    """Pieces of prose, each shorter than the one before it.

    Args:
        loaded: whose tokenizer counts.
        count: how many.
        tokens: of the longest.
    """
    pieces = windows(loaded, manual(), count, tokens)
    return [loaded.tokenizer.decode(ids[: tokens - tokens * i // (2 * count)]) for i, ids in enumerate(pieces)]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Requests as lm-eval makes them of a task's documents."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, 0, metadata=("check", i, 1)) for i, args in enumerate(arguments)]


def differences(ours: Any, theirs: Any, pieces: list[str], new_tokens: int) -> dict[str, Any]:
    """How far two backends are apart on all kinds of requests.

    Args:
        ours: a backend.
        theirs: another.
        pieces: of text.
        new_tokens: of generated answers.

    Returns:
        Largest differences of log-likelihoods in nats, and how many answers and greedy choices are the same.
    """
    half = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in pieces]
    choices = [(start, rest[:end]) for start, rest in half for end in (12, 40, len(rest))]
    scored = list(zip(*(lm.loglikelihood(requests("loglikelihood", choices)) for lm in (ours, theirs)), strict=True))
    whole = [(text,) for text in pieces]
    rolled = zip(
        *(lm.loglikelihood_rolling(requests("loglikelihood_rolling", whole)) for lm in (ours, theirs)), strict=True
    )
    how = {"until": ["\n\n"], "max_gen_toks": new_tokens, "do_sample": False}
    asked = [(start, dict(how)) for start, _ in half]
    answers = zip(*(lm.generate_until(requests("generate_until", asked)) for lm in (ours, theirs)), strict=True)
    return {
        "loglikelihood": {"requests": len(choices), "largest": max(abs(a - b) for (a, _), (b, _) in scored)},
        "is_greedy": {"requests": len(choices), "same": sum(a == b for (_, a), (_, b) in scored)},
        "loglikelihood_rolling": {"requests": len(whole), "largest": max(abs(a - b) for a, b in rolled)},
        "generate_until": {"requests": len(asked), "same": sum(a == b for a, b in answers)},
    }


def throughput(model: str, pieces: list[str], new_tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds to continue texts through 64 tokens per KV head, one by one and eight at a time, in turns."""
    from zoo.harness import ZooLM

    seconds: dict[int, list[float]] = {1: [], 8: []}
    found: dict[int, list[str]] = {}
    backends = {batch: ZooLM(model, cache="snapkv:preset=tuned", budget=64, batch_size=batch) for batch in seconds}
    asked = [(text, {"until": ["\0"], "max_gen_toks": new_tokens, "do_sample": False}) for text in pieces]
    for _ in range(rounds):
        for batch, lm in backends.items():
            started = time.perf_counter()
            found[batch] = lm.generate_until(requests("generate_until", asked))
            seconds[batch].append(time.perf_counter() - started)
    ratio = statistics.median(seconds[1]) / statistics.median(seconds[8])
    same = sum(a == b for a, b in zip(found[1], found[8], strict=True))
    return {"seconds": seconds, "ratio": ratio, "answers": len(asked), "same": same}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return cli.run("recipes.check_evaluate", lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m recipes.check_evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias or folder that transformers can read too")
    parser.add_argument("--texts", type=cli.whole_number(1), default=8, help="pieces of prose")
    parser.add_argument("--tokens", type=cli.whole_number(1), default=200, help="of the longest piece")
    parser.add_argument("--new-tokens", type=cli.whole_number(1), default=32, help="of generated answers")
    parser.add_argument("--rounds", type=cli.whole_number(1), default=3, help="of the timing")
    parser.add_argument("--output", type=Path, help="json file")
    args = parser.parse_args(argv)
    cli.check_writable("--output", args.output)
    try:
        from lm_eval.models.huggingface import HFLM

        from zoo.harness import ZooLM
    except ImportError:
        raise ValueError("this needs lm-eval: run `pip install -c constraints.txt -e '.[test]'`") from None
    commit = machine.commit()
    path = resolve(args.model)
    where = {"pretrained": str(path.parent), "gguf_file": path.name} if path.is_file() else {"pretrained": str(path)}
    theirs = HFLM(**where, device="cpu", dtype="float32", batch_size=4)
    ours = ZooLM(args.model, cache="full", batch_size=4)
    pieces = texts(ours.loaded, args.texts, args.tokens)
    found = differences(ours, theirs, pieces, args.new_tokens)
    speed = throughput(args.model, pieces, args.new_tokens, args.rounds)
    origin = {"model": args.model, "commit": commit, "machine": machine.description(torch.device("cpu"))}
    origin["command"] = "python -m recipes.check_evaluate " + shlex.join(sys.argv[1:] if argv is None else argv)
    if args.output:
        args.output.write_text(json.dumps(origin | {"full": found, "batches": speed}) + "\n")
    print("| request | of lm-eval's own backend |\n|---|---|")
    for kind, values in found.items():
        said = f"{values['largest']:.1e} nats apart at most" if "largest" in values else f"{values['same']} the same"
        print(f"| {kind} | {said}, of {values['requests']} |")
    print(
        f"\nEight at a time is {speed['ratio']:.1f} times as fast, {speed['same']} of {speed['answers']} answers alike."
    )


if __name__ == "__main__":
    sys.exit(main())
