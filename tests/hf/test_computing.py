"""Which devices multiply bfloat16 faster than float32."""

import pytest
import torch

from lamella.hf.computing import computes_bfloat16


@pytest.mark.parametrize(("unit", "computes"), [("amx_bf16", True), ("avx512_bf16", True), ("avx512_f", False)])
def test_a_cpu_with_units_for_bfloat16(unit: str, computes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, unit: True}, raising=False)
    assert computes_bfloat16(torch.device("cpu")) == computes
