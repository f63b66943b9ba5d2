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

import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from checkpoints import HeadImportance, config_hash, write_importance
from checkpoints.storage import atomic_file
from layers.block import Block
from layers.cache.base import NoCache
from layers.compress.scorers import Observation
from layers.methods import build_method
from layers.methods.base import Method
from recipes.needles import SPLITS, TASKS, NeedlePrompt, make_prompt
from recipes.replay import Record
from zoo import Loaded, cli, load

ACCEPTED_SHARE = 0.75
MIN_ACCEPTED = 8
ERROR_BUDGET = 32


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

    def to_json(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trial:
        """The reverse of `to_json`."""
        values: dict[str, Any] = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


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


@torch.inference_mode()
def compression_errors(loaded: Loaded, prompt: NeedlePrompt, method: Method) -> Tensor:
    """How far compressing each layer alone moves its attention output, over the steps that write the answer.

    With O_t a layer's attention output (after its projection) at step t, and O'_t the same where of the prompt only
    `ERROR_BUDGET` tokens are left, e = sum over t of |O_t - O'_t| / (|O_t| + 1e-5).

    Args:
        loaded: the model.
        prompt: and its answer.
        method: chooses the tokens, the same for all KV heads of a layer.

    Returns:
        (L,).
    """
    record = Record(loaded, prompt.ids + prompt.lead + prompt.value[:-1])
    n, device = len(prompt.ids), record.logits_1V.device
    position_1S = torch.arange(n, dtype=torch.int32, device=device)[None]
    pos_1HS = position_1S[:, None].expand(-1, loaded.config.num_kv_heads, -1)
    keep_BH = torch.full((1, loaded.config.num_kv_heads), ERROR_BUDGET, device=device)
    protected_BHS = method.protects(pos_1HS, torch.tensor([n], device=device), keep_BH)
    errors = []
    blocks = cast("list[Block]", list(loaded.model.blocks))
    for index, (layer, block) in enumerate(zip(record.layers, blocks, strict=True)):
        seen = Observation(
            q_BTND=layer.q_BTND[:, :n],
            position_BT=position_1S,
            k_BHSD=layer.k_BHSD[:, :, :n],
            v_BHSD=layer.v_BHSD[:, :, :n],
            pos_BHS=pos_1HS,
            protected_BHS=protected_BHS,
            sliding=layer.sliding,
            layer=index,
        )
        score_BHS = method.scorer(seen).masked_fill(protected_BHS, float("inf"))
        best_S = score_BHS[0, 0].argsort(descending=True, stable=True)
        logit_NAT, seen_AT = logits(layer.q_BTND[:, n:], layer.k_BHSD, layer.sliding)
        left_AT = seen_AT.index_fill(1, best_S[ERROR_BUDGET:], False)
        v_NTD = layer.v_BHSD[0].repeat_interleave(len(logit_NAT) // layer.v_BHSD.shape[1], dim=0)
        full_AE, less_AE = (
            block.attention.out(
                (logit_NAT.masked_fill(~mask_AT, float("-inf")).softmax(-1).to(v_NTD.dtype) @ v_NTD)
                .transpose(0, 1)
                .flatten(1)
            ).float()
            for mask_AT in (seen_AT, left_AT)
        )
        errors.append(((full_AE - less_AE).norm(dim=-1) / (full_AE.norm(dim=-1) + 1e-5)).sum())
    return torch.stack(errors).cpu()


def mean_share(errors: Mapping[str, list[Tensor]]) -> Tensor:
    """Each layer's share of the error: for every kind of fact by itself, then their mean.

    Args:
        errors: (L,) of every trial, by kind.

    Returns:
        (L,), 1 in total.

    Example:
        >>> a, b, c = (torch.tensor(error) for error in ([1.0, 3.0], [8.0, 0.0], [0.0, 8.0]))
        >>> mean_share({"city": [a], "word": [b, c]})
        tensor([0.3750, 0.6250])
    """
    sums = torch.stack([torch.stack(of_kind).sum(0) for of_kind in errors.values()])
    return torch.nn.functional.normalize(sums, p=1, dim=1).mean(0)


class Progress:
    """What is done of a run, on disk from the moment it is done.

    Args:
        path: json file; if it exists, the run goes on from there.
        settings: what the results depend on.

    Raises:
        ValueError: the file is of a run with other settings, or is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "partial.json"
        >>> Progress(path, {"seed": 0}).once("one", lambda: 1), Progress(path, {"seed": 0}).once("one", lambda: 2)
        (1, 1)
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self._data = path, {"settings": dict(settings), "results": {}}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            same, self._data["results"] = found["settings"] == settings, dict(found["results"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, what an interrupted run left, is damaged: remove it") from None
        if not same:
            raise ValueError(f"{path} was left by a run with other settings ({found['settings']}): finish or remove it")

    def once(self, name: str, compute: Callable[..., Any], *arguments: object) -> Any:
        """The result of that name, computed and written if there is none yet."""
        results = self._data["results"]
        if name not in results:
            results[name] = compute(*arguments)
            with atomic_file(self.path) as partial:
                partial.write_text(json.dumps(self._data))
        return results[name]


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


def calibrate(
    loaded: Loaded, *, trials: int, lengths: list[int], seed: int, command: str, partial: Path
) -> list[HeadImportance]:
    """Find the scores of all query heads and the errors of all layers.

    Args:
        loaded: the model.
        trials: prompts to try.
        lengths: prompt lengths in tokens to draw from.
        seed: of the prompts.
        command: noted in the file.
        partial: file for what is done; whoever has stored the results removes it.

    Returns:
        R, from plain facts; semantic scores, R2 and layer errors, from plain facts and comparisons.

    Raises:
        ValueError: fewer than 8 trials were answered, **or** a prompt length beyond the model's context, **or** the
            partial file is of another run.
    """
    if max(lengths) + 64 > loaded.config.max_position:
        raise ValueError(
            f"prompts of {max(lengths)} tokens and an answer do not fit {loaded.config.max_position}: shorten"
        )
    prompts = calibration_prompts(loaded, trials=trials, lengths=lengths, seed=seed)
    identity = {
        "model_id": loaded.name,
        "config_hash": config_hash(loaded.config),
        "tokenizer_hash": loaded.tokenizer.fingerprint(),
    }
    dtype = str(loaded.model.embed.weight.dtype)
    progress = Progress(partial, {**identity, "dtype": dtype, "lengths": lengths, "seed": seed})
    console = Console(stderr=True)

    def trial_of(index: int) -> dict[str, Any]:
        return run_trial(loaded, prompts[index]).to_json()

    def errors_of(index: int) -> list[float]:
        errors: list[float] = compression_errors(loaded, prompts[index], method).tolist()
        return errors

    indices = track(range(trials), "Reading attention", console=console)
    tried = [Trial.from_json(progress.once(f"trial {index}", trial_of, index)) for index in indices]
    plain = [trial.r_LN for trial in tried if trial.accepted and trial.kind != "comparison"]
    if len(plain) < MIN_ACCEPTED:
        raise ValueError(
            f"{loaded.name} answered only {len(plain)} plain questions in {trials} needle prompts, {MIN_ACCEPTED} are "
            "needed: raise --trials, shorten --lengths, or use a model that can retrieve"
        )
    accepted = [(index, trial) for index, trial in enumerate(tried) if trial.accepted]
    scores = {
        "r": plain,
        "r2": [trial.r2_LN for _, trial in accepted],
        "semantic": [trial.semantic_LN for _, trial in accepted],
    }
    means = {kind: torch.stack(of_kind).mean(0) for kind, of_kind in scores.items()}

    method = build_method("compresskv:allocator=uniform", means)
    chosen = hashlib.sha256(repr(method.scorer).encode()).hexdigest()[:12]
    errors: dict[str, list[Tensor]] = {}
    for index, trial in track(accepted, "Compressing single layers", console=console):
        done = progress.once(f"errors {index} {chosen}", errors_of, index)
        errors.setdefault(trial.kind, []).append(torch.tensor(done))
    means["layer_errors"] = mean_share(errors)[:, None]
    scores["layer_errors"] = [error_L for of_kind in errors.values() for error_L in of_kind]

    provenance = {
        "command": command,
        "seed": seed,
        "lengths": lengths,
        "tried": dict(Counter(trial.kind for trial in tried)),
        "accepted": dict(Counter(trial.kind for _, trial in accepted)),
        "split_half_correlation": {kind: round(agreement(of_kind), 4) for kind, of_kind in scores.items()},
    }
    return [
        HeadImportance(
            **identity,
            method=kind,
            trials=len(scores[kind]),
            scores_LN=tuple(tuple(round(x, 7) for x in row) for row in mean.tolist()),
            provenance=provenance,
        )
        for kind, mean in means.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return cli.run("recipes.calibrate_heads", lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m recipes.calibrate_heads", description=__doc__.splitlines()[0])
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
    cli.check_writable("--output", args.output)
    command = "python -m recipes.calibrate_heads " + " ".join(sys.argv[1:] if argv is None else argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load(args.model, dtype=args.dtype, device=args.device)
    partial = args.output.with_name(f"{args.output.name}.partial")
    scores = calibrate(
        loaded, trials=args.trials, lengths=args.lengths, seed=args.seed, command=command, partial=partial
    )
    write_importance(args.output, scores)
    partial.unlink()
    for item in scores:
        halves = item.provenance["split_half_correlation"][item.method]
        print(f"{item.method}: {item.trials} trials, correlation of their halves {halves}")


if __name__ == "__main__":
    sys.exit(main())
