"""Private names of torch that the maths touches. tests/titan/test_seams.py says when torch changes one."""

from __future__ import annotations

import torch


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now leaves the graph for another one (`retain_graph`).

    A node may give a saved activation's memory back early only where it does not; torch tells nobody in public.
    """
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())
