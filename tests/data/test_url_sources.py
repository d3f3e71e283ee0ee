"""Files by URL are the documents that the same files of a folder are."""

import gzip
import http.server
import threading
from functools import partial

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from data.faults import Faults
from data.preparation import PrepareConfig, prepare
from data.row_layout import RowLayout
from data.sources.documents import read_documents
from tests.data.test_source_kinds import COMPRESS, TEXTS, kinds

ROOT = "memory://corpus"


def read(*inputs):
    faults = Faults()
    return list(read_documents(map(str, inputs), faults, RowLayout())), faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a file of every kind, also copied to `memory://corpus`."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, content in kinds(TEXTS).items():
        (folder / f"rows{name}").write_bytes(content)
    for suffix, compress in COMPRESS.items():
        (folder / "b" / f"x.jsonl{suffix}").write_bytes(compress(kinds(TEXTS)[".jsonl"]))
    (folder / "b" / "c" / "page.html").write_text("<p>A page.")
    (folder / "b" / "c" / "text.txt.gz").write_bytes(gzip.compress(b"text\n"))
    (folder / "b" / "torn.jsonl.zst").write_bytes(COMPRESS[".zst"](b'{"text": "a"}\n' * 9)[:-4])
    (folder / "b" / "image.png").write_bytes(b"\x89PNG")
    (folder / ".hidden" / "x.txt").write_text("hidden")
    table = pyarrow.table({"text": [f"row {n}" for n in range(300)], "id": range(300)})
    pyarrow.parquet.write_table(table, folder / "z.parquet", row_group_size=100)
    if datasets := pytest.importorskip("datasets"):
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/corpus/", recursive=True)
    yield folder
    memory.rm("/corpus", recursive=True)


def moved(lines, folder, root=ROOT):
    return [line.replace(str(folder), root) for line in lines]


@pytest.mark.parametrize(
    "name", ["", "b", "z.parquet", "b/x.jsonl.zst", "*.json", "b/*/*", "b/x.*", "saved", "**/*.csv"]
)
def test_documents_and_faults_are_those_of_the_folder(folder, name):
    here, faults = read(folder / name)
    there, remote = read(f"{ROOT}/{name}")
    assert [document.text for document in there] == [document.text for document in here]
    origins = moved([document.origin for document in here], folder)
    assert [document.origin for document in there] == origins
    assert moved(faults.lines(), folder) == remote.lines()
    assert len(here) > 1
    assert [d.text for d in read(f"file://{folder}/{name}")[0]] == [d.text for d in here]


def test_a_dataset_by_url_has_the_bytes_of_the_same_files(folder, tmp_path):
    here, there = (
        prepare(
            PrepareConfig(input=(str(source),), vocab_size=300, validation_fraction=0.2),
            tmp_path / name,
            workers=1,
        )
        for source, name in ((folder, "here"), (ROOT, "there"))
    )
    assert there.fingerprint == here.fingerprint
    assert there.corpus_fingerprint == here.corpus_fingerprint
    assert there.skipped == here.skipped


def test_an_object_store_has_the_same_files(folder, s3):
    """Over the network: listings, globs, ranges of Parquet, and what is compressed."""
    import s3fs

    s3fs.S3FileSystem().put(str(folder) + "/", f"{s3}/corpus/", recursive=True)
    for name in ("", "b/*.jsonl.*", "z.parquet"):
        here, there = read(folder / name), read(f"{s3}/corpus/{name}")
        assert [d.text for d in there[0]] == [d.text for d in here[0]]
        origins = moved([d.origin for d in here[0]], folder, f"{s3}/corpus")
        assert [d.origin for d in there[0]] == origins
        assert moved(here[1].lines(), folder, f"{s3}/corpus") == there[1].lines()
    with pytest.raises(ValueError, match=r"input s3://.*/absent does not exist"):
        read(f"{s3}/absent")
    config = {"vocab_size": 300, "validation_fraction": 0.2}
    made = [
        prepare(PrepareConfig(input=(str(source),), **config), folder.parent / name, workers=2)
        for source, name in ((folder, "here"), (f"{s3}/corpus", "there"))
    ]
    assert made[0].fingerprint == made[1].fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("memory://corpus/absent", r"input memory://corpus/absent does not exist, give a file"),
        ("memory://corpus/*.absent", "does not exist, give a file, a folder or a glob"),
        ("memory://corpus/b/image.png", r"image.png is of an unknown kind, give \.txt"),
        ("nowhere://corpus/a.txt", "nowhere://corpus/a.txt: fsspec has no scheme nowhere"),
        ("http://127.0.0.1:9/a.jsonl", r"http://127\.0\.0\.1:9/a\.jsonl: cannot be reached"),
    ],
)
def test_what_is_not_there_is_one_line(folder, name, message):
    with pytest.raises(ValueError, match=message):
        read(name)


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_a_file_of_a_web_server_that_sends_no_parts(folder):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Server, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    try:
        for name in ("rows.csv", "rows.json", "b/x.jsonl.zst", "b/x.jsonl.xz?download=1"):
            documents, faults = read(f"{root}/{name}")
            assert [document.text for document in documents] == TEXTS
            assert documents[0].origin.startswith(f"{root}/{name}:")
            assert not faults.counts
        with pytest.raises(ValueError, match="is of an unknown kind"):
            read(f"{root}/b/image.png")
        with pytest.raises(ValueError, match="does not exist"):
            read(f"{root}/absent.jsonl")
    finally:
        server.shutdown()
        server.server_close()
