"""The weights and the loss J, against tables worked by hand and the plain double loop."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loss.early_exit import EarlyExitConfig, e, e_tilde, early_exit_loss, exit_weights
from loss.softmax import IGNORE_INDEX


def test_e_equals_the_table_worked_by_hand():
    # L = 5, e_scale = 0.2: 0.2 * (0, 1, 3, 6), and 4 + 0.2 * (0 + 1 + 2 + 3).
    assert [e(l, 5, 0.2) for l in range(5)] == pytest.approx([0, 0.2, 0.6, 1.2, 5.2])
    assert [e(l, 4, 1.0) for l in range(4)] == pytest.approx([0, 1, 3, 6])
    assert [e(l, 4, 0.0) for l in range(4)] == [0, 0, 0, 3]


def test_e_tilde_equals_the_table_worked_by_hand():
    assert e_tilde((1, 4), 5, 0.2) == pytest.approx({1: 0.2 / 5.4, 4: 5.2 / 5.4})
    assert e_tilde((0, 1, 2, 3), 4, 1.0) == pytest.approx({0: 0, 1: 0.1, 2: 0.3, 3: 0.6})


@pytest.mark.parametrize("L", [1, 2, 7, 24])
@pytest.mark.parametrize("e_scale", [0.0, 0.1, 1.0])
def test_weights_sum_to_one_when_the_last_layer_is_on(L, e_scale):
    for active in ((L - 1,), tuple(range(L))):
        assert sum(e_tilde(active, L, e_scale).values()) == pytest.approx(1.0)


def test_nothing_to_train_weighs_nothing():
    assert e_tilde((0,), 4, 0.5) == {0: 0.0}


def plain_double_loop(hidden, head, labels, weights):
    """Write J as the paper does: over exits, over tokens."""
    total = 0.0
    for l, h in hidden.items():
        for b in range(labels.shape[0]):
            for s in range(labels.shape[1]):
                if labels[b, s] != IGNORE_INDEX:
                    log_probs = (head @ h[b, s]).log_softmax(-1)
                    total = total - weights[l] * log_probs[labels[b, s]]
    return total


@pytest.mark.parametrize("chunk_rows", [1, 4, 5, 100])
def test_J_equals_the_plain_double_loop_in_value_and_gradient(chunk_rows):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(11, (2, 7), generator=g)
    labels[0, 3] = labels[1, 0] = IGNORE_INDEX
    weights = {1: 0.1, 2: 0.3, 4: 0.6}
    outcomes = []
    for form in ("chunked", "plain"):
        g.manual_seed(1)
        head = torch.randn(11, 6, generator=g).requires_grad_()
        hidden = {l: torch.randn(2, 7, 6, generator=g).requires_grad_() for l in weights}
        if form == "chunked":
            config = EarlyExitConfig(chunk_rows=chunk_rows)
            J = early_exit_loss(hidden, head, labels, weights, config=config).total
        else:
            J = plain_double_loop(hidden, head, labels, weights)
        (3.0 * J / 12).backward()
        outcomes.append((J.detach(), head.grad, *(h.grad for h in hidden.values())))
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_exit_losses_come_back_unweighted_and_unreduced():
    hidden = {l: torch.zeros(1, 3, 2) for l in (0, 1)}
    loss = early_exit_loss(
        hidden, torch.zeros(4, 2), torch.tensor([[1, 2, IGNORE_INDEX]]), {0: 0.0, 1: 1.0},
        config=EarlyExitConfig(),
    )  # fmt: skip
    uniform = torch.log(torch.tensor(4.0))
    for sums in loss.per_exit.values():
        torch.testing.assert_close(sums, 2 * uniform)
    torch.testing.assert_close(loss.total, 2 * uniform)


def test_evaluation_without_gradients_gives_the_same_loss():
    g = torch.Generator().manual_seed(0)
    head, h = torch.randn(9, 5, generator=g, requires_grad=True), torch.randn(3, 4, 5, generator=g)
    labels = torch.randint(9, (3, 4), generator=g)
    arguments = ({0: h}, head, labels, {0: 1.0})
    with torch.no_grad():
        evaluated = early_exit_loss(*arguments, config=EarlyExitConfig(chunk_rows=5))
    trained = early_exit_loss(*arguments, config=EarlyExitConfig(chunk_rows=5))
    assert not evaluated.total.requires_grad
    assert trained.total.requires_grad
    assert torch.equal(evaluated.total, trained.total)


def config(**changes):
    found = EarlyExitConfig(**changes)
    assert found.problems() == []
    return found


def test_other_weights_equal_their_tables_worked_by_hand():
    every = tuple(range(4))
    assert exit_weights(every, 0, 4, config()) == e_tilde(every, 4, 0.2)
    linear = exit_weights(every, 0, 4, config(weights="linear"))
    assert linear == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4})
    # FREE's shallow-deep loss of L_s = 1, L = 4: (1 CE_1 + 4 CE_4) / 5.
    shallow_deep = exit_weights(every, 0, 4, config(weights="linear", exits=(1,)))
    assert shallow_deep == pytest.approx({0: 0.2, 3: 0.8})
    uniform = exit_weights((1, 3), 0, 4, config(weights="uniform"))
    assert uniform == {1: 0.5, 3: 0.5}
    # EE-LLM: the last layer 1, exits after 1 and 2 layers 0.25 and 0.5, grown over 4 steps.
    fixed = config(weights="fixed", exits=(1, 2), exit_weights=(0.25, 0.5), warmup_steps=4)
    steps = [exit_weights(every, t, 4, fixed) for t in (0, 1, 4, 9)]
    assert steps[0] == {0: 0.0, 1: 0.0, 3: 1.0}
    assert steps[1] == {0: 0.0625, 1: 0.125, 3: 1.0}
    assert steps[2] == steps[3] == {0: 0.25, 1: 0.5, 3: 1.0}


@pytest.mark.parametrize("weights", ["layerskip", "linear", "uniform"])
@pytest.mark.parametrize("L", [1, 2, 9])
def test_these_weights_sum_to_one(weights, L):
    for exits in ((), (1,)):
        found = exit_weights(range(L), 3, L, config(weights=weights, exits=exits, e_scale=1.0))
        assert sum(found.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weights": "fixed"}, "exit_weights"),
        ({"weights": "fixed", "exits": (1, 2), "exit_weights": (1.0,)}, "exit_weights"),
        ({"exit_weights": (1.0,)}, "exit_weights"),
        ({"exits": (2, 1)}, "exits"),
        ({"exits": (0,)}, "exits"),
        ({"distill": 1.5}, "distill"),
        ({"temperature": 0.0}, "temperature"),
        ({"distill_states": "last"}, "exits"),
        ({"distill_states_weight": 0.0}, "distill_states_weight"),
        ({"z_loss": -1e-4}, "z_loss"),
        ({"token_fraction": 0.0}, "token_fraction"),
        ({"token_fraction": 1.1}, "token_fraction"),
    ],
)
def test_weights_that_cannot_be_are_refused_by_name(changes, field):
    [line, *_] = EarlyExitConfig(**changes).problems()
    assert line.startswith(f"early_exit.{field}")


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_distillation_equals_the_plain_loop_and_teaches_one_way(chunk_rows):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(11, (2, 7), generator=g)
    labels[0, 3] = labels[1, 0] = IGNORE_INDEX
    weights, share, T = {1: 0.2, 2: 0.3, 4: 0.5}, 0.7, 2.0
    outcomes = []
    for form in ("chunked", "plain"):
        g.manual_seed(1)
        head = torch.randn(11, 6, generator=g).requires_grad_()
        hidden = {l: torch.randn(2, 7, 6, generator=g).requires_grad_() for l in weights}
        if form == "chunked":
            J, per_exit = early_exit_loss(
                hidden, head, labels, weights,
                config=EarlyExitConfig(chunk_rows=chunk_rows, distill=share, temperature=T),
            )  # fmt: skip
        else:
            J = 0.0
            p = ((hidden[4] @ head.T) / T).softmax(-1).detach()
            for l, h in hidden.items():
                logits = h @ head.T
                ce = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="sum"
                )
                q = (logits / T).log_softmax(-1)
                kl = (p * (p.log() - q)).sum(-1)[labels != IGNORE_INDEX].sum() * T * T
                part = ce if l == 4 else (1 - share) * ce + share * kl
                J = J + weights[l] * part
                assert per_exit[l] == pytest.approx(ce.item(), rel=1e-5)
        (J / 12).backward()
        outcomes.append([J.detach(), head.grad, *(h.grad for h in hidden.values())])
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_a_teacher_gets_no_gradient_from_its_students():
    g = torch.Generator().manual_seed(0)
    hidden = {l: torch.randn(1, 4, 6, generator=g).requires_grad_() for l in (0, 1)}
    head = torch.randn(11, 6, generator=g)
    labels = torch.randint(11, (1, 4), generator=g)
    early_exit_loss(
        hidden, head, labels, {0: 1.0, 1: 0.0}, config=EarlyExitConfig(distill=1.0)
    ).total.backward()
    assert hidden[0].grad.abs().sum() > 0
    assert hidden[1].grad.abs().sum() == 0


def seeded(vocab=11, batch=2, seq=4, layers=(1, 2, 4)):
    g = torch.Generator().manual_seed(0)
    head = torch.randn(vocab, 6, generator=g).requires_grad_()
    hidden = {l: torch.randn(batch, seq, 6, generator=g).requires_grad_() for l in layers}
    labels = torch.randint(vocab, (batch, seq), generator=g)
    labels[0, 1] = IGNORE_INDEX
    return head, hidden, labels


EVERYTHING = {"z_loss": 0.01, "confidence_weights": True, "distill": 0.3, "temperature": 2.0}


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_the_mean_over_all_choices_of_tokens_is_the_loss_on_all_tokens(options):
    weights, config = {1: 0.2, 2: 0.3, 4: 0.5}, EarlyExitConfig(chunk_rows=3, **options)
    rows = [[torch.tensor(pair) + 4 * b for pair in itertools.combinations(range(4), 2)]
            for b in range(2)]  # fmt: skip
    choices = [torch.cat(rows) for rows in itertools.product(*rows)]
    assert len(choices) == 36
    outcomes = []
    for tokens in ([None], choices):
        head, hidden, labels = seeded()
        for some in tokens:
            loss = early_exit_loss(hidden, head, labels, weights, config=config, tokens=some)
            (loss.total / len(tokens)).backward()
            outcomes.append((loss.total.detach(), *loss.per_exit.values()))
        outcomes.append((head.grad, *(h.grad for h in hidden.values())))
    everything, gradients, *some, mean_gradients = outcomes
    means = [torch.stack(values).mean(0) for values in zip(*some, strict=True)]
    assert not torch.equal(some[0][0], some[1][0])
    torch.testing.assert_close(means, list(everything))
    torch.testing.assert_close(mean_gradients, gradients, atol=1e-6, rtol=1e-5)


def test_exits_before_the_last_see_the_chosen_tokens_and_no_others():
    head, hidden, labels = seeded()
    config = EarlyExitConfig(**EVERYTHING)
    tokens = torch.tensor([0, 3, 4, 6])
    early_exit_loss(
        hidden, head, labels, {1: 0.2, 2: 0.3, 4: 0.5}, config=config, tokens=tokens
    ).total.backward()
    for l in (1, 2):
        assert hidden[l].grad.flatten(0, 1).any(-1).nonzero().flatten().tolist() == [0, 3, 4, 6]
    assert hidden[4].grad.flatten(0, 1).any(-1).sum() == 7  # all that have a label


def test_fewer_tokens_cost_fewer_operations():
    def operations(tokens, **options):
        head, hidden, labels = seeded(seq=8)
        with FlopCounterMode(display=False) as counter:
            early_exit_loss(
                hidden, head, labels, {1: 0.2, 2: 0.3, 4: 0.5}, config=EarlyExitConfig(**options),
                tokens=tokens,
            )  # fmt: skip
        return counter.get_total_flops()

    row = 6 * 11 * 6  # of one token through the head, forward and backward
    assert operations(None) == 3 * 16 * row
    assert operations(torch.arange(0, 16, 4)) == (2 * 4 + 16) * row
    # Distillation runs the teacher, forward alone, on no other tokens either.
    students_and_teacher = 2 * 4 * row + 4 * row // 3
    assert operations(torch.arange(0, 16, 4), distill=0.5) == (
        (2 * 4 + 16) * row + students_and_teacher
    )
