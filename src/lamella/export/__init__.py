"""Trained MoE checkpoints into what others read: stock architectures, or the dense model again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lamella.architecture.converted import converted_family, converted_tensors, dense_config
from lamella.architecture.families import may_be_stored
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.source import check_tensors, copy_sidecars, read_config, read_folder
from lamella.checkpoint.spelling import both_spellings
from lamella.checkpoint.tensors import SourceTensor
from lamella.checkpoint.write import appearing_folder, check_output, write_json, write_tensors
from lamella.errors import UserError, did_you_mean
from lamella.export.dense import plan_dense
from lamella.export.glm4_moe import plan_glm4_moe
from lamella.jsons import Json

if TYPE_CHECKING:
    from lamella.export.check import Checked

TARGETS: dict[str, Callable[[Json, dict[str, SourceTensor]], WritePlan]] = {
    "glm4-moe": plan_glm4_moe,
    "dense": plan_dense,
}


@dataclass(frozen=True)
class ExportReport:
    out: Path
    architecture: str
    bytes_written: int
    max_abs_logit_diff: float | None
    """Of the reloaded export to its source, fp32; None where it was not asked for."""
    covered: str | None
    """The lengths that were compared, and what they do not show."""


def export(
    folder: str | Path, to: str, out: str | Path, *, overwrite: bool = False, check: bool = True,
    check_tokens: int | None = None,
    on_plan: Callable[[WritePlan], None] = lambda _: None, on_bytes: Callable[[int], None] = lambda _: None,
) -> ExportReport:  # fmt: skip
    """Write a converted checkpoint in another architecture, streaming tensor by tensor, then reload and compare it.

    Args:
        folder: a converted checkpoint, trained or not.
        to: a key of TARGETS.
        check: load source and export in fp32 and compare logits before the folder appears (twice the model in memory).
        check_tokens: length of the compared text; None takes one past every window, within bounds.

    Raises:
        UserError: an unknown target, a model that the target cannot hold exactly, tensors that do not match the
            config, an `out` that cannot be written, or a reloaded export that computes something else.
    """
    if to not in TARGETS:
        raise UserError(f"unknown target {to!r}{did_you_mean(to, TARGETS)}; known: {', '.join(TARGETS)}")
    folder, out = Path(folder), Path(out)
    config = read_config(folder)
    converted_family(config)
    sources = read_folder(folder)
    check_tensors(
        sources, converted_tensors(config), str(folder), lambda name: may_be_stored(name, dense_config(config))
    )
    plan = TARGETS[to](config, sources)
    check_output(out, overwrite, plan.total_bytes, {tensor.path for tensor in sources.values()})
    on_plan(plan)
    with appearing_folder(out) as temporary:
        copy_sidecars(folder, temporary)
        write_tensors(plan, temporary, on_bytes)
        write_json(temporary / "config.json", both_spellings(plan.config))
        (temporary / "README.md").write_text(_card(folder, to, plan), encoding="utf-8")
        checked = _check(folder, temporary, to, check_tokens) if check else None
    difference, covered = (checked.max_abs_logit_diff, checked.spans.describe()) if checked else (None, None)
    return ExportReport(out, plan.config["architectures"][0], plan.total_bytes, difference, covered)


def _check(folder: Path, temporary: Path, to: str, tokens: int | None) -> Checked:
    from lamella.export.check import check_reloaded

    # The dense model is what a converted one computes with its frozen slices alone.
    return check_reloaded(folder, temporary, "dense" if to == "dense" else "routed", tokens)


def _card(folder: Path, to: str, plan: WritePlan) -> str:
    architecture = plan.config["architectures"][0]
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
        f"# {folder.resolve().name}, as {architecture}\n\n"
        f"Exported by lamella to `{to}`: a stock `{architecture}`, no custom code.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```\n'
    )
