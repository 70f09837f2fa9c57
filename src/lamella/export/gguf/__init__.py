"""GGUF files for llama.cpp, whose architectures glm4moe and step35 compute what a converted model does."""

from __future__ import annotations

from lamella.checkpoint.plan import WritePlan
from lamella.errors import UserError, did_you_mean
from lamella.export.gguf.architectures import describe, needs
from lamella.export.gguf.tokenizer import tokenizer_metadata
from lamella.export.gguf.write import DTYPES, own_dtype
from lamella.export.model import ConvertedModel
from lamella.export.target import Options

__all__ = ["needs", "plan"]


def plan(model: ConvertedModel, options: Options) -> WritePlan:
    """Tensors by llama.cpp's names and the file's metadata; dtype and file name are in the notes.

    Raises:
        UserError: an unknown dtype, or a tokenizer that cannot be written.
    """
    dtype = options.dtype or own_dtype(model.dtype)
    if dtype not in DTYPES:
        raise UserError(f"unknown GGUF dtype {dtype!r}{did_you_mean(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    metadata, tensors, tricks = describe(model)
    metadata |= {"general.name": model.folder.resolve().name, "general.file_type": DTYPES[dtype]}
    metadata |= tokenizer_metadata(model, options.tokenizer)
    notes = {"tricks": tricks, "dtype": dtype, "file": f"{model.folder.resolve().name}-{dtype}.gguf"}
    return WritePlan(tensors, metadata, notes=notes)
