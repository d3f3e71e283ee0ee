"""What the stages of a preparation leave for each other, beside the files of the units.

The plan: the arguments and the pieces of the input. The survey: what was found in these.
"""

import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.faults import Faults
from data.pieces.plan import Piece
from data.pieces.units import Unit, written_aside
from data.sources.source import Source
from data.survey import HeldOut, Survey

logger = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(frozen=True)
class Surveyed:
    """What the first stage found."""

    survey: Survey
    units: Sequence[Unit]
    faults: Faults


def begin(folder: Path, arguments: Mapping[str, object], pieces: Sequence[Piece]) -> None:
    """Write the plan; what an earlier call left is kept, if it was of the same input.

    Raises:
        ValueError: it was of other arguments.
    """
    plan = _plan(arguments, pieces)
    if (folder / "plan.json").exists():
        check_arguments(folder, arguments)
        if _read(folder / "plan.json") == plan:
            return
        logger.info("the input has changed since the last survey, which begins again")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "plan.json", plan)


def check_arguments(folder: Path, arguments: Mapping[str, object]) -> None:
    """Raise a ValueError where the plan in a folder is not of these arguments."""
    if not (folder / "plan.json").exists():
        raise ValueError("stage: no survey is there, run --stage survey first")
    plan = _read(folder / "plan.json")
    if (plan["format"], plan["arguments"]) != (_FORMAT, json.loads(json.dumps(arguments))):
        raise ValueError(
            f"stage: the survey in {folder.parent} was made with other arguments, give the same to"
            " every stage, or remove that folder"
        )


def write_survey(folder: Path, surveyed: Surveyed) -> None:
    """Write what the survey found."""
    pieces = Counter(unit.number for unit in surveyed.units)
    content = {
        "survey": dataclasses.asdict(surveyed.survey),
        "units": [pieces[number] for number in sorted(pieces)],
        "faults": dict(surveyed.faults.counts),
        "faults_at": surveyed.faults.examples,
    }
    _write(folder / "survey.json", content)


def read_survey(folder: Path) -> Surveyed | None:
    """Return what the survey found; None where it has not ended."""
    if not (folder / "survey.json").exists():
        return None
    found = _read(folder / "survey.json")
    pieces = [
        Piece(tuple(_source(*source) for source in sources), is_kept)
        for sources, is_kept in _read(folder / "plan.json")["pieces"]
    ]
    survey = found["survey"] | {"held_out": HeldOut(**found["survey"]["held_out"])}
    return Surveyed(
        Survey(**survey),
        units_of(pieces, found["units"]),
        Faults(counts=Counter(found["faults"]), examples=found["faults_at"]),
    )


def units_of(pieces: Sequence[Piece], counts: Sequence[int]) -> list[Unit]:
    """Return the units of pieces, of which each has so many."""
    return [
        Unit(piece, number, part)
        for number, (piece, count) in enumerate(zip(pieces, counts, strict=True))
        for part in range(count)
    ]


def _plan(arguments: Mapping[str, object], pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return the plan as it is read back, with the state of each file."""
    content = {
        "format": _FORMAT,
        "arguments": arguments,
        "pieces": [
            [
                [[str(path), name, part, *_state(path)] for path, name, part in piece.sources],
                piece.is_kept,
            ]
            for piece in pieces
        ],
    }
    return json.loads(json.dumps(content))


def _source(path: str, name: str, part: list[int] | None, *_: int) -> Source:
    return Source(Path(path), name, (part[0], part[1]) if part else None)


def _state(path: Path) -> tuple[int, int]:
    """Return size and time of a file; of what is none, nothing that changes."""
    if not path.is_file():
        return 0, 0
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def _write(path: Path, content: Mapping[str, object]) -> None:
    with written_aside(path) as file:
        file.write(json.dumps(content).encode())
