"""A strategy is written as text and read back."""

import pytest

from inference.evaluation.report import short_names
from inference.strategies.early_exit import EarlyExit
from inference.strategies.registry import STRATEGIES, describe, parse_strategy, shorten
from inference.strategies.self_speculative import SelfSpeculative


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_found_in_the_file_of_its_name(name):
    assert STRATEGIES[name].__module__ == f"inference.strategies.{name}"


def test_settings_are_read_by_their_types():
    assert parse_strategy("self_speculative:E=3:d=5") == SelfSpeculative(E=3, d=5)
    assert parse_strategy("early_exit:E=none") == EarlyExit()


def test_settings_given_beside_the_text_yield_to_it_and_apply_where_they_exist():
    assert parse_strategy("self_speculative:d=2", E="1", d="9") == SelfSpeculative(E=1, d=2)
    assert parse_strategy("early_exit", E="1", d="9") == EarlyExit(E=1)
    assert parse_strategy("early_exit", E=None) == EarlyExit()


def test_settings_not_given_are_a_quarter_of_the_layers_and_four_tokens():
    assert parse_strategy("self_speculative").with_defaults(8) == SelfSpeculative(E=2, d=4)
    assert parse_strategy("early_exit").with_defaults(2) == EarlyExit(E=1)


def test_lists_of_numbers_are_read_back():
    strategy = parse_strategy("dynamic:exits=2+5:draft_costs=0.25+1e-7:verify_costs=1e17+2")
    assert strategy.exits == (2, 5)
    assert strategy.draft_costs == (0.25, 1e-7)
    assert strategy.verify_costs == (1e17, 2.0)
    assert parse_strategy(describe(strategy)) == strategy


def test_the_largest_numbers_are_read():
    assert parse_strategy(f"patience:patience={2**63 - 1}").patience == 2**63 - 1
    assert parse_strategy("calm:threshold=inf").threshold == float("inf")


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_described_is_read_back(name):
    strategy = parse_strategy(name)
    assert parse_strategy(describe(strategy)) == strategy
    filled = strategy.with_defaults(8)
    assert parse_strategy(describe(filled)) == filled
    needs = {"speculative": ["draft: none"], "gate": ["path: none"], "jump": ["path: none"]}
    assert [line.split(",")[0] for line in filled.problems(8)] == needs.get(name, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "strategy: magic, give one of autoregressive, "),
        ("", "strategy: empty, give one of"),
        ("self_spec", "strategy: self_spec, did you mean self_speculative\\?"),
        ("layer_skip", "strategy: layer_skip, give one of autoregressive, "),
        ("early_exit:d=2", "early_exit has no setting d, give one of E"),
        ("calm:treshold=1", "calm has no setting treshold, did you mean threshold\\?"),
        ("self_speculative:n_gram=2", "has no setting n_gram, did you mean ngram\\?"),
        ("autoregressive:E=2", "autoregressive has no setting E, it has none"),
        ("early_exit:E", "'E' in 'early_exit:E' is no setting, write name=value"),
        ("early_exit:E=2:E=2", "strategy: early_exit: E is given twice, give it once"),
        ("speculative:draft=", "strategy: speculative: draft=, give a value"),
        ("early_exit:E=two", "early_exit: E=two, give an integer"),
        (f"patience:patience=1{'0' * 27}", "0, give an integer of at most 64 bits"),
        ("calm:threshold=1e300", "threshold=1e300, give a number up to 3.4e\\+38, or inf"),
    ],
)
def test_text_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_strategy(text)


def test_measured_settings_are_left_out_of_what_people_read():
    plain = "dynamic:exits=1+2:ngram=2"
    assert shorten(f"{plain}:draft_costs=0.2+0.3:verify_costs=1.1+1.2") == f"{plain}:..."
    assert shorten(plain) == plain
    assert shorten("self_speculative:E=2:d=3:stop=0.5") == "self_speculative:E=2:d=3:stop=0.5"
    other = f"{plain}:draft_costs=0.2+0.3"
    names = short_names([plain, other, f"{plain}:draft_costs=0.4+0.5"])
    assert names[plain] == plain
    assert names[other] == other, "two strategies are never called alike"
