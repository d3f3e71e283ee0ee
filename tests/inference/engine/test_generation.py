"""The driver ends rows where it must, counts what is run, and refuses what does not fit."""

from collections import Counter

import pytest
import torch

from inference.engine.generation import Generation
from inference.engine.sampling import Sampling
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.early_exit import EarlyExit
from inference.strategies.registry import describe, parse_strategy
from inference.strategies.self_speculative import SelfSpeculative
from tests.inference.every_strategy import make_model
from tests.models.test_llama import build, hugging_face_twin, small

AUTOREGRESSIVE = Autoregressive()
STRATEGIES = [
    AUTOREGRESSIVE,
    EarlyExit(E=2),
    SelfSpeculative(E=3, d=3),
]
ALL = [
    *STRATEGIES,
    *map(
        parse_strategy,
        [
            "self_speculative:E=1:d=4:branch=3:stop=0.1:ngram=1",
            "dynamic:d=3:branch=2:verify_costs=0.2:probe=2",
            "skip_draft:attention=1+2:feed_forward=2:d=3:gamma=0.1",
            "calm:threshold=0.1",
            "calm:confidence=similarity:threshold=0.9:first=2",
            "patience:patience=1",
            "free:exits=1+3:threshold=0.08:max_pending=4",
            "free:exits=2:threshold=0.08:max_pending=4:rollback=exact",
            "unified:speedup=2.0",
            "skipdecode:min_layers=2:length=6",
            "pruned:keep=0+2+3",
        ],
    ),
]
PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="module")
def model():
    return build(small(n_layers=4, n_kv_heads=2)).eval().requires_grad_(False)


def decode(model, prompts, strategy, **options):
    return Generation(model, prompts, strategy, **({"max_new_tokens": 20} | options)).finish()


def names(strategies):
    return [strategy.name for strategy in strategies]


@pytest.mark.parametrize("depth", [2, 4])
def test_greedy_equals_transformers(model, depth):
    twin = hugging_face_twin(model)
    twin.model.layers = twin.model.layers[:depth]
    twin.config.num_hidden_layers = depth
    strategy = EarlyExit(E=depth)
    for prompt in PROMPTS:
        theirs = twin.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=-1
        )
        assert decode(model, [prompt], strategy).tokens[0] == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("strategy", ALL, ids=describe)
def test_rows_of_a_ragged_batch_are_what_they_are_alone(model, strategy):
    together = decode(model, PROMPTS, strategy).tokens
    assert together == [decode(model, [prompt], strategy).tokens[0] for prompt in PROMPTS]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=names(STRATEGIES))
def test_reported_work_is_what_hooks_count(model, strategy):
    counted = {"token_layers": 0, "heads": 0}

    def count(key):
        def hook(module, args, output):
            counted[key] += output.shape[0] * output.shape[1]

        return hook

    hooks = [block.register_forward_hook(count("token_layers")) for block in model.layers.values()]
    hooks.append(model.norm.register_forward_hook(count("heads")))
    counters = decode(model, PROMPTS, strategy).counters
    for hook in hooks:
        hook.remove()
    assert counters.prompt_token_layers == 4 * 7 * (2 if strategy.name == "early_exit" else 4)
    assert counters.prompt_token_layers + counters.token_layers == counted["token_layers"]
    assert counters.head_evaluations == counted["heads"]


@pytest.mark.parametrize("strategy", ALL, ids=describe)
def test_reported_parts_of_layers_are_what_hooks_count(model, strategy):
    counted = {"parts": 0, "heads": 0}

    def count(key):
        def hook(module, args, output):
            counted[key] += output.shape[0] * output.shape[1]

        return hook

    hooks = [model.norm.register_forward_hook(count("heads"))]
    for block in model.layers.values():
        hooks.append(block.attention.register_forward_hook(count("parts")))
        hooks.append(block.feed_forward.register_forward_hook(count("parts")))
    counters = decode(model, PROMPTS, strategy).counters
    for hook in hooks:
        hook.remove()
    assert counters.prompt_token_layers + counters.token_layers == counted["parts"] / 2
    assert counters.head_evaluations == counted["heads"]


@pytest.mark.parametrize("strategy", ALL, ids=describe)
@pytest.mark.parametrize("longest", [1, 15, 23])
def test_every_strategy_fills_the_context_and_ends(strategy, longest):
    model = build(small(n_layers=4, n_kv_heads=2, max_seq_len=24)).eval().requires_grad_(False)
    tokens = decode(model, [list(range(longest)), [5, 6]], strategy, max_new_tokens=100).tokens
    assert [len(row) for row in tokens] == [24 - longest, 22]


def test_depths_are_counted_up_to_a_rows_limit():
    model = build(small(n_layers=4, n_kv_heads=2, max_seq_len=24)).eval().requires_grad_(False)
    strategy = parse_strategy("free:exits=2:threshold=0.0:max_pending=4")  # four tokens a round
    counters = decode(model, [list(range(19)), [5, 6]], strategy, max_new_tokens=100).counters
    assert counters.rounds == 2 + 6
    assert counters.depths == {2: 5 + 22}


def test_layers_per_token_of_one_row_worked_by_hand(model):
    alone = {s.name: decode(model, PROMPTS[:1], s).counters for s in STRATEGIES}
    assert alone["autoregressive"].layers_per_token == 4
    assert alone["early_exit"].layers_per_token == 2
    counters = alone["self_speculative"]
    # A round of d drafts runs d + 1 tokens through all 4 layers, and the head d + d + 1 times.
    assert counters.token_layers == 4 * (counters.drafted + counters.rounds)
    assert counters.head_evaluations == 2 * counters.drafted + counters.rounds
    assert counters.accepted + counters.rounds == counters.tokens == 20
    assert alone["autoregressive"].rejections == 0


DRAFTING = [
    "self_speculative:E=3:d=3",
    "self_speculative:E=3:d=3:stop=0.2",
    "skip_draft:attention=1:d=3:gamma=0.2",
    "dynamic:d=3:probe=2:verify_costs=0.2",
]


def last_accepted(model, strategy):
    """Return the drafted token that a row has last, of those it has not had before."""
    found = {}
    for index, prompt in enumerate(PROMPTS):
        row = []
        for [emission] in Generation(model, [prompt], strategy, max_new_tokens=20):
            for i, token in enumerate(emission.tokens):
                if i < emission.accepted and token not in row:
                    found[len(row), index] = token
                row.append(token)
    return found[max(found)]


@pytest.mark.parametrize("text", DRAFTING)
def test_drafted_rounds_are_counted_as_emissions_have_them(text):
    """Worked out again from what was emitted, and from what a round could have drafted."""
    model, strategy, seen = make_model(4), parse_strategy(text), Counter()
    stops = {last_accepted(model, strategy)}
    for prompt, length in [*zip(PROMPTS, (20, 20, 18, 20), strict=True)]:
        generation = Generation(model, [prompt], strategy, max_new_tokens=length, stop_tokens=stops)
        left, found, past_end = length, Counter(), 0
        for [emission] in generation:
            drafted, accepted = emission.drafted, emission.accepted
            # What dynamic chose to draft cannot be seen from here.
            most = drafted if "dynamic" in text else min(3, left - 1)
            left -= len(emission.tokens)
            if accepted < drafted:
                why = "rejected"
            elif emission.tokens[-1] in stops:
                why = "end"
            elif not left:
                why = "limit"
            else:
                why = "whole" if drafted == most else "not_sure"
            if drafted:
                found[drafted, accepted, why] += 1
            if len(emission.tokens) == accepted:  # the last of the text was drafted
                past_end += most - accepted
        counters = generation.counters
        assert generation.drafts == [found]
        assert counters.drafts == found
        assert counters.drafted == sum(d * times for (d, _, _), times in found.items())
        assert counters.accepted == sum(a * times for (_, a, _), times in found.items())
        assert counters.rejections == sum(t for (*_, why), t in found.items() if why == "rejected")
        if text == DRAFTING[0]:  # drafts as many as it may in every round
            assert counters.drafted_past_end == past_end
        seen.update(why for _, _, why in found.elements())
    assert min(seen["rejected"], seen["end"]) > 0
    assert bool(seen["not_sure"]) == ("stop" in text or "gamma" in text)


def test_rejections_are_rounds_whose_draft_was_not_accepted_whole(model):
    generation = Generation(model, PROMPTS[:1], SelfSpeculative(E=3, d=3), max_new_tokens=20)
    whole = [emission.accepted == emission.drafted for [emission] in generation]
    assert generation.counters.rejections == whole.count(False) > 0
    assert whole.count(True) > 0


@pytest.mark.parametrize("strategy", ALL, ids=describe)
def test_a_row_ends_with_its_first_stop_token(model, strategy):
    whole = decode(model, PROMPTS, strategy).tokens
    stops = {whole[0][4], whole[2][9]}
    expected = []
    for row in whole:
        ends = [i for i, token in enumerate(row) if token in stops]
        expected.append(row[: ends[0] + 1] if ends else row)
    generation = decode(model, PROMPTS, strategy, stop_tokens=stops)
    assert generation.tokens == expected
    assert len({len(row) for row in expected}) > 1, "rows were to end at different times"
    assert generation.counters.tokens == sum(map(len, expected))
    assert generation.counters.depths.total() in (0, generation.counters.tokens)


@pytest.mark.parametrize("strategy", ALL, ids=describe)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
def test_no_row_gets_more_than_max_new_tokens(model, strategy, max_new_tokens):
    whole = decode(model, PROMPTS, strategy).tokens
    cut = decode(model, PROMPTS, strategy, max_new_tokens=max_new_tokens)
    assert cut.tokens == [row[:max_new_tokens] for row in whole]


@pytest.mark.parametrize("d", [1, 3, 8, 50])
@pytest.mark.parametrize("longest", [1, 15, 18, 23])
def test_rows_fill_the_context_and_end(d, longest):
    model = build(small(n_layers=3, max_seq_len=24)).eval()
    prompts = [list(range(longest)), [5, 6]]
    speculative = SelfSpeculative(E=2, d=d)
    ours = decode(model, prompts, speculative, max_new_tokens=100).tokens
    assert [len(row) for row in ours] == [24 - longest, 22]
    assert ours == decode(model, prompts, AUTOREGRESSIVE, max_new_tokens=100).tokens


def test_drafts_are_no_longer_than_what_is_left(model):
    strategy = SelfSpeculative(E=3, d=8)
    generation = Generation(model, [[1, 2]], strategy, max_new_tokens=5)
    drafted = [emission.drafted for [emission] in generation]
    left = [5]
    assert drafted[0] == 4
    for emission in list(Generation(model, [[1, 2]], strategy, max_new_tokens=5)):
        assert emission[0].drafted <= left[-1] - 1
        left.append(left[-1] - len(emission[0].tokens))
    assert left[-1] == 0


def test_emissions_join_to_the_rows_and_say_what_was_accepted(model):
    strategy = SelfSpeculative(E=3, d=3)
    generation = Generation(model, PROMPTS, strategy, max_new_tokens=20)
    rows, accepted = [[] for _ in PROMPTS], 0
    for emissions in generation:
        for emission in emissions:
            assert 0 <= len(emission.tokens) - emission.accepted <= 1
            rows[emission.prompt_index] += emission.tokens
            accepted += emission.accepted
    assert rows == generation.tokens
    assert 0 < accepted <= generation.counters.accepted


def test_a_loop_that_was_left_goes_on_where_it_was(model):
    generation = Generation(model, PROMPTS, AUTOREGRESSIVE, max_new_tokens=6)
    for _ in generation:
        break
    whole = decode(model, PROMPTS, AUTOREGRESSIVE).tokens
    assert generation.finish().tokens == [row[:6] for row in whole]


def test_the_seed_decides_sampled_tokens(model):
    def sampled(seed):
        hot = Sampling(temperature=1.0)
        return decode(model, PROMPTS, STRATEGIES[2], sampling=hot, seed=seed).tokens

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: none"),
        ([[1], []], {}, "prompt 2: empty"),
        ([[1] * 96], {}, "prompt 1: 96 tokens leave no room in the model's context of 96"),
        ([[1, 61]], {}, "prompt 1: token 61 is outside the model's vocabulary of 61"),
        ([[-1]], {}, "token -1 is outside"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: 0, give at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        decode(model, prompts, AUTOREGRESSIVE, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("self_speculative:E=4", "E: 4, self_speculative needs 1 to 3"),
        ("self_speculative:E=0:d=0", "E: 0.*; d: 0, give at least 1"),
        ("early_exit:E=5", "E: 5, early_exit needs 1 to 4"),
        ("early_exit:E=0", "E: 0, early_exit needs 1 to 4"),
        ("early_exit:E=-1", "E: -1, early_exit needs 1 to 4"),
        ("unified:speedup=3:keep=0+1", "speedup: 3.0, has no effect without leaving keep out"),
        ("pruned:every=4:keep=0+1", "every: 4, has no effect without leaving keep out"),
        ("calm:length=9", "length: 9, has no effect without tau above 0"),
        ("dynamic:lookup_cost=2", "lookup_cost: 2.0, has no effect without ngram"),
        ("dynamic:leaf_costs=1+1", r"leaf_costs: \(1.0, 1.0\), has no effect without branch"),
        ("skip_draft:eps=0:beta1=0.1", "beta1: 0.1, has no effect without eps above 0"),
        ("free:zeta=0.3", "zeta: 0.3, has no effect without adapt=true"),
        (
            "free:rollback=exact:rollback_threshold=1",
            "rollback_threshold: 1.0, has no effect without rollback=threshold",
        ),
        ("skip_draft:gamma=0:eps=0", "eps: 0.0, has no effect without gamma above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, text, message):
    with pytest.raises(ValueError, match=message):
        decode(model, [[1]], parse_strategy(text))


def test_prompts_take_the_rows_of_those_that_end(model):
    prompts = [*PROMPTS, [11], [12, 13, 14, 15, 16], [17, 18]]
    for strategy in ALL:
        alone = [decode(model, [prompt], strategy).tokens[0] for prompt in prompts]
        stops = [alone[0][2], alone[4][7]]
        expected = [decode(model, [p], strategy, stop_tokens=stops).tokens[0] for p in prompts]
        assert len({len(row) for row in expected}) > 1, "rows were to end at different times"
        for batch_size in (2, 3):
            generation = Generation(
                model, prompts, strategy,
                max_new_tokens=20, batch_size=batch_size, stop_tokens=stops,
            )  # fmt: skip
            given = [emission for emissions in generation for emission in emissions]
            assert generation.tokens == expected
            counters = generation.counters
            assert counters.tokens == sum(map(len, expected))
            assert counters.accepted == sum(emission.accepted for emission in given)
            assert counters.drafted == sum(emission.drafted for emission in given)
            assert counters.drafts == sum(generation.drafts, Counter())
            for index, drafts in enumerate(generation.drafts):
                own = Counter((e.drafted, e.accepted) for e in given if e.prompt_index == index)
                del own[0, 0]  # nothing was drafted
                assert sorted(own.elements()) == sorted(how[:2] for how in drafts.elements())
            for emission in given:  # the drafts that the user got, and one token of the model's
                assert 0 <= len(emission.tokens) - emission.accepted <= 1
                assert emission.accepted <= emission.drafted


@pytest.mark.parametrize("strategy", ALL, ids=describe)
def test_reading_a_round_late_changes_no_token(model, strategy):
    whole = decode(model, PROMPTS, strategy, async_readback=False)
    assert decode(model, PROMPTS, strategy, async_readback=True).tokens == whole.tokens
    stops = {whole.tokens[0][4], whole.tokens[2][9]}
    for batch_size in (None, 2):
        options = {"stop_tokens": stops, "batch_size": batch_size}
        at_once = decode(model, PROMPTS, strategy, async_readback=False, **options)
        late = decode(model, PROMPTS, strategy, async_readback=True, **options)
        assert late.tokens == at_once.tokens
        assert late.counters.tokens == at_once.counters.tokens
