"""The adapter to lm-evaluation-harness: likelihoods and continuations against slow references."""

import json
import subprocess
import sys

import pytest
import torch

from inference.loading.run import load_run
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.self_speculative import SelfSpeculative

pytest.importorskip("lm_eval", reason="pip install -e .[lm_eval]")
from lm_eval.api.instance import Instance

from inference.lm_harness import HarnessModel


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder, device="cpu")


def harness(run, **changes):
    settings = {"E": 4, "strategy": Autoregressive(), "batch_size": 3} | changes
    return HarnessModel(run, **settings)


def ask(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def log_probability(run, E, context, continuation):
    """One forward pass for each token."""
    total, greedy, row = 0.0, True, list(context)
    for token in continuation:
        h, _ = run.model.run_layers(run.model.embed(torch.tensor([row])), 0, E)
        log_probs = run.model.exit_logits(h[0, -1]).log_softmax(-1)
        total += log_probs[token].item()
        greedy &= int(log_probs.argmax()) == token
        row.append(token)
    return total, greedy


@pytest.mark.parametrize("E", [1, 3, 4])
@torch.inference_mode()
def test_likelihoods_are_those_of_the_exit_token_by_token(run, E):
    pairs = [("the cat", " sat on a mat"), ("", "moon"), ("a ", "hill"), ("on a mat saw", " quiet")]
    answers = harness(run, E=E).loglikelihood([ask("loglikelihood", *pair) for pair in pairs])
    bos, encode = run.tokenizer.bos_id, run.tokenizer.encode
    for (context, continuation), (total, greedy) in zip(pairs, answers, strict=True):
        stripped = context.rstrip()
        begun = [bos, *encode(stripped)]
        whole = [bos, *encode(context + continuation)]
        expected = log_probability(run, E, begun, whole[len(begun) :])
        assert total == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]


@torch.inference_mode()
def test_what_greedy_decoding_writes_is_said_to_be_greedy(run):
    [text] = harness(run).generate_until(
        [ask("generate_until", "the cat", {"until": [], "max_gen_toks": 6})]
    )
    written = run.tokenizer.encode("the cat" + text)[len(run.tokenizer.encode("the cat")) :]
    model = harness(run)
    [(total, greedy)] = model._loglikelihood_tokens(
        [(("", ""), model.tok_encode("the cat"), written)]
    )
    assert greedy == log_probability(run, 4, model.tok_encode("the cat"), written)[1]
    assert total < 0


@torch.inference_mode()
def test_a_text_longer_than_the_context_is_predicted_once_in_windows(run):
    context = run.model.config.max_seq_len
    text = "the cat sat on a mat " * context
    ids = run.tokenizer.encode(text)[: 2 * context + 5]
    [total] = harness(run).loglikelihood_rolling(
        [ask("loglikelihood_rolling", run.tokenizer.decode(ids))]
    )
    assert run.tokenizer.encode(run.tokenizer.decode(ids)) == ids
    expected, row = 0.0, [run.tokenizer.bos_id, *ids]
    for end in (context, 2 * context, len(ids)):  # the last looks back as far as it can
        h, _ = run.model.run_layers(run.model.embed(torch.tensor([row[end - context : end]])), 0, 4)
        log_probs = run.model.exit_logits(h[0]).log_softmax(-1)
        new = end % context or context
        expected += sum(log_probs[i, ids[end + i]].item() for i in range(-new, 0))
    assert total == pytest.approx(expected, rel=1e-4)


@torch.inference_mode()
def test_continuations_end_before_what_the_task_ends_at_whatever_writes_them(run):
    options = {"until": [], "max_gen_toks": 20}
    prompts = ["the cat", "moon rise", "quiet", "a mat saw"]
    requests = [ask("generate_until", prompt, options) for prompt in prompts]
    whole = harness(run).generate_until(requests)
    drafted = harness(run, strategy=SelfSpeculative(E=2, d=3)).generate_until(requests)
    assert drafted == whole
    end = whole[0][3:5]
    [cut] = harness(run).generate_until(
        [ask("generate_until", prompts[0], {"until": ["\0", end], "max_gen_toks": 20})]
    )
    assert cut == whole[0].split(end)[0]
    assert len(cut) < len(whole[0])


@pytest.mark.parametrize(("changes", "line"), [({"E": 0}, "E: 0"), ({"batch_size": 0}, "batch_")])
def test_settings_out_of_range_are_refused(run, changes, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        harness(run, **changes)


@pytest.mark.slow
def test_the_command_scores_a_task_from_a_local_file(run_folder, tmp_path):
    lines = [{"text": "the cat sat on", "end": e} for e in (" a mat", " the hill")]
    (tmp_path / "ends.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "ends.yaml").write_text(
        f"""task: ends
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/ends.jsonl
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{end}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
  - metric: acc
"""
    )
    command = [sys.executable, "-m", "inference.lm_harness", "--run", str(run_folder)]
    command += ["--tasks", "ends", "--include_path", str(tmp_path), "--json"]
    done = subprocess.run([*command, str(tmp_path / "out.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ends" in done.stdout
    results = json.loads((tmp_path / "out.json").read_text())
    run = load_run(run_folder, device="cpu")
    scores = harness(run).loglikelihood([ask("loglikelihood", x["text"], x["end"]) for x in lines])
    perplexity = torch.tensor([score for score, _ in scores]).mean().neg().exp().item()
    assert results["results"]["ends"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-3)
    unknown = subprocess.run(
        [*command[:-1], "--tasks", "no_such"], capture_output=True, text=True, check=False
    )
    assert unknown.returncode == 2
    assert unknown.stderr.splitlines()[-1].startswith("error: tasks: the harness has no no_such")
