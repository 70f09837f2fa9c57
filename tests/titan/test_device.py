"""torchtitan believes in a CPU where there is no accelerator."""

from __future__ import annotations

import pytest
import torch

from lamella.titan.device import cpu_device_module

# isort: split
from torchtitan.components.metrics import build_device_memory_monitor
from torchtitan.tools import utils


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the shim does nothing where there is an accelerator")
def test_torchtitan_runs_on_cpu():
    assert utils.device_type == "cpu"
    assert utils.device_module.current_device() == 0
    monitor = build_device_memory_monitor()
    assert monitor.device_name == "CPU"
    assert 0.01 < monitor.get_peak_stats().max_active_gib < monitor.device_capacity_gib


def test_torch_is_left_as_it_was():
    kind = torch._utils._get_available_device_type()
    assert kind == (torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None)


def test_device_module_has_what_torchtitan_calls():
    module = cpu_device_module()
    module.synchronize()
    module.empty_cache()
    module.reset_peak_memory_stats()
    assert module.get_device_properties().total_memory > 2**30
