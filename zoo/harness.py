"""An engine as a model of lm-eval: log-likelihoods and answers that come through a compressed cache."""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from checkpoints.config import config_hash
from checkpoints.resolve import DEFAULT_MODEL
from kernels import native
from layers.budget import parse_budget
from zoo.cli import note, waiting
from zoo.load import load

# torch takes seconds to import: `--help` does not wait for it.
if TYPE_CHECKING:
    from torch import Tensor

    from checkpoints.tokenizer import StreamDecoder
    from zoo.engine import Engine
    from zoo.load import Loaded

T = TypeVar("T")
Scored = tuple[float, bool]

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}  # what tasks say although it asks for nothing


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request in token ids.

    Args:
        index: its place among the requests.
        name: what errors call it.
        context: what is compressed.
        question: what follows it once it has been compressed; empty if it was part of it.
        continuation: what is scored; empty if an answer is generated.
    """

    index: int
    name: str
    context: tuple[int, ...]
    question: tuple[int, ...] = ()
    continuation: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How an answer is generated.

    Args:
        limit: tokens at most.
        until: texts that end it, none empty.
        sampling: as `layers.sampler.sample` takes it.
    """

    limit: int
    until: tuple[str, ...]
    sampling: Mapping[str, float]


class Answer:
    """The text of one answer while it grows.

    Args:
        decoder: turns ids into text.
        stop_ids: tokens that end it.
        generation: its limit and the texts that end it.
    """

    def __init__(self, decoder: StreamDecoder, stop_ids: frozenset[int], generation: Generation) -> None:
        self._decoder, self._stop_ids, self._generation = decoder, stop_ids, generation
        self._text, self._count, self.goes_on = "", 0, True

    def push(self, token: int) -> None:
        """Take the next token; afterwards `goes_on` says whether another one is wanted."""
        if token in self._stop_ids:
            self.goes_on = False
            return
        new = self._decoder.push(token)
        self._text, self._count = self._text + new, self._count + 1
        # A stop text may have begun in earlier tokens.
        stopped = any(stop in self._text[-len(new) - len(stop) :] for stop in self._generation.until)
        self.goes_on = self._count < self._generation.limit and not stopped

    def text(self) -> str:
        """The whole answer, up to where the first stop text begins."""
        cut: str = postprocess_generated_text(self._text + self._decoder.flush(), [*self._generation.until], None)
        return cut


@register_model("zoo")
class ZooLM(TemplateLM):  # type: ignore[misc]
    """A model of ours with a compressed cache, for lm-eval.

    A context is taken in and compressed once, whatever number of requests share it; each of them then starts from a
    copy of that cache. Continuations are scored token by token against it, and their own tokens stay in it.

    Args:
        pretrained: an alias, a checkpoint directory, a .gguf file or a hub id.
        cache: a method's name, with options if wanted.
        budget: tokens per KV head or a share of the context ("12.5%"); None takes the method's default.
        dtype: "float32", "bfloat16" or "float16".
        weights: "int8", or None for matrices in dtype.
        device: where to run.
        importance: head-importance file; None takes the one that ships for the model.
        sharing: file of layers that share, for kvsharer; None takes the one that ships for the model.
        compile: as for `Engine`.
        batch_size: contexts at a time, longest first.
        max_length: tokens that a request may have; None takes the model's trained context.
        truncate: "left" cuts what is too long at its beginning and counts it; "error" refuses it.
        question: "seen" compresses the whole context; "unseen" compresses what comes before the last separator in it,
            and what begins there is read afterwards.
        separator: begins the question; "unseen" needs it.
        stride: in `loglikelihood_rolling`, tokens scored before they are compressed with everything before them.
        seed: of sampled answers.

    Raises:
        ValueError: an unknown argument, **or** one out of range, **or** whatever `load` and `Engine` refuse.

    Example:
        >>> from lm_eval import simple_evaluate  # doctest: +SKIP
        >>> simple_evaluate(model=ZooLM(cache="headkv", budget=128), tasks=["arc_easy"], limit=100)  # doctest: +SKIP
    """

    def __init__(
        self,
        pretrained: str = DEFAULT_MODEL,
        *,
        cache: str = "headkv",
        budget: int | str | None = None,
        dtype: str = "float32",
        weights: str | None = None,
        device: str = "cpu",
        importance: str | None = None,
        sharing: str | None = None,
        compile: bool | Literal["inductor"] = False,
        batch_size: int = 1,
        max_length: int | None = None,
        truncate: str = "error",
        question: str = "seen",
        separator: str | None = None,
        stride: int = 64,
        seed: int = 0,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            names = [name for name, p in signature(ZooLM).parameters.items() if p.kind is not p.VAR_KEYWORD]
            raise ValueError(f"unknown model argument {', '.join(unknown)}: there are {', '.join(names)}")
        self.batch_size, self._stride = _whole("batch_size", batch_size), _whole("stride", stride)
        self._seed = _whole("seed", seed, least=0)
        if truncate not in ("error", "left"):
            raise ValueError(f'truncate must be "error" or "left", not {truncate!r}')
        if question not in ("seen", "unseen"):
            raise ValueError(f'question must be "seen" or "unseen", not {question!r}')
        if (question == "unseen") != bool(separator):
            raise ValueError("question=unseen and a separator go together: give both, e.g. separator=Question:")
        if budget is not None and parse_budget(str(budget)).kind == "bytes":
            raise ValueError(
                f"budget {budget} would be shared by the rows of a batch, and a score would depend on its batch: give "
                'tokens per KV head (128) or a share ("12.5%")'
            )
        from zoo.engine import Engine

        if device == "cpu":
            native.start()
        self.loaded = load(str(pretrained), dtype=dtype, weights=weights, device=device)
        if device == "cpu":
            try:
                with waiting("Compiling; later starts find this done"):
                    native.load()
            except RuntimeError as error:
                note(f"without the C++ operators, so slower ({error}): repair that if speed matters")
        trained = self.loaded.config.max_position
        self.max_length = trained if max_length is None else _whole("max_length", max_length)
        if self.max_length > trained:
            raise ValueError(f"max_length {self.max_length} is beyond the {trained} tokens of {pretrained}: lower it")
        self._truncate, self._separator = truncate, separator
        self._options: dict[str, Any] = {
            "cache": cache,
            "budget": None if budget is None else str(budget),
            "importance": importance,
            "sharing": sharing,
            "compile": compile,
        }
        self._new_engine: Callable[..., Engine] = lambda **sizes: Engine(self.loaded, **self._options, **sizes)
        self._engine = self._new_engine(max_context=1, max_new_tokens=1)  # as small as it gets: to hear complaints now
        self.mode = f"question {question} while compressing"
        self._said = {"dtype": dtype, "weights": weights, "device": device, **self._options}
        self._said["budget"] = None if self._engine.budget is None else str(self._engine.budget)
        self._files, self._cut = {"importance": importance, "sharing": sharing}, set[int]()
        self._prefills: set[str] = set()

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> ZooLM:
        """Make it from the command's options; what `--model_args` says goes before options of their own."""
        return cls(**{name: value for name, value in (additional_config or {}).items() if value is not None} | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> ZooLM:
        """Make it from a text like "cache=headkv,budget=128"."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def truncated(self) -> int:
        """Contexts that were cut off at their beginning, each counted once."""
        return len(self._cut)

    # -- what lm-eval asks about a model -------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.loaded.tokenizer.eos_id is None:
            raise ValueError(f"the tokenizer of {self.loaded.name} has no EOS token, which lm-eval needs")
        return self.loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text is conditioned on that has nothing before it: BOS, else EOS."""
        bos_id = self.loaded.tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer at most, where a task does not say."""
        return 256

    @property
    def batch_sizes(self) -> dict[str, int]:
        """For the results: what counts, for lm-eval's own option may say less than the model's arguments."""
        return {"contexts": self.batch_size}

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart, for lm-eval's cache of requests."""
        return self.loaded.tokenizer.fingerprint()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Text of the model's template, or None where none is wanted.

        Raises:
            ValueError: a template is asked for by name, **or** the model has none.
        """
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise ValueError(f"no chat template can be chosen by name, as {chat_template!r}: leave the name out")
        if self.loaded.chat.template is None:
            raise ValueError(f"{self.loaded.chat.source}: run without --apply_chat_template, or take an instruct model")
        return self.loaded.chat.template.text

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write messages as the model's chat template does.

        Args:
            chat_history: the messages.
            add_generation_prompt: let an answer begin; otherwise the last message is an answer that has begun.

        Returns:
            The text, control tokens spelled out.
        """
        chat = self.loaded.chat
        if add_generation_prompt or chat.template is None:
            return chat.render(chat_history)
        begun = chat_history[-1]["content"].strip()
        text = chat.template.render(chat_history, generate=False)
        return text[: text.rindex(begun) + len(begun)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids of a text; control tokens spelled out in it are read as such, as lm-eval's own backend does.

        Args:
            string: the text.
            add_special_tokens: begin with BOS; None does what the model was trained with, unless it is there already.
        """
        tokenizer = self.loaded.tokenizer
        bos = tokenizer.adds_bos if add_special_tokens is None else add_special_tokens and tokenizer.bos_id is not None
        if add_special_tokens is None and has_bos_prefix(string, tokenizer.decode([self.prefix_token_id])):
            bos = False
        return tokenizer.encode(string, special=True, bos=bos)

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model, beside its arguments; asked for at the end."""
        chat = self.loaded.chat
        return {
            "zoo": {
                **self._said,
                "pretrained": self.loaded.name,
                "model_config_hash": config_hash(self.loaded.config),
                "mode": self.mode,
                "separator": self._separator,
                "batch_size": self.batch_size,
                "max_length": self.max_length,
                "stride": self._stride,
                "seed": self._seed,
                "truncated": self.truncated,
                "prefill": sorted(self._prefills),
                "chat_template_hash": chat.template_hash,
                "stop_ids": sorted(chat.stop_ids),
            }
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take the file of `--use_cache`, in which lm-eval finds results by the text of a request alone.

        Args:
            cache_hook: lm-eval's.

        Raises:
            ValueError: what the file holds came from another model or other settings.
        """
        kept = cache_hook.dbdict
        if kept is not None:
            settings = self._settings()
            before = kept.get("settings", {}) if len(kept) else settings
            if differ := [name for name in settings if name not in before or before[name] != settings[name]]:
                kept.close()
                there, here = ({name: known.get(name) for name in differ} for known in (before, settings))
                raise ValueError(
                    f"--use_cache {kept.filename} holds results of {there}, not of {here}: give every model and every "
                    "setting of a cache a file of its own"
                )
            kept["settings"] = settings
        super().set_cache_hook(cache_hook)

    def _settings(self) -> dict[str, Any]:
        """All that results depend on, beside the requests: what is said about the model, and contents of its files."""
        said = self.get_model_info()["zoo"]
        settings = {name: value for name, value in said.items() if name not in ("batch_size", "truncated", "prefill")}
        for name, file in self._files.items():
            if file is not None:
                settings[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return settings | {
            "weights_hash": _weights_hash(self.loaded),
            "tokenizer_hash": self.tokenizer_name,
            "truncate": self._truncate,
        }

    # -- the three kinds of requests -----------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        """Score continuations of contexts.

        Returns:
            For each, its log-likelihood and whether each of its tokens is the likeliest.

        Raises:
            ValueError: a continuation is empty, **or** a context is too long, or has no separator where it needs one.
        """
        encoded = []
        for index, request in enumerate(requests):
            context, continuation = request.args
            name = _name(request, index)
            if not continuation:
                raise ValueError(f"{name} has an empty continuation: nothing can be scored")
            if context:
                ids, target = self._encode_pair(context, continuation)
            else:
                ids, target = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
                target = target[1:] if target[:1] == ids else target
            before, question = self._split(name, context, ids)
            encoded.append(self._fitting(index, name, before, question, target, more=len(target) - 1))
        return self._scored(encoded, [request.args for request in requests], disable=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[Scored]:
        """The same for requests that are ids already, of which nothing is split off as a question."""
        encoded = [
            self._fitting(index, f"request {index}", context, [], target, more=len(target) - 1)
            for index, (_, context, target) in enumerate(requests)
        ]
        return self._scored(encoded, [texts for texts, _, _ in requests], disable=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows as long as the model allows.

        With a compressed cache a window is taken in piece by piece: each is scored token by token against what was kept
        of everything before it, then read again as a turn and compressed. With the full cache that is the dense score.

        Returns:
            Log-likelihood of each text.

        Raises:
            ValueError: questions are to be unseen, of which a text has none.
        """
        if self._separator is not None:
            raise ValueError("question=unseen means nothing where a whole text is scored: run such tasks without it")
        windows: list[Request] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, target in map(make_disjoint_window, pairs):
                name = _name(request, index)
                windows.append(Request(index=index, name=name, context=tuple(context), continuation=tuple(target)))
        totals, left = [0.0] * len(requests), Counter(window.index for window in windows)
        stride = self.max_length if self._engine.budget is None else self._stride
        room = min(stride, max((len(window.continuation) for window in windows), default=1))
        with self._working("Scoring texts", windows, room=room, disable=disable_tqdm) as (engine, done):
            for rows in _batches(windows, self.batch_size, stride):
                for window, total in zip(rows, self._roll(engine, rows, stride), strict=True):
                    totals[window.index] += total
                    left[window.index] -= 1
                    if not left[window.index]:
                        text = requests[window.index].args
                        self.cache_hook.add_partial("loglikelihood_rolling", text, totals[window.index])
                done(len(rows))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer contexts.

        Returns:
            The answers, each up to its first stop text, a stop token of the model or its limit.

        Raises:
            ValueError: an argument of the generation is not supported, **or** a context is too long, or has no
                separator where it needs one.
        """
        encoded: list[Request] = []
        settings: list[Generation] = []
        for index, request in enumerate(requests):
            context, arguments = request.args
            name = _name(request, index)
            settings.append(generation := self._generation(name, arguments))
            ids = self.tok_encode(context) if context else [self.prefix_token_id]
            before, question = self._split(name, context, ids)
            encoded.append(self._fitting(index, name, before, question, [], more=generation.limit))
        answers = [""] * len(requests)
        seeds = _seeds(encoded, self._seed)
        room = max((generation.limit for generation in settings), default=1)
        with self._working("Answering", encoded, room=room, disable=disable_tqdm) as (engine, done):
            for sampling in {tuple(generation.sampling.items()): None for generation in settings}:
                alike = [r for r in encoded if tuple(settings[r.index].sampling.items()) == sampling]
                for logits_BV, leaves in self._visits(engine, alike):
                    rows = [leaf[0] if leaf else None for leaf in leaves]
                    texts = self._answers(engine, logits_BV, rows, settings, seeds)
                    for request, text in zip(rows, texts, strict=True):
                        if request is not None:
                            answers[request.index] = text
                            self.cache_hook.add_partial("generate_until", requests[request.index].args, text)
                            done(1)
        return answers

    # -- from requests to ids ------------------------------------------------------------------------------------------

    def _split(self, name: str, context: str, ids: list[int]) -> tuple[list[int], list[int]]:
        """Context and question of a context's ids; a token across their border belongs to the question."""
        if self._separator is None:
            return ids, []
        before, separator, _ = context.rpartition(self._separator)
        if not separator:
            raise ValueError(f"{name} has no separator {self._separator!r} in its context: question=unseen needs it")
        count = 0
        for mine, whole in zip(self.tok_encode(before) if before else [], ids, strict=False):
            if mine != whole:
                break
            count += 1
        if count == 0 or count == len(ids):
            raise ValueError(f"{name} has nothing on one side of the separator {self._separator!r}: choose another one")
        return ids[:count], ids[count:]

    def _fitting(
        self, index: int, name: str, context: list[int], question: list[int], target: list[int], *, more: int
    ) -> Request:
        """A request no longer than allowed; more is how many tokens follow context and question in the cache."""
        if not context:
            raise ValueError(
                f"{name} has a context of no tokens, but for spaces that are scored: leave it empty or fill it"
            )
        if more < 0:
            raise ValueError(f"{name} has a continuation of no tokens beside its context: nothing can be scored")
        most = self.max_length - len(question) - more
        if len(context) > most:
            if self._truncate != "left" or most < 1:
                remedy = "nothing can be left of it" if most < 1 else "truncate=left would cut its beginning off"
                raise ValueError(
                    f"{name} has {len(context)} tokens of context and {len(question) + more} more, of {self.max_length}"
                    f" that are allowed: {remedy}"
                )
            self._cut.add(hash(tuple(context)))
            context = context[-most:]
        return Request(
            index=index, name=name, context=tuple(context), question=tuple(question), continuation=tuple(target)
        )

    def _generation(self, name: str, arguments: Mapping[str, Any]) -> Generation:
        said = {key: value for key, value in arguments.items() if value is not None}
        given: dict[str, Any] = dict(normalize_gen_kwargs(said, self.max_gen_toks))
        until, limit, sampled = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
        sampling = {key: given.pop(key) for key in _SAMPLING if key in given}
        strange = [key for key, value in given.items() if _NEUTRAL.get(key) != value]
        if strange:
            raise ValueError(
                f"{name} asks for {', '.join(strange)}, which is not supported: there are do_sample, "
                f"{', '.join(_SAMPLING)}, until and max_gen_toks"
            )
        if limit < 1 or not all(isinstance(stop, str) for stop in until):
            raise ValueError(f"{name} needs max_gen_toks from 1 and texts in until, not {limit} and {until!r}")
        if sampled and not float(sampling.get("temperature", 0)) > 0:
            raise ValueError(f"{name} is to be sampled without a temperature: give one above 0, or do_sample=False")
        from layers.sampler import check_sampling

        settings = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        if sampled:
            settings |= {key: int(value) if key == "top_k" else float(value) for key, value in sampling.items()}
            try:
                check_sampling(**settings)  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return Generation(limit=limit, until=tuple(filter(None, until)), sampling=settings)

    # -- from ids to numbers -------------------------------------------------------------------------------------------

    @contextmanager
    def _working(
        self, title: str, requests: Sequence[Request], *, room: int, disable: bool
    ) -> Iterator[tuple[Engine, Callable[[int], None]]]:
        """An engine for the longest of the requests, with room to decode; a progress bar; at the end, a line."""
        if requests:
            longest = max(len(r.context) + len(r.question) + max(len(r.continuation), room) for r in requests)
            longest = min(longest, self.max_length)
            if self._engine.max_context < longest or self._engine.max_new_tokens < room:
                del self._engine  # before the new cache takes memory
                rows = min(self.batch_size, len(requests))
                self._engine = self._new_engine(max_context=longest, max_new_tokens=room, batch=rows)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        hidden = disable or not sys.stderr.isatty()
        with Progress(*columns, console=Console(stderr=True), disable=hidden) as bar:
            task = bar.add_task(title, total=len(requests))
            yield self._engine, lambda count: bar.advance(task, count)
        if not disable:
            said = [f"{len(requests)} requests", self.loaded.name, str(self._said["cache"]), self.mode]
            said += [f"{self.truncated} contexts so far cut off at their beginning"] if self.truncated else []
            note(f"{title.lower()}: {', '.join(said)}")

    def _visits(
        self, engine: Engine, requests: Sequence[Request]
    ) -> Iterator[tuple[Tensor, list[list[Request] | None]]]:
        """Bring the cache to the end of every context and its questions, in batches, the longest contexts first.

        Yields:
            (B, V) logits of what follows, and per row the requests that go on from there: those whose continuations
            differ in their last token only, one that generates, or None.
        """
        contexts: dict[tuple[int, ...], dict[tuple[int, ...], dict[object, list[Request]]]] = {}
        for request in requests:
            last: object = request.continuation[:-1] if request.continuation else request.index
            questions = contexts.setdefault(request.context, {})
            questions.setdefault(request.question, {}).setdefault(last, []).append(request)
        longest_first = sorted(contexts, key=len, reverse=True)
        for start in range(0, len(longest_first), self.batch_size):
            rows = longest_first[start : start + self.batch_size]
            logits_BV = engine.prefill(rows)
            for questions_of_rows in _rounds(engine, [sorted(contexts[row], key=len, reverse=True) for row in rows]):
                if any(questions_of_rows):
                    # A row whose questions are all done takes in a token that nobody asks about.
                    logits_BV = engine.extend(
                        [question or row[-1:] for question, row in zip(questions_of_rows, rows, strict=True)]
                    )
                self._prefills.add(engine.stats().prefill)
                leaves = [
                    sorted(contexts[row].get(question, {}).values(), key=lambda same: -len(same[0].continuation))
                    if question is not None
                    else []
                    for row, question in zip(rows, questions_of_rows, strict=True)
                ]
                for leaves_of_rows in _rounds(engine, leaves):
                    yield logits_BV, leaves_of_rows

    def _scored(self, requests: list[Request], texts: Sequence[tuple[str, str]], *, disable: bool) -> list[Scored]:
        scores: list[Scored] = [(0.0, False)] * len(requests)
        room = max((len(request.continuation) for request in requests), default=1)
        with self._working("Scoring continuations", requests, room=room, disable=disable) as (engine, done):
            for logits_BV, leaves in self._visits(engine, requests):
                rows = [[request.continuation for request in leaf or ()] for leaf in leaves]
                for leaf, scored in zip(leaves, _log_likelihoods(engine, logits_BV, rows), strict=True):
                    for request, score in zip(leaf or (), scored, strict=True):
                        scores[request.index] = score
                        self.cache_hook.add_partial("loglikelihood", texts[request.index], score)
                        done(1)
        return scores

    def _roll(self, engine: Engine, windows: Sequence[Request], stride: int) -> list[float]:
        """Log-likelihoods of windows that are equally many pieces of a length."""
        totals = [0.0] * len(windows)
        logits_BV = engine.prefill([window.context for window in windows])
        longest = max(len(window.continuation) for window in windows)
        for start in range(0, longest, stride):
            pieces = [window.continuation[start : start + stride] for window in windows]
            before = engine.snapshot() if start + stride < longest else None
            scored = _log_likelihoods(engine, logits_BV, [[piece] for piece in pieces])
            totals = [total + score for total, ((score, _),) in zip(totals, scored, strict=True)]
            if before is not None:
                engine.restore(before)
                logits_BV = engine.extend(pieces)
        self._prefills.add(engine.stats().prefill)
        return totals

    def _answers(
        self,
        engine: Engine,
        logits_BV: Tensor,
        rows: Sequence[Request | None],
        settings: Sequence[Generation],
        seeds: Sequence[int],
    ) -> list[str]:
        """Answers of rows that are sampled alike; "" where there is no request."""
        import torch

        from layers.sampler import sample

        sampling: Any = next(settings[request.index].sampling for request in rows if request is not None)
        seed_B = torch.tensor([seeds[r.index] if r is not None else 0 for r in rows], device=logits_BV.device)
        tokenizer, stop_ids = self.loaded.tokenizer, self.loaded.chat.stop_ids | {self.eot_token_id}
        answers: list[Answer | None] = []
        for request in rows:
            if request is None:
                answers.append(None)
                continue
            generation = settings[request.index]
            ends = {tokenizer.special_tokens[stop] for stop in generation.until if stop in tokenizer.special_tokens}
            answers.append(Answer(tokenizer.stream(skip_special=True), stop_ids | ends, generation))
        while True:
            token_B = sample(logits_BV, seed_B, engine.cache.position, **sampling)
            for answer, token in zip(answers, token_B.tolist(), strict=True):
                if answer is not None and answer.goes_on:
                    answer.push(token)
            active = [answer is not None and answer.goes_on for answer in answers]
            if not any(active):
                return ["" if answer is None else answer.text() for answer in answers]
            logits_BV = engine.step(token_B, active)


def _whole(name: str, value: object, *, least: int = 1) -> int:
    """A number as lm-eval's options give it, where --batch_size is a text."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number < 2**31:
        raise ValueError(f"{name} must be a whole number from {least} to 2**31 - 1, not {value!r}")
    return number


def _weights_hash(loaded: Loaded) -> str:
    """Tells weights apart by the first values of every tensor, which training would have changed."""
    digest = hashlib.sha256()
    for name, tensor in loaded.model.state_dict().items():
        digest.update(name.encode() + tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _name(request: Instance, index: int) -> str:
    where = f"request {index}" if request.task_name is None else f"{request.task_name}, document {request.doc_id}"
    return f"{where}, choice {request.idx}" if request.idx else where


def _seeds(requests: Sequence[Request], seed: int) -> list[int]:
    """A seed per request that does not depend on the other requests; repeats of one differ."""
    seen: dict[str, int] = {}
    seeds = []
    for request in requests:
        seen[request.name] = seen.get(request.name, -1) + 1
        seeds.append(seed + zlib.crc32(f"{request.name} {seen[request.name]}".encode()))
    return seeds


def _batches(windows: Sequence[Request], size: int, stride: int) -> Iterator[list[Request]]:
    """Windows that are equally many pieces, for a row could not wait while others take in more; the longest first."""

    def pieces(window: Request) -> int:
        return -(-len(window.continuation) // stride)

    ordered = sorted(windows, key=lambda window: (-pieces(window), -len(window.context) - len(window.continuation)))
    for _, same in groupby(ordered, pieces):
        alike = list(same)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _rounds(engine: Engine, lists: Sequence[Sequence[T]]) -> Iterator[list[T | None]]:
    """The first items of all rows, then the second ones and so on; in every round the cache is as it was before.

    None stands for a row that has no item left.
    """
    rounds = list(zip_longest(*lists))
    before = engine.snapshot() if len(rounds) > 1 else None
    for number, items in enumerate(rounds):
        if before is not None and number:
            engine.restore(before)
        yield list(items)


def _log_likelihoods(engine: Engine, logits_BV: Tensor, rows: Sequence[Sequence[Sequence[int]]]) -> list[list[Scored]]:
    """Score continuations token by token; those of a row differ in their last token only.

    Args:
        engine: its cache holds what comes before.
        logits_BV: of the first token.
        rows: per row, continuations; there may be none.

    Returns:
        For each, its log-likelihood and whether every token was the likeliest.
    """
    shared = [same[0][:-1] if same else () for same in rows]
    totals, greedy = [0.0] * len(rows), [True] * len(rows)
    scored: list[list[Scored]] = [[] for _ in rows]
    for count in range(max(map(len, shared)) + 1):
        log_p_BV = logits_BV.float().log_softmax(-1)
        likeliest = log_p_BV.argmax(-1).tolist()
        for row, same in enumerate(rows):
            if count < len(shared[row]):
                token = shared[row][count]
                totals[row] += float(log_p_BV[row, token])
                greedy[row] = greedy[row] and token == likeliest[row]
            elif count == len(shared[row]):
                lasts = [continuation[-1] for continuation in same]
                scored[row] = [
                    (totals[row] + float(log_p_BV[row, token]), greedy[row] and token == likeliest[row])
                    for token in lasts
                ]
        active = [count < len(tokens) for tokens in shared]
        if any(active):
            logits_BV = engine.step(
                [tokens[count] if flag else 0 for tokens, flag in zip(shared, active, strict=True)], active
            )
    return scored
