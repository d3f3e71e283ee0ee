"""Whether a dataset's tokens are those that given weights have learnt."""

from pathlib import Path
from tempfile import TemporaryDirectory

from data.tokenizer import Tokenizer
from data.urls import Location, Url, location
from models.checkpoint_format import TOKENIZER, find_checkpoint, read_manifest


def check_tokenizer(init_from: str, tokenizer_path: Path, fingerprint: str) -> None:
    """Refuse a dataset whose ids stand for other pieces than in the weights a run starts from.

    Two files may hold the same pieces, as a SentencePiece model and the tokenizer.json made of it.

    Args:
        init_from: Run or checkpoint folder of the weights.
        tokenizer_path: The tokenizer of the dataset.
        fingerprint: Its fingerprint.

    Raises:
        ValueError: If it is another one.
    """
    path = find_checkpoint(location(init_from), "checkpoint.init_from")
    if read_manifest(path).tokenizer_fingerprint == fingerprint:
        return
    learnt, given = _open(path / TOKENIZER), Tokenizer(tokenizer_path)
    before, now = learnt.model.pieces(), given.model.pieces()
    same = sum(a == b for a, b in zip(before, now, strict=False))
    ends = (learnt.bos_id, learnt.eos_id) == (given.bos_id, given.eos_id)
    if before == now and ends:
        return
    raise ValueError(
        f"checkpoint.init_from: {path} has learnt other tokens than {tokenizer_path} makes: "
        f"{same} of {len(now)} ids stand for the same, prepare the data with --tokenizer "
        f"{path / TOKENIZER}, or start all the same with --checkpoint.allow_other_tokenizer True"
    )


def _open(path: Location) -> Tokenizer:
    if not isinstance(path, Url):
        return Tokenizer(path)
    with TemporaryDirectory() as folder:
        path.download(copy := Path(folder) / TOKENIZER)
        return Tokenizer(copy)
