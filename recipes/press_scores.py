"""The presses of kvpress on the leaderboard's questions: same weights, same prompts, as many tokens per KV head.

A press is named `kvpress:snapkv`, or `kvpress:snapkv(window_size=32,kernel_size=13)` where not all is its default;
`kvpress:full` compresses nothing. With the question seen, the whole prompt is compressed; unseen, the context, and the
question stays whole behind it, as in kvpress's pipeline. A press acts behind each layer's attention, on nothing but
the cache, so that one prefill serves them all: each press has a cache of its own at each budget. What fails there fails
alone, and is named with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from recipes.peers import PEERS, Shared, Unsuitable
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
        refused: why there are no results.
    """

    results: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    mebibytes: dict[str, dict[str, float]] = field(default_factory=dict)
    kept: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)


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
        The press, for `kvpress:full` one that drops nothing.

    Raises:
        ValueError: there is no such press or option, or kvpress is not installed.
    """
    kind, options = parse(name)
    if not PEERS["kvpress"].is_installed():
        raise ValueError("kvpress is not installed: run pip install -e '.[peers]' in an environment of its own")
    import kvpress

    try:
        if kind == "full":
            return kvpress.ScorerPress()
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
        Scores, bytes and kept tokens; of what fails, why.
    """
    scores, later = Scores(), question.question if mode == "unseen" else []
    prompts = compress(shared, question.context if later else question.context + question.question, presses)
    while prompts:
        prompt = prompts.pop(0)  # and out of memory when done: AdaKV copies all tokens when it reads on
        name, budget = prompt.name, str(prompt.budget)
        try:
            right, nll = question.likelihood(prompt.read(later + question.lead + question.gold[:-1]))
            nbytes, score = prompt.nbytes(len(later) + room), float(right)
            if question.example is not None:
                prompt.forget(len(question.gold) - 1)
                score = question.score(shared.loaded.tokenizer.decode(_generate(shared, prompt, question)))
        except Unsuitable as reason:
            scores.refused.setdefault(name, {})[budget] = str(reason)
            continue
        scores.results.setdefault(name, {})[budget] = [round(score, 4), round(nll, 5)]
        scores.mebibytes.setdefault(name, {})[budget] = round(nbytes / 2**20, 2)
        scores.kept.setdefault(name, {})[budget] = round(prompt.kept, 3)
    return scores


def _generate(shared: Shared, prompt: Pressed, question: Question) -> list[int]:
    assert question.example is not None
    tokens: list[int] = []
    for _ in range(question.example.max_new_tokens):
        token = int(prompt.read(tokens[-1:])[-1].argmax())
        if token in shared.loaded.chat.stop_ids:
            break
        tokens.append(token)
    return tokens


@torch.inference_mode()
def compress(shared: Shared, ids: list[int], presses: Mapping[str, Collection[int]]) -> list[Pressed]:
    """Prefill once, for all presses and budgets in tokens per KV head."""
    prompts = [Pressed(shared, name, budget) for name, budgets in presses.items() for budget in budgets]
    with ExitStack() as stack:
        for prompt in prompts:
            # A press keeps int(tokens * (1 - ratio)) or rounds that: a little more keeps errors from taking one away.
            press = make_press(prompt.name, ratio=max(0.0, 1 - (prompt.budget + 1e-6) / len(ids)))
            press.forward_hook = partial(prompt.act, press.forward_hook)
            stack.callback(delattr, press, "forward_hook")  # as press and prompt would hold each other in memory
            stack.enter_context(press(shared.transformers))
        logits_V = Pressed(shared, "kvpress:full", len(ids)).read(ids)[-1]
    for prompt in prompts:
        prompt.begin(len(ids), logits_V)
    return prompts


class Pressed:
    """A prompt in the cache that a press leaves, to be read on from.

    Args:
        shared: the model.
        name: of the press.
        budget: tokens per KV head.

    Attributes:
        kept: tokens that attention reads, mean over KV heads.
    """

    def __init__(self, shared: Shared, name: str, budget: int) -> None:
        from transformers import DynamicCache

        self.name, self.budget = name, budget
        self._model: Any = shared.transformers
        self._cache: Any = DynamicCache(config=self._model.config)
        self._masks: list[tuple[Tensor, ...] | None] = [None] * len(self._cache.layers)
        self._logits: list[Tensor] = []
        self._seen, self._alike, self._failure = 0, True, ""

    def act(self, hook: Callable[..., Any], module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Run a press's forward hook on this cache, which is given what the layer has put into another."""
        layer = module.layer_idx
        if not self._failure:
            self._cache.layers[layer] = copy(kwargs["past_key_values"].layers[layer])
            try:
                hook(module, args, kwargs | {"past_key_values": self._cache}, output)
            except Exception as error:
                self._failure = f"cannot compress: {type(error).__name__}: {error}"
            # What AdaKV hides it notes where attention finds it, for its own tokens only.
            self._masks[layer], module.masked_key_indices = module.masked_key_indices, None

    def begin(self, tokens: int, logits_V: Tensor) -> None:
        """Check what is left of so many tokens, and start from the logits after them."""
        self._seen, self._logits = tokens, [logits_V]
        if self._failure:
            return
        lengths = [layer.keys.shape[2] for layer in self._cache.layers]
        hidden = sum(len(mask[0]) for mask in self._masks if mask) / self._model.config.num_key_value_heads
        self.kept = (sum(lengths) - hidden) / len(lengths)
        # A pyramid rounds in each layer. All others hit the budget.
        if abs(self.kept - min(self.budget, tokens)) > (0.5 if "pyramidkv" in self.name else 0):
            self._failure = f"kept {self.kept} of {tokens} tokens per KV head, not {self.budget}"
        # Several tokens in one pass share a mask as long as the first layer, and AdaKV hides keys from them by making
        # one key that is far from all of their queries: where layers differ or keys are hidden they go one by one.
        self._alike = not any(self._masks) and len(set(lengths)) == 1

    @torch.inference_mode()
    def read(self, ids: list[int]) -> Tensor:
        """Take more tokens in, uncompressed.

        Args:
            ids: N token ids.

        Returns:
            (N + 1, V) logits: of the token after what was there, and after each of `ids`. Where nothing was, (1, V): of
            the token after `ids`.

        Raises:
            Unsuitable: the press could not compress the prompt, or its cache cannot be read.
        """
        if self._failure:
            raise Unsuitable(self._failure)
        for part in [ids] if ids and self._alike else [[token] for token in ids]:
            for layer, mask in zip(self._model.model.layers, self._masks, strict=True):
                layer.self_attn.masked_key_indices = mask
            ids_1T = torch.tensor([part], device=self._model.device)
            position_1T = torch.arange(self._seen, self._seen + len(part), device=ids_1T.device)[None]
            keep = len(part) if self._seen else 1
            try:
                out = self._model(ids_1T, position_ids=position_1T, past_key_values=self._cache, logits_to_keep=keep)
            except Exception as error:
                raise Unsuitable(f"cannot be read: {type(error).__name__}: {error}") from error
            self._logits += out.logits[0]
            self._seen += len(part)
        return torch.stack(self._logits[-len(ids) - 1 :])

    def forget(self, tokens: int) -> None:
        """Go back to before the last tokens that were read."""
        if tokens:
            self._cache.crop(-tokens)
            del self._logits[-tokens:]
            self._seen -= tokens

    def nbytes(self, room: int) -> int:
        """What the cache takes with room for tokens after the prompt, what AdaKV notes included."""
        held = [x for layer in self._cache.layers for x in (layer.keys, layer.values)]
        token: int = sum(x[:, :, :1].nbytes for x in held)
        now: int = sum(x.nbytes for x in (*held, *(index for mask in self._masks for index in mask or ())))
        return now + (room + 1 - len(self._logits)) * token
