"""Questions of a LongBench or SCBench file through a compressed cache, question seen while compressing or not.

    python -m recipes.longcontext --data scbench_kv.jsonl --format scbench --cache headkv --budget 128 --output kv.jsonl

Contexts are read as plain text, without a chat template. Rows, one per question, are written when a context is done,
and a run that was interrupted goes on with the contexts that its file lacks.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoints.resolve import DEFAULT_MODEL
from recipes.tasks.jsonl import SharedContext, Turn, read_longbench, read_scbench
from zoo import Engine, Loaded, cli, load, machine
from zoo.load import DTYPES

QUESTIONS, TURNS = ("unseen", "seen"), ("requests", "conversation")


def answers(engine: Engine, shared: SharedContext, *, question: str, turns: str) -> Iterator[tuple[Turn, str]]:
    """Ask every question on a context.

    Args:
        engine: for one row.
        shared: the context and its questions.
        question: "unseen" compresses the context before any question is known. "seen" compresses it together with a
            question: with its own for every request, with the first one for a conversation.
        turns: "requests" asks each question of the context alone, "conversation" after the earlier ones and what they
            were answered.

    Yields:
        Each question with its answer, in order.
    """
    encode = engine.loaded.tokenizer.encode
    context = encode(shared.context, bos=engine.loaded.tokenizer.adds_bos)
    engine.reset()
    snapshot = None
    if question == "unseen":
        engine.prefill([context])
        snapshot = engine.snapshot()
    for index, turn in enumerate(shared.turns):
        ids = encode(turn.question)
        if turns == "requests" and snapshot is not None:
            engine.restore(snapshot)
        elif turns == "requests":
            engine.reset()
        if question == "seen" and (index == 0 or turns == "requests"):
            ids = context + ids
        new = list(engine.stream(ids, max_new_tokens=turn.max_new_tokens))
        yield turn, engine.loaded.tokenizer.decode(new)


def check_fits(loaded: Loaded, contexts: Sequence[SharedContext]) -> int:
    """The tokens of the longest conversation on any of some contexts, answers included.

    Raises:
        ValueError: the model's context is shorter; says which is too long.
    """
    encode, longest = loaded.tokenizer.encode, 0
    for shared in contexts:
        turns = sum(len(encode(turn.question)) + turn.max_new_tokens for turn in shared.turns)
        total = len(encode(shared.context, bos=loaded.tokenizer.adds_bos)) + turns
        if total > loaded.config.max_position:
            raise ValueError(
                f"context {shared.id} takes {total} tokens with its questions and answers, {loaded.name} was trained "
                f"for {loaded.config.max_position}: take a model of longer context, or leave the line out"
            )
        longest = max(longest, total)
    return longest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe.

    Args:
        argv: its options; None takes those of the process.

    Returns:
        The exit status; see `zoo.cli.run`.
    """
    return cli.run("recipes.longcontext", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    parser = cli.Parser(prog="python -m recipes.longcontext", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSONL of the benchmark's form")
    parser.add_argument("--format", choices=("longbench", "scbench"), required=True)
    parser.add_argument("--task", help="of an SCBench file (default: the file's name)")
    parser.add_argument(
        "--question", choices=QUESTIONS, default="unseen", help="while compressing (default: %(default)s)"
    )
    parser.add_argument("--turns", choices=TURNS, default="requests", help="default: %(default)s")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="M", help="as for zoo.chat (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--cache", default="headkv", metavar="C", help="as for zoo.chat (default: %(default)s)")
    parser.add_argument("--budget", metavar="B", help="as for zoo.chat")
    parser.add_argument("--importance", type=Path, metavar="P", help="head scores, as for zoo.chat")
    parser.add_argument("--sharing", type=Path, metavar="P", help="layers that share, as for zoo.chat")
    parser.add_argument("--device", default="cpu", metavar="D", help="as for zoo.chat (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSONL, a row per question; goes on where it ends")
    args = parser.parse_args(argv)
    contexts = read_longbench(args.data) if args.format == "longbench" else read_scbench(args.data, args.task)
    if len({shared.id for shared in contexts}) < len(contexts):
        raise ValueError(f"{args.data} has contexts of the same id: give each its own")
    cli.check_cache(args)
    hidden = {"data", "output", "task", "importance", "sharing", "device"}
    settings = {key: value for key, value in vars(args).items() if key not in hidden}
    settings["usual_task"] = None if args.format == "longbench" else args.task or args.data.stem
    settings["data_sha256"] = _sha256(args.data)
    settings["importance_sha256"] = None if args.importance is None else _sha256(args.importance)
    settings |= {"sharing_sha256": _sha256(args.sharing)} if args.sharing else {}
    said = False
    done = _finished(args.output, settings, {shared.id: len(shared.turns) for shared in contexts})
    loaded = load(args.model, dtype=args.dtype, device=args.device)
    most = max(turn.max_new_tokens for shared in contexts for turn in shared.turns)
    engine = Engine(
        loaded,
        cache=args.cache,
        budget=args.budget,
        importance=args.importance,
        sharing=args.sharing,
        max_context=check_fits(loaded, contexts),
        max_new_tokens=most,
    )

    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    left = [shared for shared in contexts if shared.id not in done]
    with args.output.open("a") as file:
        commit = machine.commit()
        for shared in track(left, "contexts", console=console, disable=not console.is_terminal):
            start = time.perf_counter()
            rows: list[dict[str, Any]] = []
            for turn, answer in answers(engine, shared, question=args.question, turns=args.turns):
                row = {"id": shared.id, "turn": len(rows), "task": turn.task, "answer": answer}
                said = said or bool(answer.strip())
                rows.append(settings | row | {"score": turn.score(answer), "cache_bytes": engine.stats().nbytes})
            seconds = time.perf_counter() - start
            file.writelines(
                json.dumps(row | {"context_seconds": round(seconds, 3), "commit": commit}) + "\n" for row in rows
            )
            file.flush()
            done[shared.id] = [row["score"] for row in rows]
    if left and not said:
        cli.note("no answer says anything: prompts are the file's plain texts, which a model made for chats may end")
    scores = [score for scores in done.values() for score in scores]
    print(
        f"{sum(scores) / len(scores):.3f} over {len(scores)} questions on {len(done)} contexts, "
        f"{args.cache}, question {args.question}, {args.turns}"
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _finished(output: Path, settings: dict[str, Any], turns: dict[str, int]) -> dict[str, list[float]]:
    """Scores by context of an earlier run with the same settings."""
    cli.check_writable("--output", output)
    if not output.exists():
        return {}
    scores: dict[str, list[float]] = {}
    for number, line in enumerate(output.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            if any(row[key] != value for key, value in settings.items()):
                raise ValueError("is of a run with other settings")
            scores.setdefault(row["id"], []).append(row["score"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{output}, line {number}: {error}; choose another --output") from None
    if broken := [name for name, found in scores.items() if len(found) != turns.get(name)]:
        raise ValueError(f"{output} holds only a part of context {broken[0]}: remove its rows, or choose another file")
    return scores


if __name__ == "__main__":
    sys.exit(main())
