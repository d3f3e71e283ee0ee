"""The three stages of making a dataset in one folder: survey, encode, merge.

Each leaves what it has done in files, and does again what is missing alone. The survey and the
merge are for one process and its workers, the encoding for any number of these.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.chats import TEMPLATE_NAME, find_template
from data.dataset import TOKENIZER_NAME, TRAIN, VALIDATION, Dataset, Split, write_description
from data.encoding import EncodeUnit
from data.faults import Faults
from data.merging import WriteShard, plan_shards
from data.pieces.ledger import Surveyed, begin, check_arguments, read_survey, units_of, write_survey
from data.pieces.plan import Piece, list_pieces
from data.pieces.surveying import PieceRecord, SurveyPiece, read_record
from data.pieces.workers import Workers
from data.prepare_config import PrepareConfig
from data.progress import Progress
from data.shards import token_dtype
from data.survey import combine, gather_sample
from data.tokenizer import Tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

_TOKENIZER_SAMPLE_BYTES = 8_000_000


@dataclass(frozen=True)
class Preparation:
    """A dataset in the making.

    Args:
        config: the input, the tokenizer and the splits.
        arguments: those of `dataset.json`.
        folder: of the dataset.
        workers: do the work.
    """

    config: PrepareConfig
    arguments: Mapping[str, object]
    folder: Path
    workers: Workers

    @property
    def files(self) -> Path:
        """The folder of what the stages leave for each other."""
        return self.folder / "pieces"

    def survey(self) -> Surveyed:
        """Read the input, split it, and write the tokenizer; what is there is taken as it is.

        Raises:
            ValueError: the input cannot be used, or what is there was made with other arguments.
        """
        config, faults = self.config, Faults()
        pieces = list_pieces(config.input, faults)
        begin(self.files, self.arguments, pieces)
        if found := read_survey(self.files):
            logger.info("surveyed before: %.1f MB", found.survey.text_bytes / 1e6)
            return found
        found = self._survey(pieces, faults)
        held_out = found.survey.held_out
        if held_out.cut is not None:
            logger.info(
                "one document only: all after its first %d characters is validation", held_out.cut
            )
        self._write_tokenizer(found)
        write_survey(self.files, found)
        return found

    def surveyed(self) -> Surveyed:
        """Return what the survey found, earlier or elsewhere.

        Raises:
            ValueError: it has not ended, or was made with other arguments.
        """
        check_arguments(self.files, self.arguments)
        found = read_survey(self.files)
        if found is None:
            raise ValueError("stage: the survey has not ended, run --stage survey again")
        return found

    def encode(self, surveyed: Surveyed, *, task: int = 0, tasks: int = 1) -> None:
        """Encode the units of one of several tasks, as far as that has not been done.

        Args:
            surveyed: what the survey found.
            task: from 0.
            tasks: number of tasks.

        Raises:
            ValueError: the input has changed since the survey.
        """
        work = EncodeUnit(
            self.files,
            self.config.layout,
            self.folder / TOKENIZER_NAME,
            surveyed.survey.held_out,
            self._drops_duplicates,
        )
        total = surveyed.survey.text_bytes if tasks == 1 else None
        with Progress("encoding", total) as progress:
            for text_bytes in self.workers.run(work, surveyed.units[task::tasks]):
                progress.update(text_bytes)

    def check_encoded(self, surveyed: Surveyed, tasks: int) -> None:
        """Raise a ValueError that names those of some tasks which have not encoded all."""
        missing = [
            number
            for number, unit in enumerate(surveyed.units)
            if not unit.path(self.files, "encoded").exists()
        ]
        if missing:
            left = sorted({number % tasks for number in missing})
            raise ValueError(
                f"stage: {len(missing)} of {len(surveyed.units)} pieces are not encoded, run"
                f" --stage encode --tasks {tasks} again with --task {' and '.join(map(str, left))}"
            )

    def merge(self, surveyed: Surveyed) -> Dataset:
        """Write the shards of both splits and `dataset.json`, and remove all else."""
        tokenizer = Tokenizer(self.folder / TOKENIZER_NAME)
        dtype = token_dtype(tokenizer.vocab_size, pairs=self.config.layout.is_learnt_in_part)
        write = WriteShard(self.folder, dtype, tokenizer.vocab_size, tokenizer.fingerprint)
        splits = {
            name: [*plan_shards(surveyed.units, self.files, name, self.config.shard_tokens)]
            for name in (TRAIN, VALIDATION)
        }
        shards = [shard for split in splits.values() for shard in split]
        records = {record.name: record for record in self.workers.run(write, shards)}
        dataset = Dataset(
            path=self.folder,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            corpus_fingerprint=surveyed.survey.fingerprint,
            splits={
                name: Split(shards=tuple(records[shard.name] for shard in split))
                for name, split in splits.items()
            },
            duplicates=surveyed.survey.duplicates,
            skipped=dict(sorted(surveyed.faults.counts.items())),
            skipped_at=surveyed.faults.examples,
            arguments=self.arguments,
        )
        write_description(dataset)
        shutil.rmtree(self.files)
        return dataset

    @property
    def _drops_duplicates(self) -> bool:
        return self.config.duplicates != "keep"

    @property
    def _near_threshold(self) -> float | None:
        return self.config.near_threshold if self.config.duplicates == "near" else None

    @property
    def _sample_bytes(self) -> int:
        return 0 if self.config.tokenizer else _TOKENIZER_SAMPLE_BYTES

    def _survey(self, pieces: Sequence[Piece], faults: Faults) -> Surveyed:
        """Read all pieces and put together what is in them."""
        config = self.config
        read = SurveyPiece(
            self.files,
            config.layout,
            self._sample_bytes,
            self._drops_duplicates,
            sketches=self._near_threshold is not None,
        )
        try:
            with Progress("reading") as progress:
                for text_bytes in self.workers.run(read, enumerate(pieces)):
                    progress.update(text_bytes)
            records = [read_record(self.files, number) for number in range(len(pieces))]
            _add_faults(faults, pieces, records)
            _refuse_mostly_damaged(config, faults, sum(record.documents for record in records))
            units = units_of(pieces, [record.units for record in records])
            found = combine(
                units,
                self.files,
                config.layout,
                validation_fraction=config.validation_fraction,
                drop_duplicates=self._drops_duplicates,
                near_threshold=self._near_threshold,
            )
        finally:  # Also when nothing was left: the faults are the reason.
            for line in faults.lines():
                logger.warning("%s", line)
        return Surveyed(found, units, faults)

    def _write_tokenizer(self, surveyed: Surveyed) -> None:
        path, config = self.folder / TOKENIZER_NAME, self.config
        if config.vocab_size is not None:
            logger.info("training a tokenizer of %d tokens", config.vocab_size)
            sample = gather_sample(
                surveyed.units,
                self.files,
                config.layout,
                surveyed.survey.held_out,
                sample_bytes=self._sample_bytes,
                drop_duplicates=self._drops_duplicates,
            )
            train_tokenizer(sample, config.vocab_size, path)
        else:
            assert config.tokenizer is not None
            path.write_bytes(Tokenizer(config.tokenizer).serialized)
        template = config.layout.template
        if source := template.source if template else find_template(config.tokenizer):
            (self.folder / TEMPLATE_NAME).write_bytes(source.encode())
        tokenizer = Tokenizer(path)
        if tokenizer.bos_id == tokenizer.eos_id:
            logger.info("one token, %d, begins and ends a document", tokenizer.eos_id)


def _add_faults(faults: Faults, pieces: Sequence[Piece], records: Sequence[PieceRecord]) -> None:
    """Add the faults of all pieces, in order; a line counts from the beginning of its file."""
    lines_before: Counter[Path] = Counter()
    for piece, record in zip(pieces, records, strict=True):
        source = piece.sources[0]
        examples = record.faults_at
        if source.part and (before := lines_before[source.path]):
            examples = {
                reason: [
                    f"{source.name}:{int(origin.rpartition(':')[2]) + before}" for origin in origins
                ]
                for reason, origins in examples.items()
            }
        lines_before[source.path] += record.lines_read
        faults.extend(record.faults, examples)


def _refuse_mostly_damaged(config: PrepareConfig, faults: Faults, documents: int) -> None:
    if faults.damaged > config.max_skipped_fraction * (documents + faults.damaged):
        raise ValueError(
            f"input: {faults.damaged} of {documents + faults.damaged} documents cannot be used,"
            f" {'; '.join(faults.lines())}: mend the input or name the right"
            f" {config.layout.options}, or raise max_skipped_fraction {config.max_skipped_fraction}"
        )
