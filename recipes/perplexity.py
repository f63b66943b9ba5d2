"""How much weights of lower precision cost: perplexity on the same text, and the difference with its interval.

The text is the reference manual that ships inside Python (`pydoc_data.topics`, PSF licence): prose that nobody has to
download. Absolute perplexities on it say little; what counts is the difference, paired window by window.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoints.resolve import DEFAULT_MODEL
from zoo import cli, load
from zoo.load import DTYPES, Loaded


def windows(loaded: Loaded, count: int, tokens: int) -> list[list[int]]:
    """Consecutive windows of the text, by the model's own tokenizer.

    Args:
        loaded: the model whose tokenizer cuts the text.
        count: windows wanted.
        tokens: length of each.

    Returns:
        Token ids per window.

    Raises:
        ValueError: the text is shorter than that.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = loaded.tokenizer.encode(text[: count * tokens * 8])
    if len(ids) < count * tokens:
        raise ValueError(f"the text has {len(ids)} tokens, not {count} windows of {tokens}: ask for fewer")
    return [ids[i * tokens : (i + 1) * tokens] for i in range(count)]


@torch.inference_mode()
def nll(loaded: Loaded, ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of every token but the first, in nats."""
    logits_TV = loaded.model(torch.tensor([ids]))[0, :-1].float()
    return F.cross_entropy(logits_TV, torch.tensor(ids[1:])).item()


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
    parser.add_argument("--against", choices=[*DTYPES, "int8"], default="int8", help="default: %(default)s")
    parser.add_argument("--windows", type=whole, default=24, help="default: %(default)s")
    parser.add_argument("--tokens", type=whole, default=1024, help="per window (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output} cannot be written: there is no folder {args.output.parent}")
    base = load(args.model, dtype=args.dtype)
    if args.against == "int8":
        other = load(args.model, dtype=args.dtype, weights="int8")
    else:
        other = load(args.model, dtype=args.against)

    from rich.progress import track

    texts = windows(base, args.windows, args.tokens)
    scores = [(nll(base, ids), nll(other, ids)) for ids in track(texts, "windows", disable=not sys.stderr.isatty())]
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    result = settings | compare(*(list(column) for column in zip(*scores, strict=True)))
    if args.output:
        args.output.write_text(json.dumps(result) + "\n")
    print(
        f"{args.dtype} {result['perplexity']:.3f}, {args.against} {result['other_perplexity']:.3f}: "
        f"{result['difference_percent']:+.2f} % [{result['difference_low_percent']:+.2f}, "
        f"{result['difference_high_percent']:+.2f}] over {args.windows} windows of {args.tokens} tokens"
    )


if __name__ == "__main__":
    sys.exit(main())
