"""GGUF files for llama.cpp, whose architectures glm4moe and step35 compute what a converted model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lamella.checkpoint.plan import WritePlan
from lamella.errors import UserError, did_you_mean
from lamella.export.gguf.architectures import describe, needs
from lamella.export.gguf.quantise import K_QUANTS, require_tool, run_tool
from lamella.export.gguf.tokenizer import tokenizer_metadata
from lamella.export.gguf.write import DTYPES, own_dtype, write_gguf
from lamella.export.model import ConvertedModel
from lamella.export.target import Options
from lamella.jsons import Json

__all__ = ["needs", "plan", "write_file"]


def plan(model: ConvertedModel, options: Options) -> WritePlan:
    """Tensors by llama.cpp's names and the file's metadata; dtype and file name are in the notes.

    Raises:
        UserError: an unknown dtype, or a tokenizer that cannot be written.
    """
    if options.max_shard_bytes is not None:
        raise UserError("--max-shard-size is for files of transformers; a GGUF file is one file")
    own, name = own_dtype(model.dtype), model.folder.resolve().name
    dtype = options.dtype or own
    if dtype not in (known := [*DTYPES, *K_QUANTS]):
        raise UserError(f"unknown GGUF dtype {dtype!r}{did_you_mean(dtype, known)}; known: {', '.join(known)}")
    # llama.cpp's own tool makes K-quants, out of a file that holds the weights as they are
    tool = require_tool(dtype) if dtype in K_QUANTS else None
    written = own if tool else dtype
    metadata, tensors, tricks = describe(model)
    metadata |= {"general.name": name, "general.file_type": DTYPES[written]}
    metadata |= tokenizer_metadata(model, options.tokenizer)
    notes: Json = {"tricks": tricks, "dtype": written, "file": f"{name}-{written}.gguf"}
    plan = WritePlan(tensors, metadata, notes=notes)
    if tool:
        notes |= {"quantise": (tool, dtype, f"{name}-{dtype}.gguf"), "needed_bytes": 2 * plan.total_bytes}
    return plan


def write_file(plan: WritePlan, folder: Path, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write the file, and quantise it where the plan says so."""
    write_gguf(plan, folder, on_bytes)
    if (quantise := plan.notes.get("quantise")) is not None:
        tool, dtype, file = quantise
        run_tool(tool, folder / plan.notes["file"], folder / file, dtype)
        (folder / plan.notes["file"]).unlink()
