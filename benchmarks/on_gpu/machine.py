"""The ceilings of the machine, and which kernels attention gets."""

import time

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.on_gpu.session import Session
from models.attention_mask import attend


def ceilings(session: Session) -> dict[str, object]:
    """Measure a copy and a bfloat16 product of random numbers, never of zeros."""
    size = 2**22 if session.tiny else 2**31
    source = torch.randint(256, (size,), dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    copy = 2 * size / session.seconds(lambda: target.copy_(source))
    n = 256 if session.tiny else 8192
    a, b = (torch.randn(n, n, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * n**3 / session.seconds(lambda: a @ b, times=10)
    session.row("copy, read and write", f"{copy / 1e9:.0f} GB/s")
    session.row(f"product of {n}^3, bfloat16", f"{product / 1e12:.3f} TFLOP/s")
    found = {"copy_bytes_per_second": copy, "product_flops": product}
    session.results["ceilings"] = found  # what follows reads them
    return dict(found)


def attention(session: Session) -> dict[str, object]:
    """Try every backend of SDPA on the shapes of training and decoding; time a growing cache."""
    heads, kv_heads, dim, seq = (4, 2, 8, 32) if session.tiny else (16, 4, 128, 2048)
    found: dict[str, object] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for queries, masked, gqa in (
            (seq, False, False),
            (seq, False, True),
            (seq, True, True),
            (1, True, False),
            (4, True, True),
        ):
            kv = kv_heads if gqa else heads
            q = torch.randn(2, heads, queries, dim, device=session.device, dtype=dtype)
            k, v = (
                torch.randn(2, kv, seq, dim, device=session.device, dtype=dtype) for _ in range(2)
            )
            mask = torch.ones(queries, seq, dtype=torch.bool, device=session.device).tril(
                seq - queries
            )
            how = {"enable_gqa": gqa, "is_causal": not masked and queries > 1}
            if masked:
                how["attn_mask"] = mask
            name = f"{str(dtype)[6:]} {queries} queries{' mask' * masked}{' gqa' * gqa}"
            found[name] = times = _by_backend(session, q, k, v, how)
            session.row(f"attention {name}", ", ".join(f"{a} {b}" for a, b in times.items()))
    first = _growing_cache(session, heads, dim)
    found["first_call_ms_by_keys"] = first
    session.row("attention of one query, first call, 10 lengths", f"{max(first):.2f} ms at most")
    return found


def _by_backend(session, q, k, v, how) -> dict[str, str]:
    times = {}
    for backend in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        name = backend.name.removesuffix("_ATTENTION").lower()
        try:
            with sdpa_kernel(backend):
                s = session.seconds(lambda: F.scaled_dot_product_attention(q, k, v, **how), times=3)
            times[name] = f"{s * 1e3:.3f} ms"
        except RuntimeError:
            continue  # this one does not take these inputs
    s = session.seconds(lambda: F.scaled_dot_product_attention(q, k, v, **how), times=3)
    mask, grouped = how.get("attn_mask"), how["enable_gqa"]
    if mask is not None and grouped:
        ours = session.seconds(lambda: attend(q, k, v, mask[None, None], grouped=True), times=3)
        times["ours"] = f"{ours * 1e3:.3f} ms"
    return times | {"chosen": f"{s * 1e3:.3f} ms"}


def _growing_cache(session: Session, heads: int, dim: int) -> list[float]:
    """Return the ms of the first call for ten successive numbers of keys, as eager decoding has."""
    q = torch.randn(1, heads, 1, dim, device=session.device, dtype=torch.bfloat16)
    found = []
    for keys in range(100, 110):
        k = torch.randn(1, heads, 256, dim, device=session.device, dtype=torch.bfloat16)[
            :, :, :keys
        ]
        mask = torch.ones(1, keys, dtype=torch.bool, device=session.device)
        session.wait()
        begin = time.perf_counter()
        F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        session.wait()
        found.append((time.perf_counter() - begin) * 1e3)
    return found
