"""A run's export decodes in transformers as it does here, and a conversion as a run."""

import json

import pytest
import torch

from data.command_line import read_options
from inference.engine.generation import Generation
from inference.evaluate import main as evaluate
from inference.loading.run import load_run
from inference.strategies.registry import parse_strategy
from models.conversion.options import Options
from models.convert import convert
from tests.inference.every_strategy import PROMPTS, decode
from tests.models.conversion.test_hugging_face import twin_of
from tests.models.families import SHAPES, build_random, shape

transformers = pytest.importorskip("transformers")


def run(source, target, *words):
    words = ["--from", source, "--to", target, *map(str, words)]
    convert(read_options(Options, words, prog="convert", description=""))


@pytest.fixture(scope="module")
def export(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    losses = {f"validation/loss_exit_{E:02d}": 6.0 - E for E in range(1, 5)}
    others = dict.fromkeys(losses, 9.0)
    rows = [{"step": 6} | others, {"step": 7} | losses, {"step": 8} | others]
    metrics = run_folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "torn')
    run("skipstone", "hf", run_folder, folder)
    metrics.unlink()
    return folder


def test_transformers_decodes_our_tokens_at_every_exit(run_folder, export):
    ours = load_run(run_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    for text in ("the cat", "quiet  hill \u65e5"):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        prompt = inputs["input_ids"][0].tolist()
        assert prompt == [ours.tokenizer.bos_id, *ours.tokenizer.encode(text)]
        settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        greedy = model.generate(**inputs, **settings)[0].tolist()
        for E in range(1, 4):
            early = model.generate(**inputs, **settings, assistant_early_exit=E)[0].tolist()
            assert early == greedy
        for name in ("autoregressive", "self_speculative:E=2"):
            generation = Generation(
                ours.model,
                [prompt],
                parse_strategy(name).with_defaults(4),
                max_new_tokens=24,
                stop_tokens=[ours.tokenizer.eos_id],
            )
            for _ in generation:
                pass
            assert prompt + generation.tokens[0] == greedy


def test_the_draft_is_the_exit(run_folder, export, tmp_path):
    run("skipstone", "hf", run_folder, tmp_path / "draft", "--first_layers", 2)
    draft = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    ours = load_run(run_folder, packed=False).model
    tokens = torch.arange(40)[None]
    h, _ = ours.run_layers(ours.embed(tokens), 0, 2)
    torch.testing.assert_close(draft(tokens).logits, ours.exit_logits(h), atol=1e-5, rtol=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(tokens[:, 1:9], **settings)
    assert torch.equal(model.generate(tokens[:, 1:9], **settings, assistant_model=draft), plain)


def test_the_card_has_the_table_of_this_very_step(export, run_folder, tmp_path):
    card = (export / "README.md").read_text()
    assert "| 1 | 5.0000 |\n| 2 | 4.0000 |\n| 3 | 3.0000 |\n| 4 | 2.0000 |" in card
    assert "assistant_early_exit=E" in card
    assert "- steps: 7" in card
    run("skipstone", "hf", run_folder, tmp_path / "draft", "--first_layers", 2)
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "layers 0, 1 of a model of 4" in card
    assert "## Exits" not in card


def test_what_came_in_decodes_drafts_and_is_evaluated(run_folder, export, tmp_path, monkeypatch):
    run("hf", "skipstone", export, tmp_path / "back")
    run("hf", "skipstone", export, tmp_path / "half", "--layers", "every_other")
    ours, back = load_run(run_folder), load_run(tmp_path / "back")
    assert back.tokenizer.fingerprint == ours.tokenizer.fingerprint
    prompts = [[1, 5, 9]]
    tokens = []
    for opened, name in [
        (ours, "autoregressive"),
        (back, f"speculative:draft={tmp_path / 'half'}"),
    ]:
        strategy = parse_strategy(name).with_defaults(4)
        generation = Generation(opened.model, prompts, strategy, max_new_tokens=20, stop_tokens=[])
        for _ in generation:
            pass
        tokens.append(generation.tokens)
    assert tokens[0] == tokens[1]
    words = ["evaluate", "--run", str(tmp_path / "back"), "--max_tokens", "300"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        evaluate()
    out = tmp_path / "exits.json"
    words += ["--data", str(run_folder.parent / "data"), "--json", str(out)]
    monkeypatch.setattr("sys.argv", words)
    evaluate()
    assert [row["E"] for row in json.loads(out.read_text())["exits"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", SHAPES)
def test_every_family_decodes_as_in_transformers_beyond_its_window(name):
    model = build_random(shape(n_layers=4, **SHAPES[name])).eval().requires_grad_(False)

    def ours(strategy, prompts=PROMPTS):
        return decode(model, prompts, parse_strategy(strategy).with_defaults(4)).tokens

    plain = ours("autoregressive")
    assert len({token for tokens in plain for token in tokens}) > 3, "tokens were to differ"
    assert ours("autoregressive", PROMPTS[2:3]) == plain[2:3]
    for strategy in ("self_speculative:E=1:d=3", "self_speculative:E=3:d=5:ngram=2", "skip_draft"):
        assert ours(strategy) == plain
    twin, settings = twin_of(model), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    for prompt, tokens, E in zip(PROMPTS, plain, (1, 2, 3, None), strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        theirs = twin.generate(
            ids, attention_mask=mask, eos_token_id=None, assistant_early_exit=E, **settings
        )
        assert theirs[0].tolist() == prompt + tokens
