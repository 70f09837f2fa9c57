"""Run on a machine with a GPU: pytest -m gpu

Every path on the GPU against the loop, and that grouped and fused never wait for it.
"""

import pytest
import torch

from lamella.moe.packed import Experts
from lamella.moe.paths.choose import PATHS, apply_experts
from lamella.moe.paths.quack_path import INSTALLED
from lamella.moe.routing import Routing
from support import experts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
S = 8
QUACK = pytest.param("quack", marks=pytest.mark.skipif(not INSTALLED, reason="needs quack-kernels"))
FAST = [QUACK if path == "quack" else path for path in PATHS if path != "loop"]
# (tokens, model width, neurons per expert): tiles filled exactly, in part, and widths that are multiples of 8 alone
SIZES = [(1024, 256, 128), (777, 320, 192), (65, 72, 40), (1, 128, 64)]


def make_experts(D: int, f: int, dtype: torch.dtype) -> Experts:
    gate_up, down = torch.randn(S, 2 * f, D) * D**-0.5, torch.randn(S, D, f) * f**-0.5
    return Experts(gate_up.to("cuda", dtype), down.to("cuda", dtype))


def step(path: str, T: int, D: int, f: int, load: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    frozen, trainable = make_experts(D, f, dtype), make_experts(D, f, dtype)
    for leaf in trainable:
        leaf.requires_grad_()
    x_TD = torch.randn(T, D).to("cuda", dtype).requires_grad_()
    weights_TK = torch.rand(T, S).cuda().requires_grad_()
    ids_TK = {
        "twin": torch.arange(S) + S * torch.randint(2, (T, S)),
        "flat": torch.rand(T, 2 * S).topk(S).indices,
        "all frozen": torch.arange(S).expand(T, S),
        "all trainable": torch.arange(S, 2 * S).expand(T, S),
    }[load].cuda()
    dy_TD = torch.randn(T, D).to("cuda", dtype)
    y_TD = apply_experts(x_TD, Routing(ids_TK, weights_TK), frozen, trainable, path)  # type: ignore[arg-type]
    y_TD.backward(dy_TD)
    grads = {"x": x_TD, "weights": weights_TK, "gate_up": trainable[0], "down": trainable[1]}
    return {"y": y_TD.detach(), **{name: t.grad for name, t in grads.items()}}


@pytest.mark.parametrize("load", ["twin", "flat", "all frozen", "all trainable"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("path", FAST)
def test_paths_agree_with_the_loop(path, size, load):
    expected, actual = (step(p, *size, load, torch.bfloat16) for p in ("loop", path))
    experts.assert_close(actual, expected, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("path", ["grouped", "fused"])
def test_a_layer_on_a_gpu_that_is_not_the_current_one(path):
    """As `device_map="auto"` places layers; the current device stays the first."""
    expected, packed = step(path, *SIZES[0], "twin", torch.bfloat16), []
    torch.manual_seed(0)
    for _ in range(2):
        packed.append(Experts(*(t.to("cuda:1") for t in make_experts(*SIZES[0][1:], torch.bfloat16))))
    x_TD = torch.randn(SIZES[0][:2]).to("cuda:1", torch.bfloat16)
    weights_TK = torch.rand(SIZES[0][0], S).to("cuda:1")
    ids_TK = (torch.arange(S) + S * torch.randint(2, (SIZES[0][0], S))).to("cuda:1")
    y_TD = apply_experts(x_TD, Routing(ids_TK, weights_TK), *packed, path)
    assert torch.cuda.current_device() == 0
    assert torch.equal(y_TD.cpu(), expected["y"].cpu())


@pytest.mark.parametrize("path", ["grouped", "fused", QUACK])
def test_no_step_waits_for_the_gpu(path):
    step(path, *SIZES[0], "twin", torch.bfloat16)  # tuning waits
    x_TD = torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    frozen, trainable = make_experts(256, 128, torch.bfloat16), make_experts(256, 128, torch.bfloat16)
    for leaf in trainable:
        leaf.requires_grad_()
    routing = Routing(
        torch.arange(S, device="cuda") + S * torch.randint(2, (1024, S), device="cuda"),
        torch.rand(1024, S, device="cuda"),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        apply_experts(x_TD, routing, frozen, trainable, path).backward(torch.ones_like(x_TD))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("path", ["grouped", "fused"])
def test_compiled_agrees(path, monkeypatch):
    expected = step("loop", *SIZES[0], "twin", torch.bfloat16)
    monkeypatch.setitem(PATHS, "compiled", torch.compile(PATHS[path], fullgraph=True))
    experts.assert_close(step("compiled", *SIZES[0], "twin", torch.bfloat16), expected, torch.bfloat16)
