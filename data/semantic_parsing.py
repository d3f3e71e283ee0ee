"""A small task to finetune on: requests to an assistant, and their parse trees.

    python -m data.semantic_parsing --output datasets/parsing --examples 20000 --held_out 500

Made by a grammar from a seed, in the layout of TOPv2 (arXiv 2010.03546): intents and slots in
brackets, words that fill no slot left out, slots that may hold an intent of their own.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.command_line import run_command
from data.output_streams import naming_the_file

MAX_EXAMPLES = 50_000
"""Of each split; the grammar has more requests than twice this."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    output: Path
    """Folder to write."""
    examples: int = 20_000
    """Examples to train on."""
    held_out: int = 500
    """Examples to test on."""
    seed: int = 0
    """Fixes the examples."""


@dataclass(frozen=True)
class Intent:
    """An intent and its phrases."""

    name: str
    phrases: tuple[str, ...]
    """Words, with {SLOT} where one is filled."""


_NAMES = ("anna", "ben", "my sister", "the plumber", "dr lee", "maria", "grandma", "the team")
_HOURS = tuple(f"{hour} {half}" for hour in range(1, 13) for half in ("am", "pm"))
_DAYS = ("monday", "tuesday", "friday", "saturday", "sunday", "tomorrow", "today", "next week")
_PLACES = ("paris", "oslo", "new york", "the station", "cape town", "lima", "downtown", "kyoto")
_ARTISTS = ("miles davis", "the beatles", "nina simone", "bach", "fela kuti", "bjork")
_SONGS = ("so what", "let it be", "feeling good", "hunter", "zombie", "blue train")
_GENRES = ("jazz", "rock", "samba", "techno", "folk", "blues")
_LENGTHS = tuple(f"{n} {unit}" for n in (5, 10, 15, 20, 30, 45) for unit in ("minutes", "seconds"))
_TASKS = ("water the plants", "buy milk", "pay the rent", "feed the cat", "renew my passport")
_TEXTS = ("i am late", "dinner is ready", "see you soon", "the train left", "call me back")
_WEATHER = ("rain", "snow", "sun", "wind", "fog")
_CATEGORIES = ("restaurant", "museum", "pharmacy", "park", "bakery")

SLOTS: Mapping[str, Sequence[str]] = {
    "DATE_TIME": (*_DAYS, *(f"{day} at {hour}" for day in _DAYS for hour in _HOURS)),
    "CONTACT": _NAMES,
    "LOCATION": _PLACES,
    "ARTIST": _ARTISTS,
    "SONG": _SONGS,
    "GENRE": _GENRES,
    "DURATION": _LENGTHS,
    "CONTENT": _TEXTS,
    "WEATHER": _WEATHER,
    "CATEGORY": _CATEGORIES,
    "ERRAND": _TASKS,
}
"""Values of each slot, besides the intents of NESTED."""

NESTED: Mapping[str, tuple[Intent, ...]] = {
    "LOCATION": (
        Intent("GET_LOCATION", ("the nearest {CATEGORY}", "a {CATEGORY} near {CONTACT}")),
        Intent("GET_LOCATION_HOME", ("{CONTACT} 's house",)),
    ),
    "ERRAND": (
        Intent("CALL", ("call {CONTACT}", "phone {CONTACT}")),
        Intent("SEND_MESSAGE", ("tell {CONTACT} that {CONTENT}",)),
    ),
}
"""Intents that may fill a slot themselves."""

INTENTS = (
    Intent(
        "CREATE_ALARM",
        ("wake me up {DATE_TIME}", "set an alarm for {DATE_TIME}", "alarm {DATE_TIME} please"),
    ),
    Intent("DELETE_ALARM", ("cancel my alarm for {DATE_TIME}", "remove the {DATE_TIME} alarm")),
    Intent(
        "CREATE_REMINDER",
        (
            "remind me to {ERRAND}",
            "remind me {DATE_TIME} to {ERRAND}",
            "remind {CONTACT} to {ERRAND} {DATE_TIME}",
        ),
    ),
    Intent(
        "GET_WEATHER",
        (
            "what is the weather in {LOCATION}",
            "will there be {WEATHER} {DATE_TIME}",
            "any {WEATHER} in {LOCATION} {DATE_TIME}",
        ),
    ),
    Intent(
        "PLAY_MUSIC",
        ("play {SONG} by {ARTIST}", "put on some {GENRE}", "i want to hear {ARTIST}"),
    ),
    Intent("CREATE_TIMER", ("start a timer of {DURATION}", "count down {DURATION}")),
    Intent(
        "GET_DIRECTIONS",
        ("how do i get to {LOCATION}", "directions from {LOCATION} to {LOCATION}"),
    ),
    Intent(
        "GET_DURATION", ("how long is the drive to {LOCATION}", "time to {LOCATION} {DATE_TIME}")
    ),
    Intent(
        "SEND_MESSAGE",
        ("text {CONTACT} {CONTENT}", "tell {CONTACT} that {CONTENT}", "message {CONTACT}"),
    ),
    Intent("CALL", ("call {CONTACT}", "call {CONTACT} {DATE_TIME}")),
)
"""Intents of whole requests."""

_NESTED_SHARE = 0.4


def examples(seed: int) -> Iterator[tuple[str, str]]:
    """Yield requests and their parses without end, no request twice.

    Args:
        seed: Fixes the requests and their order.
    """
    draw, seen = random.Random(seed), set()
    while True:
        utterance, parse = _utter(draw.choice(INTENTS), draw)
        if utterance not in seen:
            seen.add(utterance)
            yield utterance, parse


def _utter(intent: Intent, draw: random.Random) -> tuple[str, str]:
    """Return a random utterance of an intent, and its parse."""
    words, tree = [], [f"[IN:{intent.name}"]
    for word in draw.choice(intent.phrases).split():
        if not word.startswith("{"):
            words.append(word)
            continue
        slot = word.strip("{}")
        if slot in NESTED and draw.random() < _NESTED_SHARE:
            text, meaning = _utter(draw.choice(NESTED[slot]), draw)
        else:
            text = meaning = draw.choice(SLOTS[slot])
        words.append(text)
        tree.append(f"[SL:{slot} {meaning} ]")
    return " ".join(words), " ".join([*tree, "]"])


def write(options: Options) -> None:
    """Write train.jsonl and test.jsonl, which share no request, with TOPv2's names of fields."""
    count, held_out = options.examples, options.held_out
    if not (0 < count <= MAX_EXAMPLES and 0 < held_out <= MAX_EXAMPLES):
        raise ValueError(f"examples {count}, held_out {held_out}: give 1 to {MAX_EXAMPLES}")
    with naming_the_file("output", options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    made = list(islice(examples(options.seed), count + held_out))
    random.Random(options.seed).shuffle(made)  # requests of intents with few phrases come early
    for name, part in (("test", made[:held_out]), ("train", made[held_out:])):
        path = options.output / f"{name}.jsonl"
        with naming_the_file("output", path), path.open("w") as file:
            for utterance, parse in part:
                record = {"utterance": utterance, "semantic_parse": parse}
                file.write(json.dumps(record) + "\n")
    print(f"{options.output}: train.jsonl {count}, test.jsonl {held_out}")


def main() -> None:
    run_command(
        Options,
        write,
        prog="python -m data.semantic_parsing",
        description="Write requests to an assistant and their parses, made by a grammar, into "
        "train.jsonl and test.jsonl.",
    )


if __name__ == "__main__":
    main()
