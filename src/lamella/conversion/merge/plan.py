"""Method "merge": the FFNs of several models of one shape become the experts of one, all else comes from a base model.

What mergekit-moe does (https://github.com/arcee-ai/mergekit), from its configs: its architectures, its gates and better
ones (lamella.conversion.merge.gates). Everything is checked and listed from the headers; then bytes that do not change
are copied by the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lamella.checkpoint.copying import copy_tensors
from lamella.checkpoint.plan import WritePlan
from lamella.conversion.merge.gates import check_gates, gates
from lamella.conversion.merge.parts import Merge, open_merge
from lamella.conversion.merge.sidecars import write_merge_sidecars
from lamella.conversion.merge.targets import Stock, chosen
from lamella.conversion.merge.tensors import write_plan
from lamella.conversion.plan import ConversionPlan, Workspace, Write
from lamella.recipe.methods.merge import MergeOptions


def plan_merge(model: str | Path | None, options: MergeOptions) -> ConversionPlan:
    """All tensors and the config of the merged model.

    Raises:
        UserError: everything that is wrong with a model or between models, an architecture that cannot hold them, or
            prompts that give no gates.
    """
    merge = open_merge(None if model is None else str(model), options)
    stock = chosen(merge)
    check_gates(merge)

    def decide(work: Workspace) -> WritePlan:
        found = gates(merge, work)
        plan = write_plan(merge, stock, found.rows, found.notes)
        return replace(plan, scratch=work.folder)

    listing = write_plan(merge, stock, None, {})
    return ConversionPlan(
        merge.base,
        listing,
        decide,
        entry=merge.moe.to_dict(),
        write=_stock_writer(merge, stock) if stock is not None else None,
        read_from=frozenset(t.path for expert in merge.all_experts for t in expert.source.tensors.values()),
    )


def _stock_writer(merge: Merge, stock: Stock) -> Write:
    def write(plan: WritePlan, folder: Path, on_bytes: Callable[[int], None]) -> None:
        merge.base.copy_sidecars(folder)
        copy_tensors(plan, folder, on_bytes)
        write_merge_sidecars(folder, merge, stock, plan)

    return write
