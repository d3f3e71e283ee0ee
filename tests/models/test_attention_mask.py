import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from models import attention_mask
from models.attention_mask import attend, document_mask, query_mask, slots_mask, window_mask
from models.layer_dropout import draw_kept_rows
from tests.models.test_llama import build, small  # noqa: F401

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 2, 3, 4], [0] * 8])


def pieces():
    """Yield row, first and last position of each document."""
    for row, numbers in enumerate(DOCUMENTS.tolist()):
        for n in dict.fromkeys(numbers):
            begin = numbers.index(n)
            yield row, begin, begin + numbers.count(n)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_each_document_is_attended_to_as_if_it_were_alone(blocks, grouped):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 8, 16, generator=g)
    k, v = (torch.randn(3, 2 if grouped else 4, 8, 16, generator=g) for _ in range(2))
    mask = document_mask(DOCUMENTS, blocks=blocks)
    out = attend(q, k, v, mask.mask, grouped=grouped)
    for row, begin, end in pieces():
        part = (slice(row, row + 1), slice(None), slice(begin, end))
        alone = attend(q[part], k[part], v[part], None, grouped=grouped)
        torch.testing.assert_close(out[part], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [False, True])
def test_some_rows_of_a_mask_are_the_mask_of_these_rows(blocks):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 8, 16, generator=g) for _ in range(3))
    rows = torch.tensor([2, 0])
    part = document_mask(DOCUMENTS, blocks=blocks).rows(rows)
    whole = document_mask(DOCUMENTS[rows], blocks=blocks).mask
    torch.testing.assert_close(
        attend(q, k, v, part, grouped=False), attend(q, k, v, whole, grouped=False)
    )


def test_some_rows_have_the_blocks_that_torch_works_out_for_them():
    documents = torch.arange(5)[:, None] * torch.arange(300) // 400
    rows = torch.tensor([4, 1, 2])
    found = document_mask(documents, blocks=True).rows(rows)
    expected = document_mask(documents[rows], blocks=True).mask
    assert found.seq_lengths == expected.seq_lengths
    for name in ("q_num_blocks", "full_q_num_blocks", "kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.equal(found.to_dense(), expected.to_dense())


def test_any_number_of_rows_shares_a_few_graphs_of_blocks(monkeypatch):
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compile_function(f, backend=note, **o))
    # Blocks have no gradients on a CPU, whose graphs are but counted.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)
    attention_mask._flex.cache_clear()
    torch._dynamo.reset()
    flex = attention_mask._flex("flex_attention", compiled=True)
    mask = document_mask(torch.arange(40).expand(12, 40) // 9, blocks=True)
    for grad in (False, True):
        for n in range(12, 0, -1):
            q, k, v = torch.randn(3, n, 2, 40, 16).requires_grad_(grad)
            flex(q, k, v, block_mask=mask.rows(torch.arange(n)))
    attention_mask._flex.cache_clear()
    # Twelve rows, any number, one; without and with gradients.
    assert 1 < len(graphs) <= 6
    assert torch._dynamo.config.recompile_limit >= attention_mask.GRAPHS


@pytest.mark.parametrize("blocks", [False, True])
def test_a_window_ends_with_the_query_and_stays_in_its_document(blocks):
    q, k, v = torch.randn(3, 3, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    rows, positions = torch.tensor([2, 0]), torch.tensor([[0, 3, 7], [2, 4, 6], [1, 5, 7]])
    one = torch.zeros(3, 8, dtype=torch.int64)
    for window in (3,) if blocks else (1, 3, 8):
        for documents, mask in (
            (DOCUMENTS, document_mask(DOCUMENTS, window, blocks=blocks)),
            (one, window_mask(window, 8, DOCUMENTS.device, blocks=blocks)),
        ):
            seen = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
            for b, i, j in torch.cartesian_prod(*map(torch.arange, (3, 8, 8))).tolist():
                same = documents[b, i] == documents[b, j]
                seen[b, 0, i, j] = same and i - window < j <= i
            expected = attend(q, k, v, seen, grouped=False)
            found = attend(q, k, v, mask.mask, grouped=False)
            torch.testing.assert_close(found, expected)
            some = attend(q[rows], k[rows], v[rows], mask.rows(rows), grouped=False)
            torch.testing.assert_close(some, expected[rows])
            own = query_mask(positions, 8, mask.documents, window, blocks=blocks).mask
            at = positions[:, None, :, None].expand(-1, 2, -1, 16)
            found = attend(q.gather(2, at), k, v, own, grouped=False)
            torch.testing.assert_close(found, expected.gather(2, at))


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("rows", [1, 2])
def test_heads_that_share_keys_attend_as_one_head_of_more_queries(queries, rows):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, 6, 16, generator=g).transpose(1, 2)
    k, v = (torch.randn(2, 2, 9, 16, generator=g)[:, :, :8] for _ in range(2))
    mask = torch.rand(rows, 1, queries, 8, generator=g) < 0.5
    mask[..., 0] = True
    found = attention_mask._attend_by_group(q, k, v, mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_shared_heads_under_a_mask_are_left_to_torch_but_on_gpus(
    device, masked, grouped, monkeypatch
):
    calls = []

    def note(q, k, v, *, attn_mask=None, is_causal=False, enable_gqa=False):
        calls.append((tuple(q.shape), k.shape[1], is_causal, enable_gqa))
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    with FakeTensorMode():
        q = torch.empty(2, 6, 5, 16, device=device)
        k = torch.empty(2, 2 if grouped else 6, 8, 16, device=device)
        mask = torch.ones(2, 1, 5, 8, dtype=torch.bool, device=device) if masked else None
        assert attend(q, k, k, mask, grouped=grouped).shape == q.shape
    by_group = masked and grouped and device == "cuda"
    shape = (2, 2, 15, 16) if by_group else tuple(q.shape)
    assert calls == [(shape, k.shape[1], not masked, grouped and not by_group)]


@pytest.mark.parametrize("dropped", [False, True])
def test_a_packed_row_gives_each_document_what_it_gets_alone_gradients_too(dropped):
    tokens = torch.randint(61, (3, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for packed in (True, False):
        model = build(small())
        L = model.config.n_layers
        kept = None
        if dropped:
            kept = draw_kept_rows(
                [0.5] * L, seed=4, t=0, keys=torch.arange(3).numpy(), scale_kept=False,
                device=torch.device("cpu"),
            )  # fmt: skip
            assert kept is not None
            assert any(choice.rows is not None and len(choice.rows) for choice in kept.choices)
        if packed:
            exits = model(tokens, exit_layers=range(L), kept_rows=kept, documents=DOCUMENTS).exits
        else:
            exits = {l: torch.zeros(3, 8, model.config.dim) for l in range(L)}
            for row, begin, end in pieces():
                # A document alone, in the row whose layers are kept.
                filled = torch.zeros(3, end - begin, dtype=torch.int64)
                filled[row] = tokens[row, begin:end]
                for l, h in model(filled, exit_layers=range(L), kept_rows=kept).exits.items():
                    exits[l][row, begin:end] = h[row]
        sum((h * (l + 1)).square().sum() for l, h in exits.items()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([*(h.detach() for h in exits.values()), *gradients])
    for ours, alone in zip(*found, strict=True):  # sums of up to 24 tokens in another order
        torch.testing.assert_close(ours, alone, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 40])
def test_blocks_of_a_cache_leave_out_what_its_mask_does(window):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, 16, generator=g) for heads, n in ((4, 3), (2, 260), (2, 260))
    )
    positions = torch.tensor([[3, 4, 5], [140, 141, 142]])
    found = attend(q, k, v, slots_mask(positions, 260, window), grouped=True)
    slots, query = torch.arange(260), positions[:, None, :, None]
    mask = (slots <= query) & (slots > query - (window or 260))
    torch.testing.assert_close(found, attend(q, k, v, mask, grouped=True))
