"""Words, numbers and identifiers of which tasks make keys and values; drawn from a seeded generator, never twice."""

from __future__ import annotations

import functools
import random
import re
import string
import uuid
from collections.abc import Callable

from foveate.tasks.text import paragraphs

_NOUNS = """
    acorn almond anchor apple apron arrow autumn badger bakery bamboo banjo barley barrel basket beacon beaver
    blanket blossom bottle branch breeze bridge bucket butter button cabin cactus camel candle canoe canyon
    captain carpet carrot castle cedar chapel cherry chimney cinema clover cobbler coffee compass copper coral
    cottage cotton cradle cricket crystal curtain cushion daisy desert dolphin donkey dragon drummer eagle
    engine falcon farmer feather fiddle finger flower forest fountain furnace garden garlic giraffe glacier
    goblin guitar hammer harbor hazel helmet heron honey hornet island ivory jacket jasmine jungle kettle
    kitchen kitten ladder lagoon lantern lemon leopard lettuce lizard lobster magnet mango maple marble market
    meadow melon mirror monkey morning mountain museum needle nutmeg ocean olive onion orchard orchid otter
    oyster paddle palace panther parrot peach peanut pebble pelican pencil pepper piano pigeon pillow pirate
    planet plum pocket pony potato prairie pumpkin puppet rabbit raccoon raven ribbon river rocket saddle
    sailor salmon sandal saturn scarf shadow shelter shepherd silver sparrow spider spoon squirrel stable
    statue summer sunset swallow tavern teapot temple thistle thunder tiger timber tomato tractor trumpet
    tulip tunnel turtle umbrella valley velvet village violin walnut walrus water weaver whale willow window
    winter wizard wolf yarn zebra
"""
_ADJECTIVES = """
    ancient bitter bold brave bright brisk broad calm careful cheap clever cloudy clumsy cold cosy crooked cruel
    curious damp dark distant dull dusty eager early empty faint famous fancy fearless fierce fragile fresh
    frozen gentle giant glossy golden grand grateful happy heavy hollow honest hungry icy jolly keen kind large
    late lazy little lively lonely loud lucky mellow merry mighty misty modest muddy narrow neat noisy old pale
    patient plain polite proud purple quick quiet rapid ripe rough round royal rusty salty scarlet shallow sharp
    shiny silent sleepy slender slow small smooth soft solemn sour spicy steady steep sticky strange sturdy
    sunny sweet swift tall tame tasty thin tidy tiny tired velvety warm wild wise wooden young
"""
NOUNS = tuple(_NOUNS.split())
ADJECTIVES = tuple(_ADJECTIVES.split())
KINDS = ("words", "numbers", "uuids")


def draw(kind: str, count: int, rng: random.Random, *, digits: int = 7) -> list[str]:
    """`count` different strings of one kind: "words", "numbers" (of `digits` digits) or "uuids".

    Words are single nouns while there are enough of them, else adjective-noun compounds.
    """
    if kind == "words":
        return rng.sample(NOUNS if count <= len(NOUNS) else compounds(), count)
    if kind == "numbers":
        return different(count, lambda: str(rng.randrange(10 ** (digits - 1), 10**digits)))
    return different(count, lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)))


def capitals(count: int, letters: int, rng: random.Random) -> list[str]:
    """`count` different names of `letters` capital letters."""
    return different(count, lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)))


def different(count: int, make: Callable[[], str]) -> list[str]:
    """`count` different results of `make`, in the order in which they came."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[make()] = None
    return list(drawn)


@functools.cache
def compounds() -> tuple[str, ...]:
    """Every "adjective-noun"."""
    return tuple(f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS)


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """English words of at least four letters from Python's manual and `NOUNS`, none part of another."""
    text = " ".join(paragraphs(None))
    words = sorted({*re.findall(r"(?<!\S)[a-z]{4,}(?=[ ,.])", text), *NOUNS})
    everything = "\n".join(words)
    return tuple(word for word in words if everything.count(word) == 1)
