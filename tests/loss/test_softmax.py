"""The passes over logits: two forms agree, one kernel suffices, nothing waits for the host."""

import re
import shutil

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from loss.early_exit import EarlyExitConfig, early_exit_loss
from loss.head_gradient import add_product
from loss.softmax import (
    IGNORE_INDEX,
    _any_rows,
    fused_token_losses,
    token_losses,
)
from loss.state_distillation import StatePair

VOCAB = 1024  # a multiple of every vector, so that compiled loops have no remainder


def chunk(rows=37, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(rows)
    logits = (4 * torch.randn(rows, VOCAB, generator=g)).to(dtype)
    labels = torch.randint(VOCAB, (rows,), generator=g)
    labels[1::5] = IGNORE_INDEX
    logits[2] *= 40  # one probability is 1, and most are 0
    return logits.to(device), labels.to(device)


def both_forms(fused, dtype, z_loss, by_confidence, device="cpu"):
    """Return (objective, cross entropy, gradient) of `token_losses` and of `fused`."""
    logits, labels = chunk(dtype=dtype)
    losses = token_losses(logits, labels, z_loss=z_loss, by_confidence=by_confidence, gradient=True)
    ours = (*losses[:2], logits if losses.scale is None else logits * losses.scale)
    logits, labels = chunk(dtype=dtype, device=device)
    weight = torch.tensor(z_loss, device=device)
    return ours, (*fused(*_any_rows(logits, labels), weight, by_confidence, True), logits)


# One step of bf16 for gradients that lie between two of its numbers.
STEP = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_confidence", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_the_two_forms_of_the_loss_agree(dtype, by_confidence, z_loss):
    in_place, fused = both_forms(fused_token_losses, dtype, z_loss, by_confidence)
    torch.testing.assert_close(in_place[:2], fused[:2], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(in_place[2], fused[2], atol=1e-6, rtol=STEP[dtype])


class Devices(TorchDispatchMode):
    """Record the operators with an input or a result on another device than meta."""

    def __init__(self):
        super().__init__()
        self.elsewhere = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        tensors = torch.utils._pytree.tree_leaves((arguments, keywords, out))
        if any(isinstance(t, torch.Tensor) and not t.is_meta for t in tensors):
            self.elsewhere.append(str(function))
        return out


def test_no_tensor_of_the_host_takes_part_in_the_loss():
    # A copy from the host's pageable memory would make it wait for the GPU in every microbatch.
    with torch.device("meta"):
        hidden = {l: torch.randn(2, 8, 4).requires_grad_() for l in (1, 2, 3)}
        head, tokens = torch.randn(11, 4).requires_grad_(), torch.zeros(6, dtype=torch.int64)
        labels = torch.zeros(2, 8, dtype=torch.int64)
    config = EarlyExitConfig(
        chunk_rows=3, z_loss=0.1, confidence_weights=True, distill=0.5, temperature=2.0,
        distill_states="last", exits=(2,),
    )  # fmt: skip
    with Devices() as devices:
        loss = early_exit_loss(
            hidden, head, labels, {1: 0.2, 2: 0.3, 3: 0.5},
            config=config, tokens=tokens, state_pairs=[StatePair(1, 3)],
        )  # fmt: skip
        loss.total.backward()
    assert devices.elsewhere == []
    assert {each.device.type for each in (head.grad, *loss.per_exit.values())} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_summed_in_fp32_on_memory_with_anything_in_it(dtype):
    g = torch.Generator().manual_seed(0)
    grads = torch.randn(512, 2100, generator=g).to(dtype)
    rows = torch.randn(512, 5, generator=g).to(dtype)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for size in (2, 512):
            total = None
            for part, some in zip(grads.split(size), rows.split(size), strict=True):
                before, total = total, add_product(total, part, some, alpha=-0.3)
                assert before is None or total.data_ptr() == before.data_ptr()
            exact = -0.3 * (grads.double().t() @ rows.double())
            torch.testing.assert_close(total.double(), exact, atol=2e-4, rtol=0)
    finally:
        torch.use_deterministic_algorithms(False)


def accesses(code, columns=VOCAB):
    """Return the bytes that loops over whole rows read and write per logit, from C++ code."""
    pointers = dict(
        (name, 2 if kind.endswith("Float16") or "bfloat16" in kind.lower() else 4)
        for kind, name in re.findall(r"([\w:]+)\s*\*\s*(?:__restrict__\s*)?(\w+_ptr\d+)", code)
    )
    found = re.findall(rf"(\w+_ptr\d+) *(?:\[|\+)[^;]*?x\d+ \+ {columns}L\*x\d+", code)
    return [pointers[name] for name in found]


needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@needs_a_compiler
def test_the_compiled_loss_moves_8_bytes_per_logit_once_for_all_chunks():
    compiled = torch.compile(fused_token_losses, fullgraph=True)
    codes = []

    def fused(*arguments):
        out, code = run_and_get_code(compiled, *arguments)
        codes.extend(code)
        return out

    with torch.no_grad():
        in_place, written = both_forms(fused, torch.bfloat16, 0.01, True)
        torch.testing.assert_close(in_place[:2], written[:2], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(in_place[2], written[2], atol=1e-6, rtol=STEP[torch.bfloat16])
        # In the logits' own memory, 3 x 2 bytes read (2 x 2 by Triton) and 2 written.
        assert accesses("".join(codes)) == [2, 2, 2, 2]
        with torch.compiler.set_stance("fail_on_recompile"):
            for rows, z_loss in ((64, 0.0), (5, 0.3)):
                logits, labels = chunk(rows, torch.bfloat16)
                compiled(*_any_rows(logits, labels), torch.tensor(z_loss), True, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_every_option_equals_the_cpu_and_nothing_synchronises(dtype):
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(2, 64, 32, generator=g) for _ in range(3)]
    values.append(torch.randn(VOCAB, 32, generator=g))
    labels = torch.randint(VOCAB, (2, 64), generator=g)
    labels[0, 5:9] = IGNORE_INDEX
    config = EarlyExitConfig(
        chunk_rows=48, z_loss=0.01, confidence_weights=True, distill=0.5, temperature=2.0
    )

    def step(device):
        *hidden, head = (v.to(device, dtype).requires_grad_() for v in values)
        targets = labels.to(device)
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" and warm else "default")
        loss = early_exit_loss(
            dict(enumerate(hidden)), head, targets, {0: 0.2, 1: 0.3, 2: 0.5}, config=config
        )
        loss.total.backward()
        torch.cuda.set_sync_debug_mode("default")
        return [each.detach().cpu() for each in (loss.total, head.grad, *(h.grad for h in hidden))]

    warm = False
    on_cpu, _ = step("cpu"), step("cuda")  # compiles
    warm = True
    for ours, cpu in zip(step("cuda"), on_cpu, strict=True):
        error = (ours.double() - cpu.double()).norm() / cpu.double().norm()
        assert error < {torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype]  # products may be TF32
