"""Every Triton kernel compiled for sm_90 (H100) by the pinned Triton and ptxas: needs no GPU.

Shapes: those of Llama 3 8B in 8 slices and 8 twins, 65,536 tokens of which each passes 8 experts.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lamella.moe.paths import fused_ops, kernels, row_kernels  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter has other tiles"),
]
D, F_EXPERT, E, K, T = 4096, 1792, 16, 8, 65_536
HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10  # that a block may have on an H100
SPILL_BYTES = 64
BF16, FP32, I64, I32 = "*bf16", "*fp32", "*i64", "*i32"
COMMON = {"E": E, "EP": 16, "ROWS": 128, "EVEN": True}
WEIGHTS = {"ends_ptr": I32, "frozen_ptr": BF16, "trainable_ptr": BF16}
ROWS = {"a_ptr": BF16, **WEIGHTS, "out_ptr": BF16, "N": "i32", "K": "i32", "C": "i32", "S": "i32"}
# name -> (kernel, types of what is passed, constants)
TUNED = {
    "gate_up": (
        kernels.gate_up_kernel,
        {"x_ptr": BF16, "token_ptr": I64, "weight_ptr": FP32, **WEIGHTS, "gate_up_ptr": BF16, "hidden_ptr": BF16}
        | {"N": "i32", "D": "i32", "f": "i32", "S": "i32"},
        COMMON | {"SAVE": True},
    ),
    "rows": (kernels.rows_kernel, ROWS | {"stride_k": "i32"}, COMMON | {"stride_c": 1}),
    "rows, transposed": (kernels.rows_kernel, ROWS | {"stride_c": "i32"}, COMMON | {"stride_k": 1}),
    "dhidden": (
        kernels.dhidden_kernel,
        {"dy_ptr": BF16, "token_ptr": I64, "weight_ptr": FP32, **WEIGHTS, "gate_up_ptr": BF16, "dgate_up_ptr": BF16}
        | {"hidden_ptr": BF16, "dweight_ptr": FP32, "N": "i32", "D": "i32", "f": "i32", "S": "i32"}
        | {"first_trained": "i32"},
        COMMON,
    ),
    **{
        f"weight gradient, {'a' if gathers_a else 'b'} gathered": (
            kernels.weight_gradient_kernel,
            {"a_ptr": BF16, "b_ptr": BF16, "token_ptr": I64, "ends_ptr": I32, "out_ptr": BF16}
            | {"A": "i32", "B": "i32", "first_expert": "i32"},
            {"GATHER_A": gathers_a},
        )
        for gathers_a in (True, False)
    },
}
PLAIN = {
    "gather": (
        row_kernels._gather,
        {"x_ptr": BF16, "token_ptr": I64, "count_ptr": I32, "out_ptr": BF16, "D": "i32"},
        {"BD": 1024},
    ),
    "swiglu": (
        row_kernels._swiglu,
        {"gate_up_ptr": BF16, "weight_ptr": FP32, "count_ptr": I32, "hidden_ptr": BF16, "f": "i32"},
        {"BF": 1024},
    ),
    "swiglu gradient": (
        row_kernels._swiglu_gradient,
        {"dhidden_ptr": BF16, "gate_up_ptr": BF16, "weight_ptr": FP32, "count_ptr": I32, "dgate_up_ptr": BF16}
        | {"hidden_ptr": BF16, "dweight_ptr": FP32, "f": "i32"},
        {"BF": 1024},
    ),
    "combine": (
        row_kernels._combine,
        {"a_ptr": BF16, "b_ptr": BF16, "count_ptr": I32, "slot_ptr": I64, "out_ptr": BF16, "D": "i32"},
        {"K": K, "BD": 1024},
    ),
}
# What the launches cannot promise to be a multiple of 16.
ANY_NUMBER = ("first_expert", "first_trained", "S")


def compiled(function, types: dict, constants: dict, warps: int = 4, stages: int = 3):
    """The kernel for an H100, as a launch with tensors of torch would specialise it."""
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    sixteen = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name not in ANY_NUMBER)
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in sixteen},
    )
    return triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages})


def stack_bytes(kernel, folder: Path) -> int:
    """What the compiler spilled to memory per thread, as NVIDIA's cuobjdump says."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    match = re.search(r"STACK:(\d+)", said)
    assert match, said
    return int(match[1])


@pytest.mark.parametrize("name", TUNED)
def test_every_candidate_spills_nothing_and_one_fits(name, tmp_path):
    """Candidates that need more shared memory than there is are dropped by the tuner: one at least must not."""
    kernel, types, constants = TUNED[name]
    fitting = 0
    for config in kernel.configs:
        made = compiled(kernel.fn, types, constants | config.kwargs, config.num_warps, config.num_stages)
        assert stack_bytes(made, tmp_path) <= SPILL_BYTES, config
        assert "wgmma.mma_async" in made.asm["ptx"] or config.kwargs["BM"] < 64, f"{config}: no tensor cores of sm_90"
        fitting += made.metadata.shared <= SHARED_BYTES
    assert fitting == len(kernel.configs)


@pytest.mark.parametrize("name", PLAIN)
def test_row_kernels_spill_nothing(name, tmp_path):
    made = compiled(*PLAIN[name])
    assert stack_bytes(made, tmp_path) <= SPILL_BYTES
    assert made.metadata.shared <= SHARED_BYTES


def test_launch_grids_at_64k_tokens():
    """CUDA's limits: 2^31 - 1 blocks along x, 65,535 along y; a program's row number must fit its int32."""
    N = T * K
    ends_E = torch.arange(1, E + 1, dtype=torch.int32) * (N // E)
    assert fused_ops._common(N, ends_E, D) == {"E": E, "EP": 16, "ROWS": 128, "EVEN": True}
    for kernel, columns in (
        (kernels.gate_up_kernel, F_EXPERT),
        (kernels.rows_kernel, D),
        (kernels.dhidden_kernel, F_EXPERT),
    ):
        for config in kernel.configs:
            (programs,) = fused_ops._grid(N, E, columns)(config.kwargs)
            assert programs < 2**31
            # every row has a program, in the worst spread of the rows too: one more tile per expert than rows need
            assert programs * config.kwargs["BM"] * config.kwargs["BN"] >= N * columns
    # rows are numbered in int32; within a tile so are the offsets of its elements, from a 64-bit first row
    assert N + E * 128 < 2**31
    assert max(config.kwargs["BM"] for config in kernels.rows_kernel.configs) * max(D, 2 * F_EXPERT) < 2**31
