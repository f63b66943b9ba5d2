"""`python -m zoo.generate`: continue a raw text, without any chat template."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from zoo import cli, listing
from zoo.answer import Answer, cache_figures, show

_DESCRIPTION = "Continue a text. The continuation alone goes to standard output, everything else to standard error."
_EXAMPLES = """examples:
  python -m zoo.generate --prompt "The capital of France is" --max-new-tokens 16
  python -m zoo.generate --prompt-file book.txt --cache snapkv --budget 10% --stats
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its options; None takes those of the process.

    Returns:
        The exit status; see `zoo.cli.run`.
    """
    return cli.run("zoo.generate", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    args = cli.parser("python -m zoo.generate", _DESCRIPTION, _EXAMPLES).parse_args(argv)
    if args.list is not None:
        return listing.show(args.list)
    prompt = cli.read_prompt(args)
    if prompt is None:
        raise ValueError("there is no prompt: give --prompt TEXT or --prompt-file P (- is standard input)")
    loaded = cli.load_model(args)
    ids = loaded.tokenizer.encode(prompt, bos=loaded.tokenizer.adds_bos)
    engine = cli.make_engine(args, loaded, prompt=ids)
    answer = Answer(engine, ids, cli.sampling(args))
    show(answer)
    if args.stats:
        cli.note(cache_figures(engine))
        cli.note(answer.speed)


if __name__ == "__main__":
    sys.exit(main())
