"""Answers as models and people write them, with every mark and word that a protocol treats in its own way."""

from __future__ import annotations

import random
import re

WORDS = re.findall(
    r"\S+",
    "a an the none zero one two ten yes no not No Not blue Red dont aint it's its 'ows'at couldn'tve theyre U.S.A. 3.5 "
    "1,000 10:30 $5.00 red/blue a-b e.g. . , ? ! ; / [ ] ( ) { } + = _ - > < @ ` \\ \" 's ... A B E B. (C) wouldnt've "
    "answer is The answer is A. there dog 2,5 7. .7 it.is 1. 2. 100 cat",
)
JOINTS = (" ", " ", " ", "", "\n", "\t", ". ", ", ", ",", "-")


def answer(draw: random.Random, words: int = 6) -> str:
    """Draws one."""
    chosen = [draw.choice(WORDS) for _ in range(draw.randint(0, words))]
    return "".join(word + draw.choice(JOINTS) for word in chosen)


def answers(seed: int, count: int) -> list[str]:
    """Draws some."""
    draw = random.Random(seed)
    return [answer(draw) for _ in range(count)]


def panels(seed: int, count: int) -> list[tuple[str, list[str]]]:
    """Draws predictions, each with the answers of ten people, who often agree and are often unanimous."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        pool = [answer(draw, words=2) for _ in range(draw.randint(1, 3))]
        found.append((draw.choice([*pool, answer(draw, words=2)]), [draw.choice(pool) for _ in range(10)]))
    return found


def misspelt(seed: int, count: int) -> list[tuple[str, list[str]]]:
    """Draws predictions, each with texts that differ from it by some characters."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        said = answer(draw, words=4)
        told = ["".join(draw.choice((c, c, c, "x", "", c + "y")) for c in said) for _ in range(draw.randint(1, 3))]
        found.append((said, told))
    return found


def captions(seed: int, count: int) -> list[tuple[str, list[str]]]:
    """Draws captions, each with one to five references that share words with it."""
    draw = random.Random(seed)
    words = re.findall(r"\w+", "a man dog red bus on the street two women play with ball near water table")
    found = []
    for _ in range(count):
        topic = draw.sample(words, 6)
        texts = [" ".join(draw.choice(topic) for _ in range(draw.randint(1, 9))) for _ in range(draw.randint(2, 6))]
        found.append((texts[0], texts[1:]))
    return found
