"""The loss beside its three products."""

import torch

from benchmarks.on_gpu.session import Session
from loss.early_exit import EarlyExitConfig, early_exit_loss


def loss_alone(session: Session) -> dict[str, object]:
    """Time the loss of 1 and 2 exits beside its three products, and count its bytes per logit."""
    copy = session.results.get("ceilings", {}).get("copy_bytes_per_second")
    found: dict[str, object] = {}
    shapes = [(64, 32, 64)] if session.tiny else [(32768, 768, 32000), (16384, 2048, 32000)]
    for tokens, dim, vocab in shapes:
        dtype = torch.bfloat16 if session.on_gpu else torch.float32
        head = torch.randn(vocab, dim, device=session.device, dtype=dtype) * dim**-0.5
        head.requires_grad_()
        labels = torch.randint(vocab, (1, tokens), device=session.device)
        for exits in (1, 2):
            products = exits * _three_products(session, tokens, dim, head)
            for chunk in (16,) if session.tiny else (1024, 4096, 16384):
                seconds = _loss_seconds(session, exits, (tokens, dim), head, labels, chunk)
                name = f"loss ({tokens}, {dim}, {vocab}), {exits} exits, chunk {chunk}"
                extra = max(0.0, seconds - products)
                moved = extra * copy / (exits * tokens * vocab) if copy else None
                found[name] = {
                    "ms": seconds * 1e3,
                    "over_products": seconds / products,
                    "bytes_per_logit": moved,
                }
                text = f"{seconds * 1e3:.2f} ms, {seconds / products:.2f}x its products"
                session.row(name, text + (f", {moved:.0f} bytes/logit" if moved else ""))
    found["addmm_out_dtype"] = _fp32_accumulation(session)
    session.row("addmm of bf16 into fp32 (out_dtype)", str(found["addmm_out_dtype"])[:90])
    return found


def _three_products(session: Session, tokens: int, dim: int, head: torch.Tensor) -> float:
    x = torch.randn(tokens, dim, device=session.device, dtype=head.dtype)
    rows = min(tokens, 4096)
    weight = head.detach()

    def run() -> None:
        for begin in range(0, tokens, rows):
            part = x[begin : begin + rows]
            logits = part @ weight.T
            logits @ weight
            logits.T @ part

    return session.seconds(run, times=3)


def _loss_seconds(
    session: Session,
    exits: int,
    shape: tuple[int, int],
    head: torch.Tensor,
    labels: torch.Tensor,
    chunk: int,
) -> float:
    hidden = {
        l: torch.randn(1, *shape, device=session.device, dtype=head.dtype).requires_grad_()
        for l in range(exits)
    }
    config = EarlyExitConfig(chunk_rows=chunk)
    weights = dict.fromkeys(hidden, 1 / exits)

    def run() -> None:
        early_exit_loss(hidden, head, labels, weights, config=config).total.backward()

    return session.seconds(run, times=3)


def _fp32_accumulation(session: Session) -> str:
    """Whether a bfloat16 product is added to an fp32 sum in place, exactly enough."""
    a, b = (torch.randn(64, 64, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    total = torch.ones(64, 64, device=session.device)
    expected = 1 + a.double() @ b.double()
    try:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return f"not on this device: {error}".splitlines()[0]
    return f"error {float((total - expected).abs().max()):.1e}"
