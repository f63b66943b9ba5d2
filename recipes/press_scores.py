"""The presses of kvpress on the leaderboard's questions: same weights, same prompts, as many tokens per KV head.

A press is named `kvpress:snapkv`, or `kvpress:snapkv(window_size=32,kernel_size=13)` where not all is its default;
`kvpress:full` compresses nothing. Each press and budget pays a prefill of its own. With the question seen, the whole
prompt is compressed; unseen, the context, and the question stays whole behind it, as in kvpress's pipeline.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from recipes.peers import PEERS, Shared
from recipes.questions import Question

PRESSES = {
    "snapkv": "SnapKVPress",
    "pyramidkv": "PyramidKVPress",
    "adakv": "AdaKVPress",
    "expectedattention": "ExpectedAttentionPress",
    "streamingllm": "StreamingLLMPress",
    "tova": "TOVAPress",
    "keydiff": "KeyDiffPress",
}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What presses did with one question; everything by name and budget, as in the leaderboard's rows.

    Args:
        results: the answer's score, 0 to 1, and the gold answer's negative log-likelihood, nats per token.
        mebibytes: that their caches take, with the question and room for an answer.
        kept: tokens of what was compressed, mean over KV heads.
    """

    results: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    mebibytes: dict[str, dict[str, float]] = field(default_factory=dict)
    kept: dict[str, dict[str, float]] = field(default_factory=dict)


def names(peers: Iterable[str]) -> list[str]:
    """Names of presses, where `kvpress` stands for all of them with their defaults.

    Raises:
        ValueError: there is no such press or option, or kvpress is not installed.
    """
    found = [name for peer in peers for name in ([f"kvpress:{x}" for x in PRESSES] if peer == "kvpress" else [peer])]
    for name in found:
        make_press(name, ratio=0.0)
    return list(dict.fromkeys(found))


def versions() -> dict[str, str]:
    """Of the programs that compute here."""
    return {name: version(name) for name in ("kvpress", "transformers")}


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """A press and its options.

    Raises:
        ValueError: it is not a name of one.

    Example:
        >>> parse("kvpress:snapkv(window_size=32,kernel_size=13)")
        ('snapkv', {'window_size': 32, 'kernel_size': 13})
        >>> parse("kvpress:tova")
        ('tova', {})
    """
    program, _, press = name.partition(":")
    kind, bracket, _ = press.partition("(")
    if program != "kvpress" or kind not in (*PRESSES, "full"):
        raise ValueError(f"no peer is called {name!r}: there are kvpress and kvpress: with full, {', '.join(PRESSES)}")
    if not bracket:
        return kind, {}
    try:
        call: Any = ast.parse(press, mode="eval").body
        if kind == "full" or call.args or not isinstance(call.func, ast.Name):
            raise ValueError
        return kind, {option.arg: ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(f"{name!r} is not a press with options, as kvpress:snapkv(window_size=32) is") from None


def make_press(name: str, ratio: float) -> Any:
    """Make a press.

    Args:
        name: see `parse`.
        ratio: share of the tokens to drop.

    Returns:
        The press, None for `kvpress:full`.

    Raises:
        ValueError: there is no such press or option, or kvpress is not installed.
    """
    kind, options = parse(name)
    if not PEERS["kvpress"].is_installed():
        raise ValueError("kvpress is not installed: run pip install -e '.[peers]' in an environment of its own")
    import kvpress

    try:
        if kind == "full":
            return None
        if kind == "adakv":
            outer = {key: options.pop(key) for key in ("alpha_safeguard",) if key in options}
            return kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio, **options), **outer)
        return getattr(kvpress, PRESSES[kind])(compression_ratio=ratio, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{name}: {error}") from None


def evaluate(
    shared: Shared, question: Question, *, mode: str, presses: Mapping[str, Collection[int]], room: int
) -> Scores:
    """Ask one question through the caches that presses leave.

    Args:
        shared: the model.
        question: the question.
        mode: "seen" while compressing, or "unseen": asked after it.
        presses: budgets by name, in tokens per KV head.
        room: tokens of an answer, in the bytes that are reported.

    Returns:
        Scores, bytes and kept tokens.

    Raises:
        ValueError: a press cannot compress this prompt to a budget, or kept more or less than the budget.
    """
    scores, later = Scores(), question.question if mode == "unseen" else []
    ids = question.context if later else question.context + question.question
    for name, budgets in presses.items():
        for budget in budgets:
            prompt = Pressed(shared, name, ids, budget)
            prompt.read(later)
            nbytes = prompt.nbytes(room)
            forced = question.lead + question.gold
            right, nll = question.likelihood(prompt.read(forced[:-1]))
            score = float(right)
            if question.example is not None:
                prompt.forget(len(forced) - 1)
                score = question.score(shared.loaded.tokenizer.decode(_generate(shared, prompt, question)))
            scores.results.setdefault(name, {})[str(budget)] = [round(score, 4), round(nll, 5)]
            scores.mebibytes.setdefault(name, {})[str(budget)] = round(nbytes / 2**20, 2)
            scores.kept.setdefault(name, {})[str(budget)] = round(prompt.kept, 3)
    return scores


def _generate(shared: Shared, prompt: Pressed, question: Question) -> list[int]:
    assert question.example is not None
    tokens: list[int] = []
    logits_V = prompt.read(question.lead)[-1]
    while len(tokens) < question.example.max_new_tokens:
        token = int(logits_V.argmax())
        if token in shared.loaded.chat.stop_ids:
            break
        tokens.append(token)
        logits_V = prompt.read([token])[-1]
    return tokens


class Pressed:
    """A prompt in the cache that a press leaves, to be read on from until the model takes in another.

    Args:
        shared: the model.
        name: of the press.
        ids: what is compressed.
        budget: tokens per KV head.

    Raises:
        ValueError: the press cannot do that, or does something else.

    Attributes:
        kept: tokens that attention reads, mean over KV heads.
    """

    @torch.inference_mode()
    def __init__(self, shared: Shared, name: str, ids: list[int], budget: int) -> None:
        from transformers import DynamicCache

        self._model: Any = shared.transformers
        self._cache: Any = DynamicCache(config=self._model.config)
        self._seen = 0
        # A press keeps int(tokens * (1 - ratio)) or rounds that: a little more keeps errors from taking a token away.
        press = make_press(name, ratio=max(0.0, 1 - (budget + 1e-6) / len(ids)))
        try:
            with press(self._model) if press else nullcontext():
                self._logits = [*self._forward(ids)]
        except AssertionError as error:
            raise ValueError(f"{name} cannot compress {len(ids)} tokens to {budget}: {error}") from None
        masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self._model.model.layers]
        self._masks: list[Tensor] = [index for mask in masks if mask is not None for index in mask]
        layers: list[Any] = self._cache.layers
        lengths = [layer.keys.shape[2] for layer in layers]
        hidden = sum(map(len, self._masks)) / 3 / self._model.config.num_key_value_heads
        self.kept = (sum(lengths) - hidden) / len(lengths)
        # A pyramid rounds in each layer. All others hit the budget.
        if abs(self.kept - min(budget, len(ids))) > (0.5 if "pyramidkv" in name else 0):
            raise ValueError(f"{name} kept {self.kept} of {len(ids)} tokens per KV head, not {budget}")
        # Several tokens in one pass share a mask as long as the first layer, and AdaKV hides keys from them by making
        # one key that is far from all of their queries: where layers differ or keys are hidden they go one by one.
        self._alike = not self._masks and len(set(lengths)) == 1

    def _forward(self, ids: list[int]) -> Tensor:
        ids_1T = torch.tensor([ids], device=self._model.device)
        position_1T = torch.arange(self._seen, self._seen + len(ids), device=ids_1T.device)[None]
        keep = 1 if self._seen == 0 else len(ids)  # of a prompt only the last logits are of use, and all are large
        self._seen += len(ids)
        out = self._model(ids_1T, position_ids=position_1T, past_key_values=self._cache, logits_to_keep=keep)
        logits_TV: Tensor = out.logits[0]
        return logits_TV

    @torch.inference_mode()
    def read(self, ids: list[int]) -> Tensor:
        """Take more tokens in, uncompressed.

        Args:
            ids: N token ids.

        Returns:
            (N + 1, V) logits: of the token after what was there, and after each of `ids`.
        """
        for part in [ids] if ids and self._alike else [[token] for token in ids]:
            self._logits += self._forward(part)
        return torch.stack(self._logits[-len(ids) - 1 :])

    def forget(self, tokens: int) -> None:
        """Go back to before the last tokens that were read."""
        if tokens:
            self._cache.crop(-tokens)
            del self._logits[-tokens:]
            self._seen -= tokens

    def nbytes(self, room: int) -> int:
        """What the cache takes now, what AdaKV notes included, and with room for further tokens."""
        held = [x for layer in self._cache.layers for x in (layer.keys, layer.values)]
        token: int = sum(x[:, :, :1].nbytes for x in held)
        now: int = sum(x.nbytes for x in (*held, *self._masks))
        return now + room * token
