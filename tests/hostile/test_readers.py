"""Every reader of a file, on hostile files: one line or success, in bounded time and memory."""

import bz2
import gzip
import hashlib
import json
import lzma
import pickle
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.chat_template import ChatTemplate
from data.chats import find_template, read_template
from data.dataset import DESCRIPTION_NAME, TRAIN, VALIDATION, open_dataset, verify_shards
from data.faults import Faults
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.row_layout import RowLayout
from data.shards import HEADER_BYTES, MAGIC, open_shard
from data.sources.documents import read_documents
from data.tokenizer import Tokenizer
from inference.evaluate import _read_losses
from inference.evaluation.tasks import TASKS, read_examples
from inference.generate import read_prompt_file
from inference.loading.adapters import save_adapter
from inference.strategies.gate_classifiers import load_gate, new_gate, save_gate
from inference.strategies.jump_maps import JumpMap, load_jump, save_jump
from inference.strategies.reduced_head import check_counts, load_reduced_head
from models.checkpoint_format import MANIFEST, load_model, read_manifest, verify
from models.config import LlamaConfig
from models.conversion.hugging_face import config_json
from models.conversion.plain_checkpoint import read_checkpoint, write_checkpoint
from models.conversion.safetensors_folder import (
    read_config,
    read_eos_ids,
    read_weights,
    write_model,
)
from models.llama import Llama
from models.tensor_reader import TensorReader
from tests.data.chat_templates import TEMPLATES
from tests.data.test_token_models import write_llama3_tokenizer
from tests.hostile.forgery import FEW, MANY, check, damaged, forged
from tests.models.families import SHAPES
from train.config.config_file import read_config as read_run_config
from train.config.presets import PRESETS

SHAPE = LlamaConfig(
    dim=8, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=8, vocab_size=400, max_seq_len=16
)
MAX_BYTES = 2**30


@pytest.fixture(scope="module", autouse=True)
def memory():
    """All that this file reads takes less than 1 GiB."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        yield
        return
    clear.write_text("5")  # the peak starts from here
    before = _kib(status, "VmRSS")
    yield
    assert _kib(status, "VmHWM") - before < MAX_BYTES / 1024


def _kib(status, name):
    return next(int(line.split()[1]) for line in status.open() if line.startswith(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Llama(SHAPE)
        model.init_weights(0)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer_json(folder):
    (folder / "tokenizer").mkdir()
    return write_llama3_tokenizer(folder / "tokenizer")


@pytest.fixture(scope="module")
def checkpoint(folder, model):
    path = folder / "checkpoint"
    path.mkdir()
    state = model.state_dict()
    write_checkpoint(
        path, SHAPE, state, step=3, tokenizer=b"t", config={"name": "x"}, data_fingerprint="d"
    )
    return path


def sealed(path, fields=None):
    """Write a manifest whose hashes fit."""
    fields = json.loads((path / MANIFEST).read_text()) if fields is None else fields
    fields.pop("sha256", None)
    fields["files"] = {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in path.iterdir()
        if p.name != MANIFEST
    }
    fields["sha256"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(fields))


def load(path):
    load_model(path, device=torch.device("cpu"), dtype=torch.float32)
    read_checkpoint(path)


@pytest.fixture(params=[FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def some(request):
    """Settings of what loads whole models: fewer examples, unless it may take minutes."""
    return request.param


def test_manifests(folder, checkpoint, some):
    path = folder / "manifest"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(checkpoint, path)
    fields = json.loads((path / MANIFEST).read_text())

    @MANY
    @given(damaged((path / MANIFEST).read_bytes()) | forged(fields))
    def holds(content):
        (path / MANIFEST).write_bytes(content)
        check(lambda: read_manifest(path), MANIFEST)
        check(lambda: verify(path), str(path))

    @some
    @given(forged(fields["model"]))
    def shapes(content):
        shape = json.loads(content) if len(content) < 9000 else {}
        sealed(path, fields | {"model": shape})
        check(lambda: load(path), str(path))

    holds()
    shapes()


def test_tensors_of_a_checkpoint(folder, checkpoint, some):
    path = folder / "tensors"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(checkpoint, path)
    metadata, [shard] = path / ".metadata", path.glob("*.distcp")
    fine, tensors = metadata.read_bytes(), shard.read_bytes()

    @MANY
    @given(damaged(fine))
    def of_metadata(content):
        metadata.write_bytes(content)
        check(lambda: TensorReader(path).read_metadata(), str(path))

    @some
    @given(damaged(tensors))
    def of_tensors(content):
        metadata.write_bytes(fine)
        shard.write_bytes(content)
        sealed(path)
        check(lambda: load(path), str(path))

    hostile = st.sampled_from([-1, 0, 10**15, 2**63, None, "x", (1, 2), [], "../x", "__0_0.distcp"])
    fields = st.sampled_from(
        ["relative_path", "offset", "length", "transform_descriptors", "size", "chunks", "dtype"]
    )

    @some
    @given(fields, hostile, st.integers(0, 30))
    def of_fields(name, value, which):
        forged_metadata = pickle.loads(fine)
        entries = [*forged_metadata.storage_data.values()]
        owners = [*forged_metadata.state_dict_metadata.values()]
        if name in ("size", "chunks"):
            setattr(owners[which % len(owners)], name, value)
        elif name == "dtype":
            owners[which % len(owners)].properties.dtype = torch.float64
        else:
            setattr(entries[which % len(entries)], name, value)
        shard.write_bytes(tensors)
        metadata.write_bytes(pickle.dumps(forged_metadata))
        sealed(path)
        check(lambda: load(path), str(path))

    of_metadata()
    of_tensors()
    of_fields()


def test_deep_and_huge_pickles(folder, checkpoint):
    path = folder / "pickles"
    shutil.copytree(checkpoint, path)
    for content in (
        b"\x80\x04" + b")" + b"\x85" * 10**6 + b"}\x8c\x01a\x86.",
        b"\x80\x04}" + b")" + b"\x85" * 10**6 + b"K\x01s.",  # a deep key
        b"(" * 200000 + b".",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fa",
        b"\x80\x04Nr\xff\xff\xff\x7f.",
        b"",
    ):
        (path / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match=r"\.metadata"):
            TensorReader(path).read_metadata()


def test_datasets(folder):
    source = folder / "text.jsonl"
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(["cat", "sat", "mat", "hill"], k=9))} for _ in range(90)]
    source.write_text("\n".join(map(json.dumps, rows)))
    config = PrepareConfig(input=(str(source),), vocab_size=270, validation_fraction=0.2)
    path = prepare(config, folder / "dataset", workers=1).path
    description = path / DESCRIPTION_NAME
    fine = description.read_bytes()

    def read():
        dataset = open_dataset(path)
        for split in (TRAIN, VALIDATION):
            dataset.stream(split)
        verify_shards(dataset)

    @MANY
    @given(damaged(fine) | forged(json.loads(fine)))
    def descriptions(content):
        description.write_bytes(content)
        check(read, str(path))

    descriptions()
    description.write_bytes(fine)
    shard = path / "train-00000.tokens"
    whole = shard.read_bytes()
    header = json.loads(whole[len(MAGIC) : HEADER_BYTES])

    @MANY
    @given(damaged(whole) | forged(header).map(lambda h: (MAGIC + h).ljust(HEADER_BYTES)))
    def shards(content):
        shard.write_bytes(content)
        check(lambda: open_shard(shard), shard.name)
        check(read, str(path))

    shards()
    model_file = path / "tokenizer.model"

    @MANY
    @given(damaged(model_file.read_bytes()))
    def models(content):
        bad = folder / "bad.model"
        bad.write_bytes(content)
        check(lambda: Tokenizer(bad).encode("cat sat"), bad.name)

    models()


def test_tokenizers(tokenizer_json):
    config = tokenizer_json.parent / "tokenizer_config.json"
    files = {tokenizer_json: tokenizer_json.read_bytes(), config: config.read_bytes()}
    small = json.loads(files[tokenizer_json])

    @MANY
    @given(
        st.tuples(st.just(tokenizer_json), damaged(files[tokenizer_json]) | forged(small))
        | st.tuples(st.just(config), damaged(files[config]) | forged(json.loads(files[config])))
    )
    def holds(change):
        for path, content in [*files.items(), change]:
            path.write_bytes(content)
        check(lambda: Tokenizer(tokenizer_json).encode("cat sat"), "tokenizer")
        check(lambda: find_template(tokenizer_json), "tokenizer")

    holds()
    for path, content in files.items():
        path.write_bytes(content)


def test_hugging_face_folders(folder, model):
    path = folder / "hf"
    path.mkdir()
    write_model(path, SHAPE, model.state_dict(), bos_id=1, eos_id=2, max_shard_bytes=9000)
    names = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    files = {path / name: (path / name).read_bytes() for name in names}
    shards = {p: p.read_bytes() for p in path.glob("*.safetensors")}

    def read():
        read_eos_ids(path)
        read_weights(path, read_config(path))

    changes = [
        st.tuples(st.just(p), damaged(content) | forged(json.loads(content)))
        for p, content in files.items()
    ]
    changes += [st.tuples(st.just(p), damaged(content)) for p, content in shards.items()]
    for family in SHAPES.values():
        fields = config_json(replace(SHAPE, **family), dtype="float32", bos_id=1, eos_id=2)
        fields["layer_types"] = ["sliding_attention", "full_attention"]
        changes.append(st.tuples(st.just(path / "config.json"), forged(fields)))

    @MANY
    @given(st.one_of(changes))
    def holds(change):
        for p, content in [*files.items(), *shards.items(), change]:
            p.write_bytes(content)
        check(read, str(path))

    holds()


def test_adapters(folder, model):
    gate, jump = folder / "gate.safetensors", folder / "jump.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_gate(gate, new_gate("mlp", range(1, 2), 8, hidden=3, generator=generator), model)
    save_jump(jump, JumpMap({"1.B": torch.zeros(8, 8)}), model, {})

    @MANY
    @given(damaged(gate.read_bytes()), damaged(jump.read_bytes()))
    def bytes_of_both(bad_gate, bad_jump):
        for read, name, content in ((load_gate, "g", bad_gate), (load_jump, "j", bad_jump)):
            path = folder / f"{name}.safetensors"
            path.write_bytes(content)
            check(lambda read=read, path=path: read(path, model), path.name)

    names = st.sampled_from(["w", "b", "w_in", "b_in", "1.B", "1.in", "1.out", "0.B", "x"])
    shapes = st.lists(st.integers(0, 9), max_size=4)
    settings = st.dictionaries(
        st.sampled_from(["form", "first", "interval"]),
        st.sampled_from(["mlp", "lte", "", "x", "-1", "0", "1", "99999999999999999999", "nan"]),
    )

    @MANY
    @given(st.dictionaries(names, shapes, max_size=4), settings, st.sampled_from(["gate", "jump"]))
    def headers(tensors, settings, kind):
        path = folder / "forged.safetensors"
        save_adapter(path, kind, model, {n: torch.zeros(s) for n, s in tensors.items()}, settings)
        check(lambda: (load_gate if kind == "gate" else load_jump)(path, model), path.name)

    bytes_of_both()
    headers()


JSON_FILES = {
    "counts": {"tokenizer": "f", "counts": [1] * 400},
    "losses": {"name": "x", "exits": [{"loss": 1.5, "E": 1}]},
}


@pytest.mark.parametrize("kind", JSON_FILES)
def test_json_files(folder, model, kind):
    path = folder / f"{kind}.json"
    valid = JSON_FILES[kind]

    def read():
        if kind == "counts":
            check_counts(path, "f")
            load_reduced_head(model, path, 9)
        else:
            _read_losses(path)

    @MANY
    @given(damaged(json.dumps(valid).encode()) | forged(valid))
    def holds(content):
        path.write_bytes(content)
        check(read, path.name)

    holds()


COMPRESS = {
    ".gz": gzip.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
ROWS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".json", ".csv", ".tsv"]


@pytest.mark.parametrize("suffix", [*ROWS, ".parquet", ".html"])
def test_rows(folder, suffix):
    rows = [{"utterance": f"u {i}", "semantic_parse": "[x]", "text": "t"} for i in range(9)]
    valid = "\n".join(map(json.dumps, rows)).encode()
    if suffix == ".tsv":
        valid = b"utterance\tsemantic_parse\nu\t[x]\nv\t[y]\n"
    if suffix == ".csv":
        valid = b'id,text\n1,"a, ""b"""\n2,"two\nlines"\n3,c\n'
    if suffix == ".json":
        valid = json.dumps({"data": rows}).encode()
    if suffix == ".html":
        valid = b"<meta charset=latin1><ul><li>one<li><b>two</ul><table><tr><td>&eacute;</table>"
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        valid = path.read_bytes()
    changed = damaged(valid)
    if suffix in (".jsonl", ".json"):
        changed |= forged(rows[0]) | forged(rows)
    if compress := COMPRESS.get(suffix.removeprefix(".jsonl")):
        changed = damaged(compress(valid)) | damaged(valid).map(compress)

    @(MANY if suffix in (".jsonl", ".jsonl.gz", ".tsv", ".parquet") else FEW)
    @given(changed)
    def holds(content):
        path.write_bytes(content)
        if suffix in (".jsonl", ".jsonl.gz", ".tsv", ".parquet"):
            check(lambda: [*read_examples(TASKS["topv2"], path)], path.name)
        check(lambda: [*read_documents([str(path)], Faults(), RowLayout())], path.name)
        if suffix == ".jsonl":
            check(lambda: read_prompt_file(path), path.name)

    holds()


@pytest.mark.parametrize("name", ["llama3", "mistral", "blocks"])
def test_chat_templates(folder, name):
    path = folder / "chat_template.jinja"
    messages = [{"role": role, "content": f"</s>{role}"} for role in ("user", "assistant")]
    source, bos, eos, _ = TEMPLATES[name]
    rows = folder / "chats.jsonl"

    def read():
        template = ChatTemplate(str(path), read_template(path), bos or "", eos, (eos, "<s>"))
        layout = RowLayout(messages="messages", template=template)
        return [*read_documents([str(rows)], Faults(), layout)]

    @FEW
    @given(damaged(source.encode()), forged({"messages": messages}))
    def holds(content, chats):
        path.write_bytes(source.encode())
        rows.write_bytes(chats)
        check(read, "chat")
        path.write_bytes(content)
        rows.write_bytes(json.dumps({"messages": messages}).encode())
        check(read, "chat")

    holds()


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".toml"])
def test_config_files(folder, suffix):
    path = folder / f"run{suffix}"
    base = PRESETS["demo"]()
    fields = {"steps": 5, "optim": {"lr": 0.1}, "model": {"own_exits": [1]}, "data.path": "x"}
    valid = json.dumps(fields).encode()
    changed = damaged(valid) | forged(fields)
    if suffix == ".yaml":
        changed |= damaged(b"steps: 5\noptim: &a {lr: 1e-3}\nmodel:\n  dim: !!int 8\nx: *a\n")
    if suffix == ".toml":
        changed = damaged(b'steps = 5\n"data.path" = "x"\n[optim]\nlr = 1e-3\n[model]\ndim = 8\n')

    @MANY
    @given(changed)
    def holds(content):
        path.write_bytes(content)
        check(lambda: read_run_config(path, base), path.name)

    holds()


def test_files_nested_without_end(folder, model, checkpoint, tokenizer_json):
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    path = folder / "deep.jsonl"
    path.write_bytes(deep)
    for read in (
        lambda: load_reduced_head(model, path, 9),
        lambda: _read_losses(path),
        lambda: [*read_examples(TASKS["topv2"], path)],
        lambda: read_prompt_file(path),
    ):
        with pytest.raises(ValueError, match="deep.jsonl"):
            read()
    for name, read in (
        ("tokenizer.json", lambda: Tokenizer(folder / "deep" / "tokenizer.json")),
        ("config.json", lambda: read_config(folder / "deep")),
        (DESCRIPTION_NAME, lambda: open_dataset(folder / "deep")),
        (MANIFEST, lambda: read_manifest(folder / "deep")),
    ):
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / name).write_bytes(deep)
        with pytest.raises(ValueError, match="nested deeper"):
            read()
