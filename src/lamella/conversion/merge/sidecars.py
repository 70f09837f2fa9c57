"""The small files beside the weights of a merge into a stock class: config, manifest, model card."""

from __future__ import annotations

from pathlib import Path

from lamella import __version__
from lamella.checkpoint.folder import write_json
from lamella.checkpoint.manifest import MANIFEST
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.source import Checkpoint
from lamella.conversion.merge.parts import Merge
from lamella.conversion.merge.targets import Stock
from lamella.conversion.sidecars import provenance

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, merge, lamella]
{licence_line}---
# {name}, a mixture of {count} models

A stock `{architecture}`, no custom code: the FFNs of {count} models are its experts, {active} of {total} for each
token; everything else comes from **{base}**. Made by lamella {version}, without training.

{recipe}
{sources}
- Size: {total_gb:.2f} GB.
{remarks}{gates}
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


def write_merge_sidecars(folder: Path, merge: Merge, stock: Stock, plan: WritePlan) -> None:
    """config.json, lamella.json and README.md."""
    write_json(folder / "config.json", plan.config)
    found = provenance(merge.base, merge.options)
    found["experts"] = [provenance(expert.source, merge.options)["source"] for expert in merge.all_experts]
    write_json(folder / MANIFEST, found | plan.notes)
    (folder / "README.md").write_text(card(merge, stock, plan), encoding="utf-8")


def card(merge: Merge, stock: Stock, plan: WritePlan) -> str:
    """README.md of a merge."""
    licence = merge.base.licence
    sources = {source.name: source for source in (merge.base, *(e.source for e in merge.all_experts))}
    return _CARD.format(
        licence_line=f"license: {licence}\n" if licence else "", name=Path(merge.base.name).name,
        count=len({expert.source.name for expert in merge.experts}), architecture=stock.architecture,
        active=merge.moe.num_experts_per_tok, total=merge.moe.num_experts, base=merge.base.name, version=__version__,
        recipe=merge.options.describe({}), sources="\n".join(map(_licence, sources.values())),
        total_gb=plan.total_bytes / 1e9,
        remarks="".join(f"- To know: {remark}.\n" for remark in plan.notes["remarks"]),
        gates=_gates(plan),
    )  # fmt: skip


def _licence(source: Checkpoint) -> str:
    return f"- Licence of {source.name}: {source.licence or 'not known; see where it came from'}."


def _gates(plan: WritePlan) -> str:
    summary = plan.notes.get("gates", {}).get("summary")
    return f"- Routing of the prompts: {summary}.\n" if summary else ""
