"""A model comes in from Hugging Face's format and goes out again, bit for bit, or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import models.convert
from data.command_line import read_options
from data.tokenizer import Tokenizer, train_tokenizer
from models.checkpoint_format import load_model, read_manifest
from models.conversion.hugging_face import hugging_face_name
from models.conversion.options import Options
from models.conversion.safetensors_folder import CONFIG, INDEX, read_config
from models.convert import convert, main
from models.rope import RopeScaling
from tests.data.test_token_models import write_llama3_tokenizer
from tests.documents import make_documents
from tests.models.test_llama import build
from train.checkpoints.start import load_initial_weights
from train.parallel.runtime import RuntimeConfig, start_runtime

transformers = pytest.importorskip("transformers")


def make_folder(path, *, dtype, shard_size, model_type="llama", **changes):
    """Write a seeded random model as transformers does."""
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    fields |= {"num_attention_heads": 4, "max_position_embeddings": 96}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(fields | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(path, max_shard_size=shard_size)
    return path


FAMILIES = {
    "mistral": {"head_dim": 12, "sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12, "use_sliding_window": True, "max_window_layers": 0},
    "olmo2": {"attention_bias": True, "pad_token_id": None},
    "llama": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory, tokenizer_path):
    """Return {model_type: folder}, each with two heads for keys and values."""
    found = {}
    for name, changes in FAMILIES.items():
        path = found[name] = tmp_path_factory.mktemp("families") / name
        heads = {"num_key_value_heads": 2, "vocab_size": 320}
        kind = {"model_type": name, "dtype": torch.bfloat16, "shard_size": "20KB"}
        make_folder(path, **kind, **(heads | changes))
        shutil.copy(tokenizer_path, path / "tokenizer.model")
    return found


@pytest.fixture(scope="module")
def llama2(tmp_path_factory, tokenizer_path):
    path = tmp_path_factory.mktemp("llama2") / "hf"
    make_folder(path, dtype=torch.float32, shard_size="1GB", vocab_size=320)
    shutil.copy(tokenizer_path, path / "tokenizer.model")
    return path


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama3") / "hf"
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    make_folder(
        path,
        dtype=torch.bfloat16,
        shard_size="20KB",
        vocab_size=400,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters=rope,
    )
    write_llama3_tokenizer(path)
    return path


def run(source, target, input_, output, *options):
    words = ["--from", source, "--to", target, str(input_), str(output), *map(str, options)]
    convert(read_options(Options, words, prog="convert", description=""))


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


@pytest.mark.parametrize("name", ["llama2", "llama3", *FAMILIES])
def test_a_folder_of_transformers_goes_round_bit_for_bit(request, tmp_path, capsys, name):
    found = request.getfixturevalue("families" if name in FAMILIES else name)
    folder = found[name] if name in FAMILIES else found
    run("hf", "skipstone", folder, tmp_path / "ours")
    assert "logits equal transformers' of the input" in capsys.readouterr().out
    run("skipstone", "hf", tmp_path / "ours", tmp_path / "hf", "--max_shard_bytes", 30_000)
    printed = capsys.readouterr().out
    assert "logits equal transformers'" in printed
    reader = ("Auto", "PreTrained")[name == "qwen2"]  # by what the ids are those of the tokenizer
    assert ("equal transformers' PreTrainedTokenizerFast;" in printed) == (name == "qwen2")
    assert f"tokenizer = {reader}Tokenizer" in (tmp_path / "hf" / "README.md").read_text()
    assert (tmp_path / "hf" / INDEX).is_file()
    assert same_bits(tensors(folder), tensors(tmp_path / "hf"))
    before, after = (
        transformers.AutoConfig.from_pretrained(path).to_dict()
        for path in (folder, tmp_path / "hf")
    )
    tokens = {"bos_token_id", "eos_token_id", "_name_or_path", "torch_dtype"}
    tokens |= {"max_window_layers"} if not before.get("use_sliding_window") else set()
    assert {k: v for k, v in before.items() if k not in tokens} == {
        k: after[k] for k in before if k not in tokens
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_llama3s_properties_come_in(llama3, tmp_path):
    run("hf", "skipstone", llama3, tmp_path / "ours", "--max_seq_len", 64)
    config = read_manifest(tmp_path / "ours").model
    assert (config.n_kv_heads, config.tie_embeddings, config.max_seq_len) == (2, True, 64)
    assert config.rope_scaling == RopeScaling(original_max_seq_len=32)
    assert config.rope_theta == 5e5


@pytest.mark.parametrize("file", [CONFIG, "generation_config.json"])
@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ([399, 7, 5], ["eos_token_id 5, 7: a text ends with the tokenizer's 399 alone"]),
        ([399], []),
        (399, []),
        (None, []),
        (7, ["eos_token_id 7: a text ends with the tokenizer's 399 alone"]),
    ],
)
def test_other_ends_of_a_text_are_reported_as_left_out(
    llama3, tmp_path, capsys, file, given, lines
):
    folder = tmp_path / "hf"
    shutil.copytree(llama3, folder)
    for name in (CONFIG, "generation_config.json"):
        fields = json.loads((folder / name).read_text())
        fields["eos_token_id"] = given if name == file else None
        (folder / name).write_text(json.dumps(fields))
    run("hf", "skipstone", folder, tmp_path / "ours")
    assert lines_left_out(capsys) == lines


def lines_left_out(capsys):
    lines = map(str.strip, capsys.readouterr().out.splitlines())
    return [line.removeprefix("left out: ") for line in lines if line.startswith("left out")]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", None])
@pytest.mark.parametrize("target", ["skipstone", "hf"])
def test_a_chat_template_is_kept(llama3, tmp_path, capsys, name, target):
    folder = tmp_path / "input"
    shutil.copytree(llama3, folder)
    if name == "tokenizer_config.json":
        fields = json.loads((folder / name).read_text()) | {"chat_template": "{{ messages }}"}
        (folder / name).write_text(json.dumps(fields))
    elif name:
        (folder / name).write_text("{{ messages }}")
    run("hf", target, folder, tmp_path / "output")
    assert not any("chat_template" in line for line in lines_left_out(capsys))
    kept = tmp_path / "output" / "chat_template.jinja"
    assert kept.is_file() == bool(name)
    if not name:
        return
    assert kept.read_text() == "{{ messages }}"
    if target == "skipstone":
        run("skipstone", "hf", tmp_path / "output", tmp_path / "again")
        kept = tmp_path / "again" / "chat_template.jinja"
    theirs = transformers.AutoTokenizer.from_pretrained(kept.parent)
    assert theirs.apply_chat_template([{"role": "user"}], tokenize=False) == "[{'role': 'user'}]"


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_damaged_file_beside_the_weights_is_named(llama2, tmp_path, name, text):
    folder = broken(llama2, tmp_path / "hf", lambda folder: (folder / name).write_text(text))
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        run("hf", "skipstone", folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_older_config_means_the_same(llama3, tmp_path):
    """Of transformers 4: rope_theta and rope_scaling at the top."""
    fields = json.loads((llama3 / CONFIG).read_text())
    rope = fields.pop("rope_parameters")
    fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    assert read_config(tmp_path) == read_config(llama3)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_was_saved_must_be_the_embedding(llama3, tmp_path, same):
    def change(folder):
        state = tensors(folder)
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["lm_head.weight"][0, 0] += 0 if same else 1
        save_file(state, folder / "model.safetensors")

    folder = broken(llama3, tmp_path / "hf", change)
    if not same:
        with pytest.raises(ValueError, match="another lm_head.weight"):
            run("hf", "skipstone", folder, tmp_path / "ours")
        return
    run("hf", "skipstone", folder, tmp_path / "ours")
    assert read_manifest(tmp_path / "ours").model == read_config(llama3)


def test_rounding_is_the_weights_own(llama2, tmp_path):
    run("hf", "skipstone", llama2, tmp_path / "ours", "--dtype", "bfloat16")
    run("skipstone", "hf", tmp_path / "ours", tmp_path / "hf")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors(llama2).items()}
    assert same_bits(rounded, tensors(tmp_path / "hf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("--first_layers", 2), [0, 1]),
        (("--layers", "every_other"), [0, 2]),
        (("--layers", "2"), [2]),
    ],
)
def test_a_pruned_model_has_those_layers_and_the_rest(llama2, tmp_path, options, kept):
    run("hf", "skipstone", llama2, tmp_path / "ours", *options)
    small = load_model(tmp_path / "ours", device=torch.device("cpu"), dtype=torch.float32)
    theirs = tensors(llama2)
    assert small.config.n_layers == len(kept)
    for new, l in enumerate(kept):
        name = "mlp.down_proj.weight"
        expected = theirs[f"model.layers.{l}.{name}"]
        assert torch.equal(small.block(new).feed_forward.w2.weight, expected)
    assert torch.equal(small.head_weight, theirs["lm_head.weight"])


def broken(folder, path, change):
    shutil.copytree(folder, path)
    change(path)
    return path


def edit_config(**changes):
    def change(folder):
        fields = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(fields))

    return change


def to_float8(folder):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(state, folder / "model.safetensors")


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def without_a_tensor(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit_config(model_type="gemma"), "model_type 'gemma' is none of llama, mistral, qwen2"),
        (edit_config(model_type=["qwen2"]), "model_type ['qwen2'] is none of llama"),
        (edit_config(model_type="qwen3"), "it lacks [('model.layers.0.self_attn.k_norm.weight'"),
        (edit_config(attention_bias=True), "it lacks [('model.layers.0.self_attn.k_proj.bias'"),
        (edit_config(attention_bias="no"), "attention_bias: 'no', give true or false"),
        (edit_config(rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn'"),
        (edit_config(rope_scaling={"rope_type": "yarn", "factor": 4}), "rope_type is 'yarn'"),
        (edit_config(head_dim=16), "it lacks"),
        (edit_config(head_dim=-8), "model.head_dim: -8, must be 2 to 4096"),
        (edit_config(head_dim=7), "model.head_dim: 7, must be even"),
        (edit_config(model_type="mistral", sliding_window=0), "model.sliding_window: 0, must be"),
        (
            edit_config(model_type="qwen2", use_sliding_window=True, max_window_layers=1),
            "sliding_window: 2 of 3 layers have one, here all have or none",
        ),
        (
            edit_config(model_type="qwen3", layer_types=["full_attention", "linear", 3]),
            "layer_types[2]: 3, give text",
        ),
        (
            edit_config(model_type="qwen3", layer_types=["full_attention", "linear"]),
            "give full_attention or sliding_attention for each layer",
        ),
        (
            edit_config(model_type="qwen3", layer_types=["sliding_attention"] * 3),
            "layer_types: sliding_attention, but there is no sliding_window",
        ),
        (edit_config(hidden_size="32"), "holds no model that is read here"),
        (edit_config(num_hidden_layers=4), "it lacks"),
        (lambda folder: (folder / CONFIG).unlink(), "no config.json"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "holds no model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "save it as safetensors"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "name one with --tokenizer"),
        (to_float8, "model.norm.weight in F8_E4M3, which is not read"),
        (cut_short, "is damaged"),
        (without_a_tensor, "it lacks [('model.norm.weight', (32,))]"),
    ],
)
def test_a_folder_that_is_no_llama_is_one_line(
    llama2, tmp_path, capsys, monkeypatch, change, reason
):
    folder = broken(llama2, tmp_path / "hf", change)
    words = ["convert", "--from", "hf", "--to", "skipstone", str(folder), str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert reason in error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_missing_shards_are_named(llama3, tmp_path):
    shards = len(list(llama3.glob("*.safetensors")))
    name = f"model-00002-of-{shards:05d}.safetensors"
    folder = broken(llama3, tmp_path / "hf", lambda path: (path / name).unlink())
    with pytest.raises(ValueError, match=rf"lacks 1 of {shards} shards \({name}\)"):
        run("hf", "skipstone", folder, tmp_path / "out")


def test_what_is_not_proven_is_not_published(llama2, tmp_path, monkeypatch):
    original = models.convert.our_logits
    monkeypatch.setattr(models.convert, "our_logits", lambda *args: original(*args) + 1e-3)
    with pytest.raises(ValueError, match="logits differ by 0.001"):
        run("hf", "skipstone", llama2, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_bit_is_not_published(llama2, tmp_path, monkeypatch):
    original = models.convert.read_checkpoint

    def flipped(folder):
        manifest, state = original(folder)
        state["norm.weight"].view(torch.int32)[3] ^= 1
        return manifest, state

    monkeypatch.setattr(models.convert, "read_checkpoint", flipped)
    with pytest.raises(ValueError, match=r"norm\.weight is not what was written"):
        run("hf", "skipstone", llama2, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--first_layers", 0), "first_layers: 0, give 1 to 3"),
        (("--first_layers", 4), "first_layers: 4, give 1 to 3"),
        (("--layers", "1,0"), "in ascending order"),
        (("--layers", "1,3"), "give some of 0 to 2"),
        (("--layers", "some"), "give every_other or indices"),
        (("--layers", "1", "--first_layers", 1), "layers: 1, but first_layers is given too"),
        (("--max_seq_len", 1), "must be 2 to"),
        (("--max_shard_bytes", 0), "give at least 1"),
    ],
)
def test_options_out_of_range_are_refused(llama2, tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        run("hf", "skipstone", llama2, tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(llama2, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="exists already"):
        run("hf", "skipstone", llama2, tmp_path)


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(llama2, llama3, tmp_path):
    with pytest.raises(ValueError, match="has 400 ids and the model 320"):
        run("hf", "skipstone", llama2, tmp_path / "out", "--tokenizer", llama3 / "tokenizer.json")


def test_a_tokenizer_of_other_weights_is_refused_without_a_flag(llama2, tmp_path, capsys):
    small = tmp_path / "small.model"
    train_tokenizer(make_documents(50), 290, small)
    run("hf", "skipstone", llama2, tmp_path / "ours")
    with pytest.raises(ValueError, match="has 290 ids and .* 320, give the one"):
        run("hf", "skipstone", llama2, tmp_path / "a", "--tokenizer", small)
    same_size = tmp_path / "same.model"
    train_tokenizer(make_documents(300, seed=9), 320, same_size)
    with pytest.raises(ValueError, match="other ids than .*, give the one"):
        run("skipstone", "hf", tmp_path / "ours", tmp_path / "a", "--tokenizer", same_size)
    bare = shutil.copytree(llama2, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    tiny = tmp_path / "tiny.model"
    train_tokenizer(["a b c " * 99], 265, tiny)
    run("hf", "skipstone", bare, tmp_path / "b", "--tokenizer", llama2 / "tokenizer.model")
    edit_config(vocab_size=400)(bare)
    with pytest.raises(ValueError, match="has 265 ids and the model 400"):
        run("hf", "skipstone", bare, tmp_path / "c", "--tokenizer", tiny)
    words = ("--tokenizer", small, "--other_tokenizer")
    run("skipstone", "skipstone", tmp_path / "ours", tmp_path / "d", *words)
    assert read_manifest(tmp_path / "d").tokenizer_fingerprint == Tokenizer(small).fingerprint


@pytest.mark.parametrize("pad", [320, 10**6, -1, "x", [1]])
def test_a_pad_token_outside_the_vocabulary_has_no_weight(llama2, tmp_path, pad):
    folder = broken(llama2, tmp_path / "hf", edit_config(pad_token_id=pad))
    run("hf", "skipstone", folder, tmp_path / "ours")


def test_training_starts_from_what_came_in(llama3, tmp_path):
    run("hf", "skipstone", llama3, tmp_path / "ours")
    model = build(read_config(llama3), seed=3)
    with start_runtime(RuntimeConfig(), seed=0) as runtime:
        load_initial_weights(str(tmp_path / "ours"), model, runtime=runtime)
    theirs = tensors(llama3)  # bf16, and the model to train fp32
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, theirs[hugging_face_name(name, model.config)].float())
