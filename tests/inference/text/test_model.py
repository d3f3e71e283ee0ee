"""The API: three lines to a text; texts, batches, samples and streams; mistakes name a remedy."""

import shutil
from dataclasses import replace

import pytest
import torch

import inference
from inference.engine.generation import Generation
from inference.loading.tuned import Tuned, conditions_of, write_tuned
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from models.checkpoint_format import file_entry, read_manifest

PROMPT = "the cat sat"
PROMPTS = [PROMPT, "a quiet hill", "caf\u00e9", "", "the moon rise on a mat"]


@pytest.fixture(scope="module")
def model(run_folder):
    return inference.load(run_folder)


def test_three_lines_continue_a_text(run_folder):
    model = inference.load(str(run_folder))
    found = model.generate(PROMPT, max_new_tokens=20)
    tokenizer = model.run.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    [tokens] = Generation(
        model.run.model, [ids], Autoregressive(), max_new_tokens=20, stop_tokens=[tokenizer.eos_id]
    ).finish().tokens  # fmt: skip
    assert found.tokens == tokens
    assert PROMPT + found.text == tokenizer.decode(ids + tokens)
    assert found.prompt == PROMPT
    assert found.strategy == "autoregressive"
    assert found.provenance == ["plain"] * len(tokens)
    assert found.counters.tokens == len(tokens)
    assert found.counters.layers_per_token == 4
    assert found.counters.tokens_per_second > 0


def test_a_chat_begins_an_answer_by_the_template_of_the_checkpoint(run_folder, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(run_folder / "checkpoints" / "step-00000007", checkpoint)
    with pytest.raises(ValueError, match=r"^chat_template: .* has none, give --chat_template"):
        inference.load(checkpoint).generate(PROMPT, chat=True)
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n"
    template += "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    kept = checkpoint / "chat_template.jinja"
    kept.write_text(template)
    manifest = read_manifest(checkpoint)
    replace(manifest, files=manifest.files | {kept.name: file_entry(kept)}).write(checkpoint)
    model = inference.load(checkpoint)
    found = model.generate(PROMPT, chat=True, max_new_tokens=9)
    plain = model.generate(f"[user] {PROMPT}\n[assistant]", max_new_tokens=9)
    assert found.tokens == plain.tokens
    assert found.prompt == PROMPT
    assert model.generate(PROMPT, max_new_tokens=9).tokens != found.tokens
    named = model.run.tokenizer.special.keys()
    assert named == {"<s>", "</s>"}
    given = model.generate(PROMPT, chat="chatml", max_new_tokens=9)
    prompt = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert given.tokens == model.generate(prompt, max_new_tokens=9).tokens
    spoilt = model.generate("</s>", chat=True, max_new_tokens=9)
    assert spoilt.tokens == model.generate("[user] </s>\n[assistant]", max_new_tokens=9).tokens


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_has_a_name_or_is_torchs(run_folder, dtype):
    assert inference.load(run_folder, dtype=dtype).run.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("strategy", [None, "self_speculative:E=2:d=3", "calm:threshold=2"])
def test_a_list_is_continued_in_its_order_with_rows_taken_again(model, strategy):
    alone = [model.generate(prompt, max_new_tokens=12).text for prompt in PROMPTS]
    found = model.generate(tuple(PROMPTS), strategy=strategy, max_new_tokens=12, batch_size=2)
    assert [continuation.prompt for continuation in found] == PROMPTS
    assert [continuation.text for continuation in found] == alone
    counters = found[0].counters
    assert all(continuation.counters is counters for continuation in found)
    assert counters.tokens == sum(len(continuation.tokens) for continuation in found)
    speculative = strategy is not None and strategy.startswith("self_speculative")
    assert (counters.acceptance_rate is not None) == speculative
    accepted = sum(continuation.provenance.count("accepted") for continuation in found)
    assert (accepted > 0) == speculative


def test_a_list_of_one_is_a_list(model):
    [found] = model.generate([PROMPT], max_new_tokens=3)
    assert found.text == model.generate(PROMPT, max_new_tokens=3).text


def test_samples_of_a_text_stand_side_by_side_and_depend_on_the_seed(model):
    def texts(seed):
        found = model.generate(
            PROMPTS[:2], num_samples=3, temperature=1.0, seed=seed, max_new_tokens=12
        )
        assert [continuation.prompt for continuation in found] == [PROMPT] * 3 + [PROMPTS[1]] * 3
        return [continuation.text for continuation in found]

    first = texts(1)
    assert len({*first}) == 6
    assert texts(1) == first
    assert texts(2) != first
    assert len(model.generate(PROMPT, num_samples=2, temperature=1.0, max_new_tokens=2)) == 2


def test_a_stream_has_a_piece_for_each_token_and_the_same_text(model):
    options = {"strategy": "self_speculative:E=2:d=3", "max_new_tokens": 12}
    wanted = model.generate(PROMPTS, **options)
    pieces = [*(stream := model.stream(PROMPTS, **options))]
    for i, continuation in enumerate(wanted):
        mine = [piece for piece in pieces if piece.index == i]
        assert "".join(piece.text for piece in mine) == continuation.text
        assert [piece.token for piece in mine] == continuation.tokens
        assert [piece.provenance for piece in mine] == continuation.provenance
    assert [found.text for found in stream.continuations()] == [found.text for found in wanted]


def test_what_was_tuned_is_taken_where_no_strategy_is_named(run_folder, tmp_path):
    model = inference.load(shutil.copytree(run_folder, tmp_path / "run"))
    assert model.generate(PROMPT, max_new_tokens=2).strategy == "autoregressive"
    conditions = conditions_of(model.run, batch_size=1, quantize=None)
    for name, text in ((None, "self_speculative:E=3:d=2"), ("calm", "calm:threshold=0.5")):
        write_tuned(model.run, name, Tuned(strategy=text, conditions=conditions), {})
        assert model.generate(PROMPT, max_new_tokens=2, strategy=name).strategy == text
    hot = model.generate(PROMPT, max_new_tokens=2, temperature=0.5)
    assert hot.strategy == "autoregressive", "what is fastest when sampling was not measured"
    assert model.generate([PROMPT] * 2, max_new_tokens=2)[0].strategy == "autoregressive"
    given = model.generate(PROMPT, max_new_tokens=2, strategy=Calm(threshold=0.25))
    assert given.strategy == "calm:threshold=0.25"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts: none, give at least one"),
        ({"prompts": [[1, 2]]}, "prompts: one is of type list, give texts"),
        ({"prompts": 3}, "prompts: 3, give a text or a list of texts"),
        ({"prompts": b"abc"}, "prompts: b'abc', give a text or a list of texts"),
        ({"strategy": 3}, "strategy: 3, give a text such as"),
        ({"max_new_tokens": "5"}, "max_new_tokens: '5', give a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens: None, give a whole number"),
        ({"temperature": "0.5"}, "temperature: '0.5', give a number"),
        ({"prompts": "a\ud800"}, "is not valid UTF-8, give text"),
        ({"prompts": "cat " * 100}, "leave no room in the model's context of 96"),
        ({"strategy": "calmm"}, "strategy: calmm, did you mean calm?"),
        ({"strategy": "calm:treshold=1"}, "calm has no setting treshold, did you mean threshold?"),
        ({"strategy": "self_speculative:E=9"}, "E: 9, self_speculative needs 1 to 3"),
        ({"strategy": "speculative"}, "draft: none, speculative needs the folder"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0, give at least 1"),
        ({"temperature": -1}, "temperature: -1, give 0 (greedy) or at least 1e-06"),
        ({"temperature": float("nan")}, "temperature: nan, give 0"),
        ({"top_k": 0}, "top_k: 0, give at least 1"),
        ({"top_p": 2.0}, "top_p: 2.0, give a number above 0"),
        ({"seed": -1}, f"seed: -1, give 0 to {2**64 - 1}"),
        ({"seed": 2**64}, f"give 0 to {2**64 - 1}"),
        ({"num_samples": 0}, "num_samples: 0, give at least 1"),
        ({"num_samples": 2}, "num_samples: 2, greedy samples are all the same, give a temperature"),
        ({"batch_size": 0}, "batch_size: 0, give at least 1"),
    ],
)
def test_a_mistake_names_field_value_and_remedy(model, options, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        model.generate(**({"prompts": PROMPT} | options))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "dtype: fp8, give one of float32, bfloat16, float16"),
        ({"dtype": torch.float64}, "dtype: float64, give one of"),
        ({"quantize": "int3"}, "quantize: int3, give one of int8, int4"),
        ({"device": "tpu"}, "device: tpu is not available, give auto or cpu"),
        ({"path": "nowhere"}, "run: nowhere holds no finished checkpoint"),
    ],
)
def test_a_mistake_in_loading_names_field_value_and_remedy(run_folder, options, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        inference.load(**({"path": run_folder} | options))
    assert message in str(raised.value)
