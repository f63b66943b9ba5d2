"""Find out which query heads retrieve, and which layers compression harms, in any model that we load.

    python -m recipes.calibrate_heads --model smollm2-135m --output zoo/importance/smollm2-135m.json

A trial is a needle prompt with the gold answer appended, run through the model once. For the answer's tokens only, the
attention of every head is looked at: does it point to where the answer stands in the prompt (R, R2), or to anything
that was hidden there, the words around the answer included (semantic)? Trials that the model itself does not answer say
nothing about its heads and are left out.

The others are run once more. Each layer alone keeps the 32 tokens of the prompt that its best semantic heads choose:
how far does that move its attention output while the answer is written (layer errors)?

What is done is kept beside the output until all is done, so a run that was interrupted goes on where it was.

Source:
    Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, 2024 (R); Fu et al., HeadKV, ICLR 2025,
    equations 1 and 2 (R, R2); CompressKV, 2025 (semantic retrieval heads, layer errors).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from checkpoints import CheckpointError, HeadImportance, config_hash, write_importance
from layers.cache.base import NoCache
from recipes.needles import SPLITS, TASKS, NeedlePrompt, make_prompt
from zoo import Loaded, load

ACCEPTED_SHARE = 0.75
MIN_ACCEPTED = 8


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one prompt says about the heads.

    Args:
        kind: of its fact.
        accepted: the model gave at least three quarters of the answer's tokens by itself.
        r_LN: retrieval scores.
        r2_LN: retrieval-and-reasoning scores.
        semantic_LN: semantic retrieval scores.
    """

    kind: str
    accepted: bool
    r_LN: Tensor
    r2_LN: Tensor
    semantic_LN: Tensor


class AnswerAttention:
    """Attends as usual and notes, layer by layer, how the last queries' attention falls on what was hidden.

    Args:
        prompt: where things are in the sequence.
        ids_T: all tokens of the sequence: the prompt and its answer, but for the answer's last token.
    """

    def __init__(self, prompt: NeedlePrompt, ids_T: Tensor) -> None:
        self.prompt, self.ids_T = prompt, ids_T
        self.answer_A = torch.tensor(prompt.value, device=ids_T.device)
        self.r_LN: list[Tensor] = []
        self.r2_LN: list[Tensor] = []
        self.semantic_LN: list[Tensor] = []

    def attend(self, layer_1: Tensor, q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int | None) -> Tensor:
        """Attend within the sequence; see `layers.cache.base.KVCache`."""
        logit_NAT, seen_AT = logits(q_BTND[:, -len(self.answer_A) :], k_BTHD.transpose(1, 2), window)
        weight_NAT = logit_NAT.masked_fill(~seen_AT, float("-inf")).softmax(-1)
        r_N, r2_N = retrieval_scores(weight_NAT, self.ids_T, self.answer_A, self.prompt.gold)
        self.r_LN.append(r_N)
        self.r2_LN.append(r2_N)
        self.semantic_LN.append(semantic_scores(weight_NAT, self.ids_T, self.answer_A, self.prompt.statement))
        return NoCache().attend(layer_1, q_BTND, k_BTHD, v_BTHD, window)


def logits(q_1AND: Tensor, k_1HTD: Tensor, sliding: int | None) -> tuple[Tensor, Tensor]:
    """Scaled products of a sequence's last A queries with all T keys, (N, A, T), and which are seen, (A, T)."""
    q_NAD, k_HTD = q_1AND[0].transpose(0, 1).float(), k_1HTD[0].float()
    k_NTD = k_HTD.repeat_interleave(len(q_NAD) // len(k_HTD), dim=0)
    place_T = torch.arange(k_NTD.shape[1], device=q_NAD.device)
    row_A1 = place_T[-q_NAD.shape[1] :, None]
    seen_AT = place_T <= row_A1
    if sliding is not None:
        seen_AT &= place_T > row_A1 - sliding
    return (q_NAD @ k_NTD.transpose(1, 2)) * q_NAD.shape[-1] ** -0.5, seen_AT


def retrieval_scores(weight_NAT: Tensor, ids_T: Tensor, answer_A: Tensor, gold: range) -> tuple[Tensor, Tensor]:
    """R and R2 of every head for one answer.

    With C the places of the gold answer: R counts steps whose most attended place lies in C and holds the token to be
    produced; R2 adds up, over the |C| most attended places of each step, the attention of those in C. Both are divided
    by |C|.

    Args:
        weight_NAT: attention of each head from each of A answer steps.
        ids_T: the sequence.
        answer_A: the token that each step is to produce.
        gold: C.

    Returns:
        R (N,) and R2 (N,).

    Example:
        >>> weight = torch.tensor([[[0.1, 0.7, 0.2]]])
        >>> r, r2 = retrieval_scores(weight, torch.tensor([5, 6, 7]), torch.tensor([6]), range(1, 2))
        >>> r.tolist(), round(float(r2), 3)
        ([1.0], 0.7)
    """
    best_NAC, place_NAC = weight_NAT.topk(len(gold), dim=-1)
    inside_NAC = (place_NAC >= gold.start) & (place_NAC < gold.stop)
    copied_NA = inside_NAC[..., 0] & (ids_T[place_NAC[..., 0]] == answer_A)
    return copied_NA.sum(-1) / len(gold), (best_NAC * inside_NAC).sum((-1, -2)) / len(gold)


def semantic_scores(weight_NAT: Tensor, ids_T: Tensor, answer_A: Tensor, statement: range) -> Tensor:
    """How much of every head's attention falls on all that was hidden while tokens of it are written.

    Of each answer step, the attention on the whole statement counts as often as the step's token occurs in it.

    Args:
        weight_NAT: attention of each head from each of A answer steps.
        ids_T: the sequence.
        answer_A: the token that each step is to produce.
        statement: places of what was hidden.

    Returns:
        (N,).

    Example:
        >>> weight = torch.tensor([[[0.1, 0.7, 0.2]]])
        >>> semantic_scores(weight, torch.tensor([5, 6, 6]), torch.tensor([6]), range(1, 3))
        tensor([1.8000])
    """
    times_A = (ids_T[statement.start : statement.stop] == answer_A[:, None]).sum(-1)
    return (weight_NAT[..., statement.start : statement.stop].sum(-1) * times_A).sum(-1)


@torch.inference_mode()
def run_trial(loaded: Loaded, prompt: NeedlePrompt) -> Trial:
    """Score all heads on one prompt, in one forward."""
    device = loaded.model.embed.weight.device
    answer_A = torch.tensor(prompt.value, device=device)
    ids_T = torch.tensor(prompt.ids + prompt.lead + prompt.value[:-1], device=device)
    recorder = AnswerAttention(prompt, ids_T)
    position_1T = torch.arange(len(ids_T), device=device)[None]
    x_1TE = loaded.model.hidden(ids_T[None], loaded.model.rope(position_1T, len(ids_T)), recorder)
    said_A = loaded.model.logits(x_1TE[0, -len(answer_A) :]).argmax(-1)
    accepted = float((said_A == answer_A).float().mean()) >= ACCEPTED_SHARE
    r_LN, r2_LN, semantic_LN = (torch.stack(x).cpu() for x in (recorder.r_LN, recorder.r2_LN, recorder.semantic_LN))
    return Trial(kind=prompt.kind, accepted=accepted, r_LN=r_LN, r2_LN=r2_LN, semantic_LN=semantic_LN)


def calibration_prompts(loaded: Loaded, *, trials: int, lengths: list[int], seed: int) -> list[NeedlePrompt]:
    """Every kind of fact in turn, in noise and in prose in turn, at random depths and lengths."""
    rng = random.Random(f"calibrate/{seed}")
    kinds = list(SPLITS["calibrate"].kinds)
    return [
        make_prompt(
            loaded.tokenizer,
            loaded.chat,
            split="calibrate",
            task=TASKS[index % len(TASKS)],
            kind=kinds[index % len(kinds)],
            tokens=rng.choice(lengths),
            depth=rng.random(),
            seed=f"{seed}/{index}",
        )
        for index in range(trials)
    ]


def agreement(scores: list[Tensor]) -> float:
    """Correlation between the mean scores of every other trial and of the rest; 0 where all scores are equal."""
    halves = torch.stack([torch.stack(scores[start::2]).mean(0).flatten() for start in (0, 1)])
    return float(torch.corrcoef(halves)[0, 1].nan_to_num())


def calibrate(loaded: Loaded, *, trials: int, lengths: list[int], seed: int, command: str) -> list[HeadImportance]:
    """Find the scores of all query heads.

    Args:
        loaded: the model.
        trials: prompts to try.
        lengths: prompt lengths in tokens to draw from.
        seed: of the prompts.
        command: noted in the file.

    Returns:
        R, from plain facts, and R2, from plain facts and comparisons.

    Raises:
        ValueError: fewer than 8 trials were answered, **or** a prompt length beyond the model's context.
    """
    if max(lengths) + 64 > loaded.config.max_position:
        raise ValueError(
            f"prompts of {max(lengths)} tokens and an answer do not fit {loaded.config.max_position}: shorten"
        )
    prompts = calibration_prompts(loaded, trials=trials, lengths=lengths, seed=seed)
    tried = [run_trial(loaded, p) for p in track(prompts, "Calibrating", console=Console(stderr=True))]
    accepted = [trial for trial in tried if trial.accepted]
    plain = [trial.r_LN for trial in accepted if trial.kind != "comparison"]
    everything = [trial.r2_LN for trial in accepted]
    if len(plain) < MIN_ACCEPTED:
        raise ValueError(
            f"{loaded.name} answered only {len(plain)} plain questions in {trials} needle prompts, {MIN_ACCEPTED} are "
            "needed: raise --trials, shorten --lengths, or use a model that can retrieve"
        )
    provenance = {
        "command": command,
        "seed": seed,
        "lengths": lengths,
        "tried": dict(Counter(trial.kind for trial in tried)),
        "accepted": dict(Counter(trial.kind for trial in accepted)),
        "split_half_correlation": {"r": round(agreement(plain), 4), "r2": round(agreement(everything), 4)},
    }
    return [
        HeadImportance(
            model_id=loaded.name,
            config_hash=config_hash(loaded.config),
            tokenizer_hash=loaded.tokenizer.fingerprint(),
            method=method,
            trials=len(scores),
            scores_LN=tuple(tuple(round(x, 7) for x in row) for row in torch.stack(scores).mean(0).tolist()),
            provenance=provenance,
        )
        for method, scores in (("r", plain), ("r2", everything))
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.calibrate_heads", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, directory, .gguf file or hub id")
    parser.add_argument("--output", type=Path, required=True, help="json file to write")
    parser.add_argument("--trials", type=int, default=40, help="needle prompts to try")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[300, 600, 1200], help="prompt tokens, drawn from these"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args(argv)
    command = "python -m recipes.calibrate_heads " + " ".join(sys.argv[1:] if argv is None else argv)
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        loaded = load(args.model, dtype=args.dtype, device=args.device)
        scores = calibrate(loaded, trials=args.trials, lengths=args.lengths, seed=args.seed, command=command)
        write_importance(args.output, scores)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for item in scores:
        halves = item.provenance["split_half_correlation"][item.method]
        print(f"{item.method}: {item.trials} trials, correlation of their halves {halves}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
