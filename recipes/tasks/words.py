"""Names, keys and values of the generated tasks, from lists that the splits do not share."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Words:
    """The lists of one split.

    Args:
        adjectives: first halves of keys.
        nouns: second halves of keys.
        letters: what coded words and variables begin with.
        given: given names.
        roots: beginnings of surnames and places.
        crafts: what people live on.
    """

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    letters: str
    given: tuple[str, ...]
    roots: tuple[str, ...]
    crafts: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = {
    "tune": Words(
        adjectives=_words(
            "able acidic agile alert amber ample arctic ashen awake azure bashful blunt bold brash brief bright brisk "
            "calm candid chilly civil clever coarse coastal cosy crisp cruel damp daring deep dense dim dizzy dreamy "
            "eager early easy elastic elegant exact faint fancy feeble fierce firm flat fluent fond frank frosty "
            "gaunt gentle giant glad gleaming grand green grim hardy harsh hazy hectic hidden hoarse humble icy idle "
            "jagged jolly keen kind lavish lazy lean limp lively local lofty loyal lucid lunar mellow mild misty "
            "moist murky narrow neat nimble noble novel oaken odd olive opaque"
        ),
        nouns=_words(
            "acorn airport almond anvil apron armchair arrow badge bakery balcony bamboo barrel basin beacon beetle "
            "bicycle blanket blossom bonnet boulder bracket bridge bucket button cabin cactus camera candle canyon "
            "carpet castle cellar chapel cherry chimney cloak clover cobweb compass copper cottage cradle crayon "
            "cricket curtain cushion dagger daisy desert diamond dolphin donkey drawer easel engine envelope fabric "
            "falcon ferry fiddle flannel flute forest fossil fountain galaxy garden garlic ginger glacier goblet "
            "granite guitar hammock harbor harvest hatchet helmet heron hinge hornet iceberg insect island ivory "
            "jacket jigsaw jungle kennel kettle ladder lagoon lantern lemon"
        ),
        letters="abcdefghijklm",
        given=_words(
            "Adela Alban Anselm Barbara Bastian Benno Carla Casimir Cosima Dagmar Dorian Edgar Elspeth Erwin Fabia "
            "Felix Gerda Gideon Hanna Hector Ida Isidor Jana Jonas"
        ),
        roots=_words("Ald Birch Bram Cald Darn Dun Elm Farn Fen Glen Grim Hal Hart Holm Kel Kirk Lang Lind Loth Mar"),
        crafts=_words("baker carpenter glazier weaver surgeon printer miller tanner cooper organist"),
    ),
    "test": Words(
        adjectives=_words(
            "ornate outer pale patient peaceful plain pleasant plump polite portly precise prickly proud purple quaint "
            "quick quiet rapid rare ready regal remote rich rigid ripe robust rocky rosy rough round royal rugged "
            "rustic salty sandy scarce serene shallow sharp shiny shrill shy silent silver simple sleek slender slim "
            "smooth snug sober soft solar solemn solid sour sparse spicy stale steady steep sticky stout strict sturdy "
            "subtle sunny supple sweet swift tame tart tender thick thin tidy timid tiny torrid tough tranquil "
            "trusty urban vacant vague vast velvet verbal vivid warm wary weary wide wild windy wiry wise witty young"
        ),
        nouns=_words(
            "lizard locket lumber magnet mallet mango maple marble market meadow medal melon mirror mitten monkey "
            "mountain museum mustard napkin needle nettle notebook nutmeg oboe ocean orchard ostrich otter oyster "
            "paddle palace panther parcel parrot pebble pelican pencil pepper piano pigeon pillow pioneer planet "
            "pocket pond poppy pottery prairie pudding puppet quarry quilt rabbit radish rainbow raven ribbon river "
            "rocket saddle sailor sandal satchel scarf scooter shelter shovel sparrow spider spoon squirrel stable "
            "statue sunset sweater tavern teapot temple thimble thistle ticket tiger toaster tower tractor trumpet "
            "tulip tunnel turnip umbrella valley vessel village violin walnut whistle"
        ),
        letters="nopqrstuvwxyz",
        given=_words(
            "Klara Konrad Leonie Linus Ludmila Magda Matthias Mirabel Nadja Nestor Ottilie Oswin Petra Philemon "
            "Rafaela Roderick Sabina Silvan Thea Tristan Ulrike Valentin Wilma Zeno"
        ),
        roots=_words("Mel Mos Nor Oak Orm Pen Pol Raven Roth Rush Sand Sel Stan Sten Thorn Trev Wal Wel Wick Yar"),
        crafts=_words("saddler brewer potter engraver teacher gardener notary clockmaker locksmith painter"),
    ),
}
_SURNAMES = ("man", "sen", "wood", "ridge", "field", "croft", "ley", "wick")
_PLACES = ("by", "ford", "ton", "haven", "mouth", "stead", "bridge", "dale")


def shuffled_pairs(first: tuple[str, ...], second: tuple[str, ...], joint: str, rng: random.Random) -> list[str]:
    """Every word of one list with every word of the other, in random order."""
    pairs = [f"{a}{joint}{b}" for a in first for b in second]
    rng.shuffle(pairs)
    return pairs


def keys(split: str, rng: random.Random) -> Iterator[str]:
    """About ten thousand keys such as "calm-lantern", each once."""
    yield from shuffled_pairs(WORDS[split].adjectives, WORDS[split].nouns, "-", rng)


def number(rng: random.Random) -> str:
    """A number of seven digits."""
    return str(rng.randrange(10**6, 10**7))


def uuid4(rng: random.Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def coded(split: str, rng: random.Random, letters: int) -> Iterator[str]:
    """Meaningless words of so many letters without end, each once."""
    seen = set()
    while True:
        word = rng.choice(WORDS[split].letters) + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=letters - 1))
        if word not in seen:
            seen.add(word)
            yield word


def people(split: str, rng: random.Random) -> list[str]:
    """About 3,800 full names, each once."""
    surnames = tuple(root + end for root in WORDS[split].roots for end in _SURNAMES)
    return shuffled_pairs(WORDS[split].given, surnames, " ", rng)


def places(split: str, rng: random.Random) -> list[str]:
    """160 names of places, each once."""
    return shuffled_pairs(WORDS[split].roots, _PLACES, "", rng)
