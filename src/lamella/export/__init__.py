"""Trained MoE checkpoints into what others read: stock architectures, GGUF, or the dense model again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lamella.architecture.moe import Mode
from lamella.checkpoint.folder import appearing_folder, check_output
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.source import LICENCE_FILES, copy_sidecars
from lamella.errors import UserError, check_choice, did_you_mean
from lamella.export import dense, ernie, gguf, glm4_moe, mixtral, qwen_moe, rounded
from lamella.export.card import card
from lamella.export.measured import Measured
from lamella.export.model import ConvertedModel
from lamella.export.target import Options, Target, stock

if TYPE_CHECKING:
    from lamella.export.check import Checked


def _check_gguf(source: Path, exported: Path, mode: Mode, tokens: int | None) -> Checked | None:
    from lamella.export.gguf.check import check_gguf

    return check_gguf(source, exported, mode, tokens)


def _check_rounded(source: Path, exported: Path, mode: Mode, tokens: int | None) -> Checked:
    from lamella.export.check import check_rounded

    return check_rounded(source, exported, mode, tokens)


# In the order in which `auto` tries them; `dense` is another model, `lamella` one in fewer bits, and never tried.
TARGETS = {
    "glm4-moe": Target(glm4_moe.needs, stock(glm4_moe.plan)),
    "mixtral": Target(mixtral.needs, stock(mixtral.plan)),
    "qwen3-moe": Target(qwen_moe.qwen3_needs, stock(qwen_moe.qwen3_plan)),
    "qwen2-moe": Target(qwen_moe.qwen2_needs, stock(qwen_moe.qwen2_plan)),
    "ernie": Target(ernie.needs, stock(ernie.plan)),
    "gguf": Target(
        gguf.needs,
        gguf.plan,
        write=gguf.write_file,
        check=_check_gguf,
        sidecars=LICENCE_FILES,
    ),
    "dense": Target(dense.needs, stock(dense.plan), mode="dense", loses=dense.loses),
    "lamella": Target(rounded.needs, rounded.plan, write=rounded.write, check=_check_rounded),
}
AUTO = "auto"
_NOT_AUTO = ("dense", "gguf", "lamella")


@dataclass(frozen=True)
class ExportReport:
    """What an export has written, and how far the reloaded result is from its source."""

    out: Path
    """The folder or file that was written."""
    target: str
    """A key of TARGETS, also where `auto` was asked for."""
    architecture: str
    """The class that loads the export: transformers' name of it, or llama.cpp's."""
    bytes_written: int
    max_abs_logit_diff: float | None
    """The largest absolute difference of any logit between source and reloaded export, both computed in float32; None
    where the check was not asked for."""
    parity: str | None
    """One line that says what the comparison found, and which lengths of text it covers and which it does not; None
    where the check was not asked for."""


def export(
    folder: str | Path, to: str, out: str | Path, *, overwrite: bool = False, check: bool = True,
    check_tokens: int | None = None, mode: str | None = None, dtype: str | None = None,
    tokenizer: str | Path | None = None, max_shard_size: str | None = None, measured: Sequence[Measured] = (),
    on_plan: Callable[[WritePlan], None] = lambda _: None, on_bytes: Callable[[int], None] = lambda _: None,
) -> ExportReport:  # fmt: skip
    """Write a converted checkpoint in another architecture, streaming tensor by tensor, then reload and compare it.

    Args:
        folder: a converted checkpoint, trained or not.
        to: a key of TARGETS, or "auto" for the first stock class that holds the model.
        check: load source and export in fp32 and compare logits before the folder appears (twice the model in memory).
        check_tokens: length of the compared text; None takes one past every window, within bounds.
        mode: "dense" takes the dense model out of one whose router chooses trained experts; None refuses that.
        dtype, tokenizer, max_shard_size: as in `lamella.export.target.Options`.
        measured: perplexities for the model card.

    Raises:
        UserError: an unknown target, a model that the target cannot hold exactly, tensors that do not match the
            config, an `out` that cannot be written, or a reloaded export that computes something else.
    """
    if to not in TARGETS and to != AUTO:
        raise UserError(f"unknown target {to!r}{did_you_mean(to, TARGETS)}; known: {', '.join([AUTO, *TARGETS])}")
    options = Options.parse(dtype, tokenizer, max_shard_size)
    model, out = ConvertedModel.open(Path(folder), options.dtype), Path(out)
    to = _chosen(model) if to == AUTO else _fitting(model, to, mode)
    target = TARGETS[to]
    if mode not in (None, target.mode):
        check_choice("mode", mode, get_args(Mode))
        raise UserError(
            f"--mode {mode} has no effect on --to {to}, which computes the model {target.mode}; leave it out"
        )
    plan = target.plan(model, options)
    check_output(
        out,
        overwrite,
        plan.notes.get("needed_bytes", plan.total_bytes),
        {tensor.path for tensor in model.tensors.values()},
    )
    on_plan(plan)
    with appearing_folder(out) as temporary:
        copy_sidecars(model.folder, temporary, target.sidecars)
        target.write(plan, temporary, on_bytes)
        checked = target.check(model.folder, temporary, target.mode, check_tokens) if check else None
        parity = checked.describe() if checked else None
        gguf_file = next((file.name for file in temporary.glob("*.gguf")), None)
        num_bytes = (temporary / gguf_file).stat().st_size if gguf_file else plan.total_bytes
        (temporary / "README.md").write_text(card(model, to, plan, parity, gguf_file, measured), encoding="utf-8")
    architecture = plan.config["general.architecture"] if gguf_file else plan.config["architectures"][0]
    difference = checked.max_abs_logit_diff if checked else None
    return ExportReport(out, to, architecture, num_bytes, difference, parity)


def fitting_targets(model: ConvertedModel) -> list[str]:
    """The targets that hold this model exactly."""
    exact = {name: target for name, target in TARGETS.items() if name != "lamella"}
    return [name for name, target in exact.items() if not target.needs(model) and not target.loses(model)]


def _chosen(model: ConvertedModel) -> str:
    """The first stock class that holds the model."""
    problems = {}
    for name, target in TARGETS.items():
        if name in _NOT_AUTO:
            continue
        problems[name] = target.needs(model)
        if not problems[name]:
            return name
    reasons = "; ".join(f"{name}: {', '.join(found)}" for name, found in problems.items())
    raise UserError(f"no stock class holds this model exactly ({reasons}){_possible(model)}")


def _fitting(model: ConvertedModel, to: str, mode: str | None) -> str:
    target = TARGETS[to]
    if problems := target.needs(model) or ([] if mode == target.mode else target.loses(model)):
        raise UserError(f"{to} cannot hold this model exactly: {'; '.join(problems)}{_possible(model)}")
    return to


def _possible(model: ConvertedModel) -> str:
    possible = fitting_targets(model)
    return f"; possible here: {', '.join(possible)}" if possible else ""
