"""How much weights of lower precision, or a compressed context, cost: perplexity on the same text, and the difference.

    python -m recipes.perplexity --text book.txt --cache headkv --budget 64

Without a text of yours it is the reference manual that ships inside Python (`pydoc_data.topics`, PSF licence): prose
that nobody has to download. Absolute perplexities say little, as windows begin in the middle of the text; what counts
is the difference, paired window by window, with its interval. With a cache, a window is read in chunks: each is scored
through what the cache kept of the chunks before it, then compressed itself. The first chunk, which has nothing before
it, is not counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoints.resolve import DEFAULT_MODEL
from zoo import Engine, cli, load
from zoo.load import DTYPES, Loaded


def manual() -> str:
    """The reference manual that ships inside Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(loaded: Loaded, text: str, count: int, tokens: int) -> list[list[int]]:
    """Consecutive windows from the beginning of a text, by the model's own tokenizer.

    Args:
        loaded: the model whose tokenizer cuts the text.
        text: the text.
        count: windows wanted.
        tokens: length of each.

    Returns:
        Token ids per window.

    Raises:
        ValueError: the text is shorter than that.
    """
    ids = loaded.tokenizer.encode(text[: count * tokens * 16])  # enough of nearly every text, and of long ones soon
    if len(ids) < count * tokens:
        ids = loaded.tokenizer.encode(text)
    if len(ids) < count * tokens:
        raise ValueError(
            f"the text has {len(ids)} tokens, not {count} windows of {tokens}: ask for fewer or shorter ones"
        )
    return [ids[i * tokens : (i + 1) * tokens] for i in range(count)]


@torch.inference_mode()
def nll(loaded: Loaded, ids: Sequence[int], start: int = 1) -> float:
    """Mean negative log-likelihood, in nats, of all tokens from one on.

    Args:
        loaded: the model.
        ids: the window.
        start: the first token to count, at least 1.
    """
    ids_1T = torch.tensor([ids], device=loaded.model.embed.weight.device)
    return _mean_nll(loaded.model(ids_1T)[0], ids, start)


@torch.inference_mode()
def compressed_nll(engine: Engine, ids: Sequence[int], chunk: int) -> float:
    """The same of all tokens after the first chunk, the chunks before each one compressed.

    Args:
        engine: whose cache compresses.
        ids: the window, longer than a chunk.
        chunk: tokens that are read at a time.
    """
    states_1TE: list[torch.Tensor] = []
    last = engine.blocks[-1]
    hook = last.register_forward_hook(lambda block, arguments, x_1TE: states_1TE.append(x_1TE))
    try:
        engine.prefill([ids[:chunk]])
        for first in range(chunk, len(ids), chunk):
            engine.extend([ids[first : first + chunk]])
    finally:
        hook.remove()
    return _mean_nll(engine.model.logits(torch.cat(states_1TE, 1))[0], ids, chunk)


def _mean_nll(logits_TV: torch.Tensor, ids: Sequence[int], start: int) -> float:
    wanted_T = torch.tensor(ids[start:], device=logits_TV.device)
    return F.cross_entropy(logits_TV[start - 1 : -1].float(), wanted_T).item()


def compare(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Perplexities of two models on the same windows, and how much the second's is higher.

    Args:
        base: nats per token, one value per window.
        other: the same of the second model.

    Returns:
        Both perplexities, and the ratio minus one with its 95 % interval over windows, in per cent.

    Example:
        >>> compare([1.0, 2.0], [1.0, 2.0])["difference_percent"]
        0.0
    """
    more = torch.tensor(other, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    half = 1.96 * more.std().item() / math.sqrt(len(more))
    low, mean, high = (100 * math.expm1(more.mean().item() + step) for step in (-half, 0.0, half))
    return {
        "perplexity": math.exp(sum(base) / len(base)),
        "other_perplexity": math.exp(sum(other) / len(other)),
        "difference_percent": mean,
        "difference_low_percent": low,
        "difference_high_percent": high,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe.

    Args:
        argv: its options; None takes those of the process.

    Returns:
        The exit status; see `zoo.cli.run`.
    """
    return cli.run("recipes.perplexity", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    whole = cli.whole_number(2)
    parser = cli.Parser(prog="python -m recipes.perplexity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="M", help="as for zoo.chat (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base (default: %(default)s)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--against", choices=[*DTYPES, "int8"], default="int8", help="weights (default: %(default)s)")
    other.add_argument("--cache", metavar="C", help="against the same weights with this cache, as for zoo.chat")
    parser.add_argument("--budget", metavar="B", help="of the cache, as for zoo.chat")
    parser.add_argument("--importance", type=Path, metavar="P", help="of the cache's heads, as for zoo.chat")
    parser.add_argument("--sharing", type=Path, metavar="P", help="of the cache's layers, as for zoo.chat")
    parser.add_argument("--chunk", type=whole, default=256, help="tokens compressed at a time (default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="P", help="a UTF-8 file (default: Python's reference manual)")
    parser.add_argument("--windows", type=whole, default=24, help="default: %(default)s")
    parser.add_argument("--tokens", type=whole, default=1024, help="per window (default: %(default)s)")
    parser.add_argument("--device", default="cpu", metavar="D", help="as for zoo.chat (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    cli.check_writable("--output", args.output)
    of_cache = ("budget", "importance", "sharing")
    if args.cache is not None:
        cli.check_cache(args)
        if args.chunk >= args.tokens:
            raise ValueError(f"windows of {args.tokens} tokens hold no second chunk of {args.chunk}: lower --chunk")
    elif idle := [f"--{name}" for name in of_cache if getattr(args, name) is not None]:
        raise ValueError(f"only a cache takes {' and '.join(idle)}: give --cache too")
    text = manual() if args.text is None else cli.decoded(args.text.read_bytes(), str(args.text))
    load_on = partial(load, args.model, device=args.device, progress=sys.stderr.isatty())
    base = load_on(dtype=args.dtype)
    with cli.waiting("Reading the text"):
        texts = windows(base, text, args.windows, args.tokens)
    if args.cache is not None:
        args.against = args.cache if args.budget is None else f"{args.cache} at {args.budget}"
        options = {name: getattr(args, name) for name in of_cache}
        engine = Engine(base, cache=args.cache, max_context=args.tokens, max_new_tokens=1, **options)
        first, score = args.chunk, partial(compressed_nll, engine, chunk=args.chunk)
    else:
        weights = {"weights": "int8", "dtype": args.dtype} if args.against == "int8" else {"dtype": args.against}
        first, score = 1, partial(nll, load_on(**weights))

    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = track(texts, "windows", console=console, disable=not console.is_terminal)
    scores = [(nll(base, ids, first), score(ids=ids)) for ids in shown]
    unused = {"output"} if args.cache is not None else {"output", "cache", "chunk", *of_cache}
    settings = {key: value for key, value in vars(args).items() if key not in unused}
    settings["text"] = str(args.text or "pydoc_data.topics")
    settings["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    result = settings | compare(*(list(column) for column in zip(*scores, strict=True)))
    if args.output:
        args.output.write_text(json.dumps(result, default=str) + "\n")
    print(
        f"{args.dtype} {result['perplexity']:.3f}, {args.against} {result['other_perplexity']:.3f}: "
        f"{result['difference_percent']:+.2f} % [{result['difference_low_percent']:+.2f}, "
        f"{result['difference_high_percent']:+.2f}] over {args.windows} windows of {args.tokens} tokens"
    )


if __name__ == "__main__":
    sys.exit(main())
