"""Long-context tasks made here, the same for the same seed: pass keys, and four in the style of RULER.

Each is a plain completion of exactly the tokens asked for, filler included: small chat models answer those
more surely than chats. Knows a tokenizer and texts; neither a model nor a server.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_sps2.engine.tokenizer import Tokenizer

NUM_DEPTHS = 8  # pass keys of consecutive seeds go round these many depths
PLACES = (
    *("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Lisbon", "Dublin", "Athens"),
    *("Cairo", "Delhi", "Tokyo", "Lima", "Havana", "Boston", "Chicago", "Denver", "Dallas", "Seattle"),
)


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, what its answer must contain, and how many tokens the answer may have."""

    kind: str
    prompt_ids: list[int]
    answers: tuple[str, ...]
    max_tokens: int
    # Where the asked needle starts, as a share of the haystack; None where there is not one place.
    depth: float | None = None


TaskMaker = Callable[[Tokenizer, str, int, int], Task]  # tokenizer, filler, num_tokens, seed


def score(task: Task, text: str) -> float:
    """The share of the answers that stand in `text` as whole words, upper or lower case: 1.0 is all."""
    found = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in task.answers]
    return sum(match is not None for match in found) / len(found)


def pass_key(
    tokenizer: Tokenizer, filler: str, num_tokens: int, seed: int, depth: float | None = None
) -> Task:
    """One number in a haystack at `depth` (0 first, 1 last), or at the seed's turn of NUM_DEPTHS depths."""
    rng, depth = random.Random(seed), (seed % NUM_DEPTHS + 0.5) / NUM_DEPTHS if depth is None else depth
    (number,) = _numbers(rng, 1)
    needles = [(depth, f"The secret number of the city is {number}.")]
    question = "What is the secret number of the city?\nThe secret number of the city is"
    ids = _haystack(tokenizer, filler, num_tokens, needles, question, rng)
    return Task("pass_key", ids, (number,), 10, depth)


def multi_key(tokenizer: Tokenizer, filler: str, num_tokens: int, seed: int, *, num_keys: int = 4) -> Task:
    """Numbers of several places, at even depths; one is asked for."""
    rng = random.Random(seed)
    places, numbers = rng.sample(PLACES, num_keys), _numbers(rng, num_keys)
    depths = _depths(num_keys)
    needles = [
        (depth, f"The secret number of {place} is {number}.")
        for depth, place, number in zip(depths, places, numbers, strict=True)
    ]
    asked = rng.randrange(num_keys)
    subject = f"the secret number of {places[asked]}"
    ids = _haystack(tokenizer, filler, num_tokens, needles, f"What is {subject}?\nT{subject[1:]} is", rng)
    return Task("multi_key", ids, (numbers[asked],), 10, depths[asked])


def multi_value(
    tokenizer: Tokenizer, filler: str, num_tokens: int, seed: int, *, num_values: int = 2
) -> Task:
    """Several numbers of one place, at even depths; all are asked for."""
    rng = random.Random(seed)
    place, numbers = rng.choice(PLACES), _numbers(rng, num_values)
    needles = [
        (depth, f"One of the secret numbers of {place} is {number}.")
        for depth, number in zip(_depths(num_values), numbers, strict=True)
    ]
    question = f"The secret numbers of Sydney are 40817 and 63092.\nThe secret numbers of {place} are"
    ids = _haystack(tokenizer, filler, num_tokens, needles, question, rng)
    return Task("multi_value", ids, tuple(numbers), 10 * num_values + 6)


def variable_tracking(
    tokenizer: Tokenizer, filler: str, num_tokens: int, seed: int, *, num_hops: int = 1
) -> Task:
    """A number is given to a variable, that one to the next, and so on; all that hold it are asked for."""
    rng = random.Random(seed)
    letters = rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", num_hops + 1)
    names, (number,) = [3 * letter for letter in letters], _numbers(rng, 1)
    given = [
        f"VAR {names[0]} = {number}",
        *(f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)),
    ]
    needles = list(zip(_depths(num_hops + 1), (f"{line}." for line in given), strict=True))
    question = (
        "Example: VAR III = 40817. VAR OOO = VAR III.\n"
        "The variables that hold 40817 are: VAR III, VAR OOO.\n\n"
        f"The variables that hold {number} are: VAR"
    )
    ids = _haystack(tokenizer, filler, num_tokens, needles, question, rng)
    return Task("variable_tracking", ids, tuple(names), 6 * (num_hops + 1) + 6)


def common_words(
    tokenizer: Tokenizer, filler: str, num_tokens: int, seed: int, *, num_words: int = 3
) -> Task:
    """A list of the filler's words in which every third is one of a few; the few are asked for."""
    rng = random.Random(seed)
    words = sorted({word.lower() for word in re.findall(r"\b[A-Za-z]{4,9}\b", filler)})
    if len(words) <= num_words:
        raise ValueError(f"the filler has {len(words)} words of 4 to 9 letters; give a longer text")
    common, others = _split(words, num_words, rng)
    turns = itertools.cycle(common)
    chunks = (f" {next(turns) if i % 3 == 0 else rng.choice(others)}," for i in itertools.count())
    head = _bare(tokenizer, "Below is a list of words. Some of them are repeated very often.\n\n")
    tail = _bare(tokenizer, f"\n\nThe {num_words} words that are repeated most often in the list above are:")
    ids = _start(tokenizer) + head
    body = _take(tokenizer, chunks, num_tokens - len(ids) - len(tail))
    return Task("common_words", ids + list(itertools.chain(*body)) + tail, tuple(common), 8 * num_words)


TASKS: dict[str, TaskMaker] = {
    "pass_key": pass_key,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}


def _haystack(
    tokenizer: Tokenizer,
    filler: str,
    num_tokens: int,
    needles: Sequence[tuple[float, str]],
    question: str,
    rng: random.Random,
) -> list[int]:
    """num_tokens ids: sentences of `filler` with each (depth, needle) between two of them, then `question`.

    Raises ValueError for a depth outside 0 to 1, an empty filler, or too few tokens.
    """
    if any(not 0 <= depth <= 1 for depth, _ in needles):
        raise ValueError(f"depth={[depth for depth, _ in needles]} must be from 0 (first) to 1 (last)")
    hidden = [(depth, _bare(tokenizer, f"\n{needle}\n")) for depth, needle in sorted(needles)]
    tail = _bare(tokenizer, f"\n\n{question}")
    ids = _start(tokenizer)
    room = num_tokens - len(ids) - len(tail) - sum(len(needle) for _, needle in hidden)
    num_placed = 0
    for sentence in _take(tokenizer, _sentences(filler, num_tokens, rng), room):
        while hidden and num_placed >= hidden[0][0] * room:
            ids += hidden.pop(0)[1]
        ids += sentence
        num_placed += len(sentence)
    return ids + [i for _, needle in hidden for i in needle] + tail


def _take(tokenizer: Tokenizer, pieces: Iterator[str], num_tokens: int) -> list[list[int]]:
    """Ids of `pieces`, num_tokens in all; the last piece is cut to fit."""
    if num_tokens < 1:
        raise ValueError(f"the prompt is {1 - num_tokens} tokens too short for its question; ask for more")
    taken: list[list[int]] = []
    while num_tokens > 0:
        taken.append(_bare(tokenizer, next(pieces))[:num_tokens])
        num_tokens -= len(taken[-1])
    return taken


def _sentences(text: str, num_tokens: int, rng: random.Random) -> Iterator[str]:
    """Sentences of `text` on one line each, from a random place on, round and round."""
    length = (
        10 * num_tokens + 1000
    )  # characters: more than these tokens have; the whole text may be megabytes
    start = rng.randrange(max(1, len(text) - length))
    # The first one is the rest of a sentence.
    sentences = [" ".join(s.split()) + " " for s in re.split(r"(?<=[.!?])\s+", text[start : start + length])]
    if not any(sentence.strip() for sentence in sentences):
        raise ValueError("the filler is empty; give a text")
    return itertools.cycle(sentences[1:] or sentences)


def _bare(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` without the special tokens that the tokenizer adds."""
    return [i for i in tokenizer.encode(text) if i not in tokenizer.special_token_ids]


def _start(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that this tokenizer puts before a text."""
    return list(itertools.takewhile(lambda i: i in tokenizer.special_token_ids, tokenizer.encode("a")))


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of five digits, none of them shown in an example."""
    while True:
        numbers = [str(number) for number in rng.sample(range(10000, 100000), count)]
        if not {"40817", "63092"} & set(numbers):
            return numbers


def _depths(count: int) -> list[float]:
    return [(i + 0.5) / count for i in range(count)]


def _split(words: Sequence[str], count: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """`count` words chosen, and the others."""
    chosen = rng.sample(words, count)
    return chosen, [word for word in words if word not in chosen]
