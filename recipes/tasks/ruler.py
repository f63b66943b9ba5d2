"""The task families of RULER, written anew from the paper's definitions, at any length by the model's own tokenizer.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654.
Wording, words and haystacks are ours, so scores are to be compared with each other and not with published ones. The
splits "tune" and "test" share no key, name, filler sentence or paragraph. Noise comes from `recipes.needles`, prose
from `recipes.tasks.prose`. Two things differ from the paper: no example is solved in the prompt, and questions about
facts are asked about generated registers of people instead of SQuAD and HotpotQA, which would have to be downloaded.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import Literal

from recipes import needles
from recipes.tasks import prose, words
from recipes.tasks.example import Encode, Example, count_tokens, largest

_PI_LIKE = 0.6180339887498949  # successive multiples, modulo 1, cover depths evenly however many there are


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A task before its length is known.

    Args:
        context: the context made of so many units (words, lines, list items); always the same for the same number.
        least: units below which the task makes no sense.
        question: as in `Example`, like the following.
        answer_prefix: .
        answers: .
        max_new_tokens: .
        depth: .
        metric: .
    """

    context: Callable[[int], str]
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    depth: float | None = None
    least: int = 4
    metric: Literal["all", "part"] = "all"


_Family = Callable[[random.Random, str, float], _Draft]
_Units = Iterator["tuple[str, bool]"]  # a piece of text, and whether something may be inserted behind it


def _hidden(units: _Units, facts: Sequence[tuple[str, float]], heading: str) -> Callable[[int], str]:
    """A context of so many units with facts among them, each at its depth or where a unit ends next to it."""
    made: list[tuple[str, bool]] = []

    def context(n: int) -> str:
        made.extend(islice(units, max(0, n - len(made))))
        if len(made) < n:
            raise ValueError(f"there is material for {len(made)} units only: choose a smaller length")
        gaps = [0, *(i + 1 for i in range(n) if made[i][1])]
        at: dict[int, list[str]] = {}
        for fact, depth in facts:
            at.setdefault(gaps[min(bisect_left(gaps, depth * n), len(gaps) - 1)], []).append(fact)
        pieces = ("".join([*at.get(i, []), made[i][0]]) for i in range(n))
        return f"{heading}\n\n{''.join(pieces)}{''.join(at.get(n, []))}".rstrip() + "\n\n"

    return context


def _in_words(sentences: Iterator[str], end: str) -> _Units:
    for sentence in sentences:
        *first, last = sentence.split(" ")
        yield from ((f"{word} ", False) for word in first)
        yield last + end, True


def _noise(split: str, rng: random.Random) -> _Units:
    return _in_words((rng.choice(needles.SPLITS[split].noise) for _ in count()), " ")


def _prose(split: str, rng: random.Random) -> _Units:
    """Running prose; facts go between sentences."""
    for paragraph in prose.stream(split, rng):
        *first, last = paragraph.split(" ")
        yield from ((f"{word} ", word.endswith(".")) for word in first)
        yield f"{last}\n", True


def _special(key: str, value: str) -> str:
    return f"The special value for {key} is {value}. "


def _needles(
    *,
    haystack: Literal["noise", "prose", "keys"] = "prose",
    uuids: Literal["none", "values", "both"] = "none",
    keys: int = 1,
    asked: int = 1,
    values: int = 1,
) -> _Family:
    """A family of needle tasks.

    Args:
        haystack: what the needles lie in; "keys" is other needles.
        uuids: what is a UUID instead of words (keys) and digits (values).
        keys: keys with a value each, among them those that are asked for.
        asked: keys that are asked for.
        values: values per key.
    """

    def family(rng: random.Random, split: str, depth: float) -> _Draft:
        value = words.number if uuids == "none" else words.uuid4
        key = words.keys(split, rng) if uuids != "both" else (words.uuid4(rng) for _ in count())
        facts = [(name, value(rng)) for name in islice(key, keys) for _ in range(values)]
        wanted = facts[: asked * values]
        others = ((f"{_special(name, value(rng)).strip()}\n", True) for name in key)
        units = {"noise": _noise, "prose": _prose}[haystack](split, rng) if haystack != "keys" else others
        end = "\n" if haystack == "keys" else " "
        hidden = [(_special(*fact).strip() + end, depth if i == 0 else rng.random()) for i, fact in enumerate(facts)]
        names = ", ".join(dict.fromkeys(name for name, _ in wanted))
        one = len(wanted) == 1
        return _Draft(
            context=_hidden(units, hidden, "Special values are hidden in the text below. Remember them."),
            question=f"What {'is the special value' if one else 'are all the special values'} for {names} in the text?",
            answer_prefix=f"The special value{'' if one else 's'} for {names} {'is' if one else 'are'}",
            answers=tuple(answer for _, answer in wanted),
            max_new_tokens=128,
            depth=depth if one else None,
        )

    return family


def _variables(rng: random.Random, split: str, depth: float) -> _Draft:
    """A value is assigned to a variable, this one to another, and so on, four times; the links are far apart."""
    names = [name.upper() for name in islice(words.coded(split, rng, 5), 5)]
    value = str(rng.randrange(10_000, 100_000))
    links = [f"VAR {names[0]} = {value}. ", *(f"VAR {b} = VAR {a}. " for a, b in pairwise(names))]
    depths = sorted(rng.random() for _ in links)
    return _Draft(
        context=_hidden(
            _noise(split, rng),
            list(zip(links, depths, strict=True)),
            "Assignments to variables are hidden in the text below. Follow them.",
        ),
        question=f"Which {len(names)} variables have the value {value}, directly or through other variables?",
        answer_prefix=f"The variables that have the value {value} are",
        answers=tuple(names),
        max_new_tokens=64,
    )


def _common_words(rng: random.Random, split: str, depth: float) -> _Draft:
    """Ten words of a list are ten times as common as all others. A longer list has more words, while there are any."""
    common, frequent, usual = 10, 10, 3
    pool = list(prose.vocabulary(split))
    rng.shuffle(pool)
    seed = rng.random()

    def context(n: int) -> str:
        few = 1 if n < 2 * common * frequent * usual else usual
        times = max(few, -(-n // (len(pool) - common + common * frequent)))
        items = pool[:common] * (frequent * times)
        rare = n - len(items)
        items += [pool[common + i // times] for i in range(rare)]
        random.Random(f"{seed}/{n}").shuffle(items)
        lines = "".join(f"{i}. {word}\n" for i, word in enumerate(items, start=1))
        return f"Below is a numbered list of words. Some of them are much more common than the others.\n\n{lines}\n"

    return _Draft(
        context=context,
        question=f"What are the {common} most common words in the list?",
        answer_prefix=f"The {common} most common words are",
        answers=tuple(pool[:common]),
        max_new_tokens=120,
        least=common * frequent + 20,
    )


def _frequent_words(rng: random.Random, split: str, depth: float) -> _Draft:
    """Coded words whose frequencies fall with the square of their rank; the most frequent is noise."""
    coded = words.coded(split, rng, 6)
    ranked, seed = ["..."], rng.random()

    def context(n: int) -> str:
        share = n / 1.6449  # the sum of 1 / rank^2
        counts = [round(share / rank**2) for rank in range(2, int((2 * share) ** 0.5) + 1)]
        ranked.extend(islice(coded, max(0, 1 + len(counts) - len(ranked))))
        items = [word for word, times in zip(ranked[1:], counts, strict=False) for _ in range(times)]
        items += ranked[:1] * (n - len(items))
        random.Random(f"{seed}/{n}").shuffle(items)
        return f"Below is a text in code. Count its words and leave the dots out.\n\n{' '.join(items)}\n\n"

    least = 100
    context(least)
    return _Draft(
        context=context,
        question="Which three words are the most frequent in the text in code?",
        answer_prefix="The three most frequent words are",
        answers=tuple(ranked[1:4]),
        max_new_tokens=64,
        least=least,
    )


def _register(split: str, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Entries about people, everybody a pupil of the one before: name, birthplace and text."""
    names, towns, crafts = words.people(split, rng), words.places(split, rng), words.WORDS[split].crafts
    for teacher, name in pairwise(names):
        born, lived = rng.sample(towns, 2)
        craft, year = rng.choice(crafts), rng.randrange(1700, 1900)
        teacher_known = f"{name} learnt the trade from {teacher}"
        facts = [
            f"{name} was born in {born} in {year}.",
            f"{teacher_known} and stayed for {rng.randrange(2, 9)} years.",
            f"For most of those years the {craft}'s workshop was in {lived}.",
            f"In {year + rng.randrange(25, 60)} a fire in {lived} destroyed what was there, but {name} began again.",
        ]
        rng.shuffle(facts)
        yield name, born, f"{name}, {craft}. {' '.join(facts)}"


def _facts(*, hops: int) -> _Family:
    """A family of questions about one entry of a register, or about two of which the first names the second."""

    def family(rng: random.Random, split: str, depth: float) -> _Draft:
        entries = _register(split, rng)
        asked = list(islice(entries, hops))
        (name, _, _), born = asked[-1], asked[0][1]
        person = name if hops == 1 else f"the person from whom {name} learnt the trade"
        texts = [(f"{text}\n\n", depth if i == 0 else rng.random()) for i, (_, _, text) in enumerate(asked)]
        return _Draft(
            context=_hidden(
                _in_words((text for _, _, text in entries), "\n\n"), texts, "Below are entries of a register of people."
            ),
            question=f"In which town was {person} born?",
            answer_prefix=f"{person[0].upper()}{person[1:]} was born in",
            answers=(born,),
            max_new_tokens=32,
            depth=depth if hops == 1 else None,
            metric="part",
        )

    return family


FAMILIES: dict[str, _Family] = {
    "niah_single_noise": _needles(haystack="noise"),
    "niah_single_prose": _needles(),
    "niah_single_uuid": _needles(uuids="values"),
    "niah_multikey": _needles(keys=4),
    "niah_multikey_lines": _needles(haystack="keys"),
    "niah_multikey_uuid": _needles(haystack="keys", uuids="both"),
    "niah_multivalue": _needles(values=4),
    "niah_multiquery": _needles(keys=4, asked=4),
    "vt": _variables,
    "cwe": _common_words,
    "fwe": _frequent_words,
    "qa_single": _facts(hops=1),
    "qa_hop": _facts(hops=2),
}


def make_example(encode: Encode, *, family: str, split: str, seed: int, length: int, reserve: int = 0) -> Example:
    """Make one example.

    Args:
        encode: text to token ids, by the model's own tokenizer.
        family: a key of `FAMILIES`.
        split: "tune" or "test".
        seed: with the other arguments decides everything.
        length: tokens of context, question, answer prefix, answer and reserve at most; not one unit of context more
            (a word, a list item, a line) would fit.
        reserve: tokens to leave free for a chat template.

    Returns:
        The example.

    Raises:
        ValueError: unknown family or split, **or** a length without room for the task.

    Example:
        >>> example = make_example(str.split, family="vt", split="test", seed=0, length=500)
        >>> example.tokens, example.question.split()[:3]
        (500, ['Which', '5', 'variables'])
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no family {family!r}: choose from {', '.join(FAMILIES)}")
    if split not in prose.SPLITS:
        raise ValueError(f"there is no split {split!r}: choose from {', '.join(prose.SPLITS)}")
    depth = (0.5 + seed * _PI_LIKE) % 1
    draft = FAMILIES[family](random.Random(f"{family}/{split}/{seed}"), split, depth)
    rest = f"{draft.question} {draft.answer_prefix}"

    def size(units: int) -> int:
        return count_tokens(encode, draft.context(units), rest) + draft.max_new_tokens + reserve

    units = largest(size, length, draft.least)
    return Example(
        family=family,
        split=split,
        seed=seed,
        length=length,
        tokens=size(units),
        depth=draft.depth,
        context=draft.context(units),
        question=draft.question,
        answer_prefix=draft.answer_prefix,
        answers=draft.answers,
        max_new_tokens=draft.max_new_tokens,
        metric=draft.metric,
    )
