"""What a target of the export is: the row that a format has in the table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lamella.architecture.moe import Mode
from lamella.checkpoint.plan import MAX_SHARD_BYTES, OutputTensor, WritePlan
from lamella.checkpoint.sizes import bytes_of
from lamella.checkpoint.source import SIDECARS
from lamella.checkpoint.spelling import both_spellings
from lamella.checkpoint.tensors import ITEM_BYTES
from lamella.checkpoint.write import write_json, write_tensors
from lamella.errors import UserError, did_you_mean
from lamella.export.model import ConvertedModel

if TYPE_CHECKING:
    from lamella.export.check import Checked

Write = Callable[[WritePlan, Path, Callable[[int], None]], None]
Check = Callable[[Path, Path, Mode, int | None], "Checked | None"]


# What the weights of a stock class can be stored as, by safetensors' codes.
STOCK_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Routing decides by small differences: these are never narrowed.
_ROUTERS = (".gate.weight", "e_score_correction_bias")


@dataclass(frozen=True)
class Options:
    """What only some formats can be told."""

    dtype: str | None = None
    """Of the weights: a key of STOCK_DTYPES, in a GGUF file also one such as "Q8_0"; None: the model's own."""
    tokenizer: Path | None = None
    """A GGUF file whose tokenizer is copied; None: made from the model's tokenizer.json."""
    max_shard_bytes: int | None = None
    """The most bytes of one file of weights; None: the usual 5 GB."""

    @classmethod
    def parse(cls, dtype: str | None, tokenizer: str | Path | None, max_shard_size: str | None) -> Options:
        """From words such as "bf16" and "2GB"; UserError for what is no size."""
        size = None if max_shard_size is None else parse_size(max_shard_size)
        return cls(dtype.upper() if dtype else None, Path(tokenizer) if tokenizer else None, size)


def parse_size(text: str) -> int:
    """'2GB', '500MB' or '1.5GiB' in bytes; UserError for what is no size, or none that a file could have."""
    size = bytes_of(text) if re.search(r"[KMG]I?B\s*$", text.upper()) else None  # of a few bytes no file can be
    if not size:
        raise UserError(f"the largest size of a file is {text!r}; write a size such as 2GB or 500MB")
    return size


def write_stock(plan: WritePlan, folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Safetensors files and config.json."""
    write_tensors(plan, folder, on_bytes)
    write_json(folder / "config.json", both_spellings(plan.config))


def check_stock(source: Path, exported: Path, mode: Mode, tokens: int | None) -> Checked:
    """As `lamella.export.check.check_reloaded`, which needs torch."""
    from lamella.export.check import check_reloaded

    return check_reloaded(source, exported, mode, tokens)


@dataclass(frozen=True)
class Target:
    """A format that others read."""

    needs: Callable[[ConvertedModel], list[str]]
    """What the model has that the format cannot hold, as clauses; none: it holds the model exactly."""
    plan: Callable[[ConvertedModel, Options], WritePlan]
    """The tensors and the description of a model that fits. `notes["tricks"]` says what a reader should know."""
    mode: Mode = "routed"
    """What of the converted model it computes."""
    loses: Callable[[ConvertedModel], list[str]] = lambda _: []
    """What the model computes that the format leaves out: refused, unless the user asked for this mode."""
    write: Write = write_stock
    check: Check = check_stock
    """None as its answer: what reads the format is not installed."""
    sidecars: tuple[str, ...] = SIDECARS
    """Files of the model that are copied along."""


def stock(plan: Callable[[ConvertedModel], WritePlan]) -> Callable[[ConvertedModel, Options], WritePlan]:
    """The plan of a transformers class, whose tensors are stored as the options say."""

    def planned(model: ConvertedModel, options: Options) -> WritePlan:
        if options.tokenizer is not None:
            raise UserError("--tokenizer is for --to gguf; other targets keep the model's own")
        made = dataclasses.replace(plan(model), max_shard_bytes=options.max_shard_bytes or MAX_SHARD_BYTES)
        return made if options.dtype is None else _stored_as(made, options.dtype)

    return planned


def _stored_as(plan: WritePlan, dtype: str) -> WritePlan:
    if dtype not in STOCK_DTYPES:
        near = did_you_mean(dtype, STOCK_DTYPES)
        raise UserError(
            f"unknown dtype {dtype!r}{near}; known: {', '.join(STOCK_DTYPES)}; for others take --to gguf, or"
            " --to lamella"
        )
    config = {key: value for key, value in plan.config.items() if key != "torch_dtype"}
    tensors = [_as_dtype(tensor, dtype) for tensor in plan.tensors]
    return dataclasses.replace(plan, tensors=tensors, config=config | {"dtype": STOCK_DTYPES[dtype]})


def _as_dtype(tensor: OutputTensor, dtype: str) -> OutputTensor:
    if tensor.name.endswith(_ROUTERS) and ITEM_BYTES[dtype] < ITEM_BYTES[tensor.dtype]:
        return tensor
    return dataclasses.replace(tensor, dtype=dtype)
