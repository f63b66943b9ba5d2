"""Scores on lm-eval's tasks through a compressed cache: lm-eval's own command, with our model for a default."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from checkpoints.resolve import DEFAULT_MODEL
from zoo.cli import run

PROGRAM = "python -m zoo.evaluate"
_HELP = f"""usage: {PROGRAM} --tasks TASK [TASK ...] [--model_args KEY=VALUE,...] [options of lm-eval]

Every option is lm-eval's own and is listed below; the model is `zoo` unless --model says otherwise, on the CPU unless
--device does. Its --model_args:

  pretrained=M        an alias, a checkpoint directory, a .gguf file or a hub id
  cache=METHOD        as --cache of python -m zoo.chat; quote options: 'cache="headkv:beta=1.2,scores=r"'
  budget=B            tokens of the context kept per KV head (128), or a share of it (12.5%)
  dtype=D weights=int8 device=D importance=FILE sharing=FILE compile=True
  batch_size=N        contexts at a time, longest first; those that requests share count once
  max_length=N        tokens of a request at most (default: what the model was trained for)
  truncate=left       cut off the beginning of contexts that are too long, instead of refusing them
  question=unseen     compress only what comes before the last separator=TEXT in a context; the rest is read afterwards
  stride=N            where whole texts are scored: tokens per piece that is scored, then compressed (default: 64)
  seed=N              of sampled answers

--use_cache FILE keeps every result as soon as it is there, and a run that was interrupted finds them again. A file
belongs to one model and one setting of its cache; it is refused to others.

examples:
  {PROGRAM} --tasks arc_easy --limit 100 --model_args cache=headkv,budget=128,batch_size=4
  {PROGRAM} --tasks my_task --include_path tasks/ --apply_chat_template --output_path results/ --log_samples

What follows is lm-eval's.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run lm-eval's command.

    Args:
        argv: options; None takes those of the process.

    Returns:
        The exit status.
    """
    return run("evaluate", partial(_evaluate, list(sys.argv[1:] if argv is None else argv)))


def _evaluate(argv: list[str]) -> None:
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.config.evaluate_config import EvaluatorConfig
        from lm_eval.utils import setup_logging, simple_parse_args_string

        import zoo.harness  # noqa: F401  (registers the model)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}: run `pip install -c constraints.txt -e '.[eval]'` in the project's folder"
        ) from None
    if not argv or argv[0].startswith("-"):
        argv = ["run", *argv]
    if {"-h", "--help"} & set(argv):
        print(_HELP)
    setup_logging()
    before, sys.argv = sys.argv, [PROGRAM, *argv]  # lm-eval reads it from there
    try:
        harness = HarnessCLI()
        args = harness.parse_args()
    except SystemExit as leaving:
        if leaving.code:
            raise ValueError("lm-eval does not take these options; see --help") from None
        raise
    finally:
        sys.argv = before
    if args.command == "run":
        chosen = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
        for name, value in {"model": "zoo", "device": "cpu"}.items():
            if getattr(args, name) is None and name not in chosen:
                setattr(args, name, value)
        if (args.model or chosen["model"]) == "zoo":  # said aloud, for tasks that count by its tokenizer
            given = args.model_args or chosen.get("model_args") or {}
            given = simple_parse_args_string(given) if isinstance(given, str) else given
            args.model_args = {"pretrained": DEFAULT_MODEL, **given}
        if output := args.output_path or chosen.get("output_path"):
            _check_writable(Path(output))
    harness.execute(args)


def _check_writable(output: Path) -> None:
    """Refuse a place where lm-eval, which would only warn about it at the end, could not leave its results."""
    folder = output.parent if output.suffix == ".json" else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--output_path {output} cannot be written ({error.strerror}): give a folder, or a .json file in one"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
