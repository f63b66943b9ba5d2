"""Needle prompts: one fact hidden in about as many tokens of noise or prose as wanted, and a question about it.

All text is generated from the word lists below. The splits "calibrate", "tune" and "test" share no fact, no filler
sentence and no seed, so nothing that was fitted on one has seen another.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

TASKS = ("noise", "prose")


@dataclass(frozen=True, kw_only=True)
class NeedlePrompt:
    """A prompt as token ids, and where things are in it.

    Args:
        split: "calibrate", "tune" or "test".
        task: "noise" or "prose".
        kind: what sort of fact.
        depth: where in the haystack it lies, 0 the beginning and 1 the end.
        ids: the prompt, chat template and generation prompt included.
        question: where the question begins in `ids`; what stands before is the context.
        lead: how the answer begins, words that the question already gave.
        value: what only the needle says.
        gold: places of `value` in `ids`.
        statement: places in `ids` of all that was hidden: `value` and the words around it.
    """

    split: str
    task: str
    kind: str
    depth: float
    ids: list[int]
    question: int
    lead: list[int]
    value: list[int]
    gold: range
    statement: range


@dataclass(frozen=True, kw_only=True)
class Fact:
    """What is hidden: `statement` says it with {value} once, `question` asks, `lead` + value + "." is the answer."""

    statement: str
    question: str
    lead: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """Filler and facts of one split.

    Args:
        noise: sentences that are repeated in random order.
        prose: sentences whose {slots} are filled from `words`.
        words: what fills each slot; {number} is any number below 1,000.
        kinds: makers of facts by name.
    """

    noise: tuple[str, ...]
    prose: tuple[str, ...]
    words: dict[str, tuple[str, ...]]
    kinds: dict[str, Callable[[random.Random], Fact]]


def filler_sentence(rng: random.Random, source: Split, task: str) -> str:
    """A sentence of noise or prose that hides nothing."""
    if task == "noise":
        return rng.choice(source.noise)
    chosen = {slot: rng.choice(words) for slot, words in source.words.items()}
    return rng.choice(source.prose).format(number=rng.randrange(2, 1000), **chosen)


def make_prompt(
    tokenizer: Any, chat: Any, *, split: str, task: str, kind: str, tokens: int, depth: float, seed: str
) -> NeedlePrompt:
    """Make one prompt.

    The pieces (template, filler sentences, fact, question) are encoded one by one, so offsets are exact.

    Args:
        tokenizer: with `encode(text, special=False)`.
        chat: with `render(messages)`.
        split: a key of `SPLITS`.
        task: one of `TASKS`.
        kind: a key of the split's kinds.
        tokens: length of the whole prompt at most; reached up to one filler sentence.
        depth: 0 to 1.
        seed: with the other arguments decides everything.

    Raises:
        ValueError: `tokens` has no room for the fact and its question.
    """
    rng = random.Random(f"{split}/{task}/{kind}/{seed}")
    source = SPLITS[split]
    fact = source.kinds[kind](rng)
    before, after = fact.statement.split("{value}")
    template = chat.render([{"role": "user", "content": "\0"}])
    head, tail = template.split("\0")
    opening = tokenizer.encode(head, special=True) + tokenizer.encode("Read the text and answer the question.\n\n")
    closing = tokenizer.encode(f"\n\nQuestion: {fact.question}") + tokenizer.encode(tail, special=True)
    space = before[len(before.rstrip()) :]
    said, value, rest = (tokenizer.encode(text) for text in (f" {before.rstrip()}", space + fact.value, after))

    free = tokens - len(opening) - len(closing) - len(said) - len(value) - len(rest)
    if free < 0:
        raise ValueError(f"a prompt of {tokens} tokens has no room for its question: give at least {tokens - free}")
    filler: list[list[int]] = []
    while free > 0:
        sentence = filler_sentence(rng, source, task)
        filler.append(tokenizer.encode(f" {sentence}" if filler else sentence))
        free -= len(filler[-1])
    if free < 0:
        filler.pop()
    cut = round(depth * len(filler))
    ids = opening + list(chain(*filler[:cut])) + said
    gold = range(len(ids), len(ids) + len(value))
    ids += value + rest + list(chain(*filler[cut:])) + closing
    lead = tokenizer.encode(fact.lead)
    question = len(ids) - len(closing)
    return NeedlePrompt(
        split=split,
        task=task,
        kind=kind,
        depth=depth,
        ids=ids,
        question=question,
        lead=lead,
        value=value,
        gold=gold,
        statement=range(gold.start - len(said), gold.stop + len(rest)),
    )


def make_prompts(
    tokenizer: Any, chat: Any, *, split: str, task: str, tokens: int, count: int, seed: int
) -> list[NeedlePrompt]:
    """Prompts of one split and task, the kinds in turn, at evenly spread depths in random order."""
    depths = [(index + 0.5) / count for index in range(count)]
    random.Random(f"{split}/{task}/{seed}").shuffle(depths)
    kinds = list(SPLITS[split].kinds)
    return [
        make_prompt(
            tokenizer,
            chat,
            split=split,
            task=task,
            kind=kinds[index % len(kinds)],
            tokens=tokens,
            depth=depth,
            seed=f"{seed}/{index}",
        )
        for index, depth in enumerate(depths)
    ]


def _digits(rng: random.Random, count: int) -> str:
    return str(rng.randrange(10 ** (count - 1), 10**count))


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=count))


def _about(
    subject: str, keys: tuple[str, ...], value: Callable[[random.Random], str], *, quoted: bool = True
) -> Callable[[random.Random], Fact]:
    """A maker of facts of the form: The <subject> of <key> is "<value>"."""

    def fact(rng: random.Random) -> Fact:
        phrase = subject.format(key=rng.choice(keys))
        quote = '"' if quoted else ""
        lead = f"{phrase[0].upper()}{phrase[1:]} is {quote}"
        return Fact(
            statement=f"{lead}{{value}}{quote}.", question=f"What is {phrase}?", lead=lead.rstrip(), value=value(rng)
        )

    return fact


def _comparison(rng: random.Random) -> Fact:
    """Two candidates and the fact that decides between them; which comes first, and how it is put, is balanced."""
    right, wrong = rng.sample(("Odile", "Marcus", "Ingrid", "Tobias", "Paloma", "Henrik"), 2)
    value, other = rng.sample(("plum cake", "barley soup", "goat cheese", "pea stew", "rye bread", "fish pie"), 2)
    asked, opposite = rng.choice(
        (("older", "younger"), ("younger", "older"), ("taller", "shorter"), ("shorter", "taller"))
    )
    likes = [f"{right}'s favourite dish is {{value}}.", f"{wrong}'s favourite dish is {other}."]
    rng.shuffle(likes)
    link = rng.choice((f"{right} is {asked} than {wrong}.", f"{wrong} is {opposite} than {right}."))
    return Fact(
        statement=" ".join((*likes, link)),
        question=f"{right} is {asked} than {wrong}. What is the favourite dish of the {asked} one?",
        lead=f"The favourite dish of {right} is",
        value=value,
    )


SPLITS = {
    "calibrate": Split(
        noise=(
            "The kettle is on the stove.",
            "Rain fell on the roof all day.",
            "A cat sleeps by the door.",
            "Nobody came up the path.",
            "The bread is still warm.",
            "Two birds sat on the fence.",
            "The clock struck again.",
            "Here we go once more.",
        ),
        prose=(
            "On market days {name} carried {thing} from {place} and sold {number} of them before noon.",
            "It was said in {place} that {name} had once owned {thing}, but had lost it in a wager.",
            "The {adjective} road to {place} was closed, so {name} waited at the inn with {thing}.",
            "{name} wrote {number} letters that winter, and most of them were about {thing}.",
            "When the {adjective} bell rang, everyone in {place} put down {thing} and listened.",
            "Few people remembered why {name} had left {place} with nothing but {thing}.",
            "The baker, a {adjective} man, gave {name} {thing} in exchange for an old story.",
            "At dusk the lamps of {place} looked {adjective}, and {name} walked home slowly.",
            "There were {number} steps up to the chapel, and {name} counted them every morning.",
            "{name} could never decide whether {place} was {adjective} or only quiet.",
            "In the cellar they found {thing}, {number} jars of honey and a {adjective} ladder.",
            "A {adjective} wind came over the fields while {name} was repairing {thing}.",
        ),
        words={
            "name": ("Agnes", "Bertram", "Clotilde", "Dunstan", "Edwina", "Florian", "Gertrude", "Hubert"),
            "place": ("Ashcombe", "the lower village", "Millbrook", "the old quarter", "Fernley", "the abbey", "Oxbow"),
            "thing": (
                "a wicker basket",
                "a copper pan",
                "the blue cart",
                "a wool blanket",
                "a lame donkey",
                "a clay jug",
            ),
            "adjective": ("crooked", "patient", "yellow", "muddy", "cheerful", "narrow", "sleepy", "honest"),
        },
        kinds={
            "number": _about(
                "the registration number of {key}",
                ("the green tractor", "the ferry Juno", "the corner bakery", "the tin mine", "the west orchard"),
                lambda rng: _digits(rng, rng.randrange(4, 9)),
                quoted=False,
            ),
            "city": _about(
                "the birthplace of {key}",
                ("Captain Rourke", "Doctor Amsel", "Sister Beatrix", "Judge Okafor", "Miss Tennant"),
                lambda rng: rng.choice(
                    ("Lisbon", "Toronto", "Nairobi", "Helsinki", "Lima", "Osaka", "Tunis", "Bergen")
                ),
            ),
            "word": _about(
                "the secret ingredient of {key}",
                ("the harvest pie", "the mayor's soup", "the winter tea", "the red sauce", "the wedding cake"),
                lambda rng: rng.choice(("cardamom", "rosemary", "mustard", "ginger", "vinegar", "saffron", "fennel")),
            ),
            "code": _about(
                "the parcel code of {key}",
                ("the clockmaker", "the florist", "the town hall", "the printing house", "the tailor"),
                lambda rng: f"{_letters(rng, 2)}-{_digits(rng, 3)}-{_letters(rng, 1)}",
            ),
            "comparison": _comparison,
        },
    ),
    "tune": Split(
        noise=(
            "The sea is calm tonight.",
            "Gulls circle over the pier.",
            "The tide goes out.",
            "A rope hangs from the mast.",
            "The fog will lift soon.",
            "Salt dries on the planks.",
            "The tide comes back in.",
            "Waves roll against the wall.",
        ),
        prose=(
            "The {vessel} left {harbour} at first light with {number} barrels of {cargo} below deck.",
            "{sailor} checked the charts twice, since the passage near {harbour} had a {mood} reputation.",
            "For {number} days the crew saw nothing but {mood} water and the smoke of another {vessel}.",
            "A merchant from {harbour} complained that his {cargo} had been soaked by the {mood} storm.",
            "Nobody trusted the {vessel} after {sailor} had run her aground outside {harbour}.",
            "By lantern light {sailor} told the others how {cargo} was traded along the {mood} coast.",
            "The harbour master kept a list of every {vessel} and of the {cargo} that she carried.",
            "In {harbour} the price of {cargo} rose again, which made {sailor} strangely {mood}.",
            "They mended sails until midnight, and {sailor} slept on a sack of {cargo}.",
            "A {mood} current pushed the {vessel} towards the rocks, {number} yards from the shore.",
            "{sailor} had grown up in {harbour}, where every child could tie {number} knots.",
            "No letter had come from {harbour} for weeks, and the mood on the {vessel} was {mood}.",
        ),
        words={
            "vessel": ("schooner", "cutter", "barge", "trawler", "brig", "steamer"),
            "harbour": ("Port Ellery", "Saltmouth", "Grey Haven", "Cape Norris", "Dunmarsh", "Anchor Bay"),
            "cargo": ("pepper", "timber", "raw silk", "dried cod", "lamp oil", "coffee", "iron nails"),
            "sailor": ("Magnus", "Old Pieter", "Leonora", "the first mate", "Salim", "Brigid", "the cook"),
            "mood": ("restless", "gloomy", "treacherous", "gentle", "bitter", "hopeful"),
        },
        kinds={
            "number": _about(
                "the access number for {key}",
                ("the north lighthouse", "the customs house", "the chart room", "the dry dock", "the signal tower"),
                lambda rng: _digits(rng, 7),
                quoted=False,
            ),
            "phrase": _about(
                "the passphrase of {key}",
                ("the night watch", "the harbour pilots", "the smugglers", "the rowing club", "the coast guard"),
                lambda rng: (
                    f"{rng.choice(('silver', 'crimson', 'hollow', 'frozen', 'wooden', 'golden'))} "
                    f"{rng.choice(('anchor', 'turtle', 'feather', 'window', 'candle', 'thunder'))}"
                ),
            ),
            "code": _about(
                "the locker code of {key}",
                ("the ship's doctor", "the boatswain", "the second engineer", "the purser", "the radio officer"),
                lambda rng: f"{_letters(rng, 1)}{_digits(rng, 2)}-{_digits(rng, 3)}",
            ),
            "list": _about(
                "the standing order of {key}",
                ("the sailmaker", "the ferry crew", "the lock keeper", "the dive school", "the salvage office"),
                lambda rng: ", ".join(
                    rng.sample(("twine", "brushes", "tar", "buckets", "canvas", "hooks", "soap", "chalk", "wax"), 5)
                ),
            ),
        },
    ),
    "test": Split(
        noise=(
            "The grass grows in the meadow.",
            "Snow covers the far peak.",
            "The stream runs down the hill.",
            "Clouds move over the valley.",
            "The sun sets behind the ridge.",
            "A bell rings somewhere below.",
            "Pines stand along the trail.",
            "The morning air is cold.",
        ),
        prose=(
            "Professor {scholar} arrived at {site} with {number} notebooks and a {quality} telescope.",
            "The students of {site} were measuring {subject} when the {quality} alarm went off.",
            "According to {scholar}, the theory of {subject} was far too {quality} to be true.",
            "In the library of {site} there are {number} volumes on {subject}, most of them unread.",
            "{scholar} and {colleague} argued about {subject} all evening and settled nothing.",
            "A {quality} report on {subject} had been lost on the way from {site}.",
            "Every spring {colleague} repaired the {quality} instruments that the frost had damaged.",
            "The grant paid for {number} hours of work on {subject}, as {colleague} pointed out.",
            "Visitors to {site} often mistook {scholar} for the gardener.",
            "On the blackboard somebody had drawn a {quality} diagram of {subject}.",
            "{colleague} preferred to walk to {site}, although it took {number} minutes longer.",
            "What {scholar} liked about {subject} was that nobody else found it {quality}.",
        ),
        words={
            "scholar": ("Whitlock", "Abernathy", "Castellano", "Nakamura", "Lindqvist", "Obi", "Ferreira"),
            "colleague": ("the librarian", "Rosalind", "her assistant", "Emeka", "the night porter", "Yusuf"),
            "site": ("the observatory", "Mount Selby", "the weather station", "Collier Hall", "the upper campus"),
            "subject": ("comets", "mountain moss", "glacier ice", "radio noise", "bird song", "ancient maps", "tides"),
            "quality": ("modest", "brilliant", "rusty", "elaborate", "curious", "doubtful", "heavy"),
        },
        kinds={
            "number": _about(
                "the serial number of {key}",
                ("the spare generator", "the snow plough", "the seismograph", "the cable car", "the dome motor"),
                lambda rng: _digits(rng, 7),
                quoted=False,
            ),
            "phrase": _about(
                "the call sign of {key}",
                ("the rescue team", "the summit hut", "the survey plane", "the ice patrol", "the relay mast"),
                lambda rng: (
                    f"{rng.choice(('purple', 'quiet', 'broken', 'velvet', 'rapid', 'bronze'))} "
                    f"{rng.choice(('falcon', 'marble', 'saddle', 'orchid', 'hammer', 'ribbon'))}"
                ),
            ),
            "code": _about(
                "the permit code of {key}",
                ("the ski school", "the quarry", "the film crew", "the beekeeper", "the mountain guide"),
                lambda rng: f"{_digits(rng, 2)}{_letters(rng, 2)}{_digits(rng, 2)}",
            ),
            "list": _about(
                "the packing list of {key}",
                ("the geologist", "the mail runner", "the botany class", "the chess club", "the cave divers"),
                lambda rng: ", ".join(
                    rng.sample(("gloves", "lentils", "matches", "socks", "string", "cocoa", "batteries", "salt"), 5)
                ),
            ),
        },
    ),
}
