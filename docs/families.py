"""The page of the families, measured: a tiny model of each is converted, trained and exported, beside transformers.

Run: uv run python docs/families.py [FAMILY ...]      (writes docs/families.md; with names it prints their rows alone)
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lamella.architecture.not_held import NOT_HELD
from lamella.architecture.rows import FAMILIES
from lamella.conversion import convert
from lamella.errors import UserError
from lamella.export import export
from lamella.hf.models import load
from lamella.recipe.conversion import load_conversion
from support.models import KIN, LLAMA3_ROPE, TRAINABLE_FAMILIES, TWO_MATRIX, VOCAB, save_tokenizer, tiny_checkpoint

PAGE = Path(__file__).with_name("families.md")
EXACT, REFUSED, NONE, RUNS = "exact", "refused", "–", "runs"
LENGTH = 48
"""Tokens: past every window (7) and threshold of a rope (16 or 32)."""
CLOSE = 5e-5  # fp32, logits of order 1 to 10, sums in another order
WINDOW = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
BIASES = ("attention_bias", "attention_out_bias", "use_qkv_bias")
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 16, "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
    "llama3": LLAMA3_ROPE | {"original_max_position_embeddings": 16},
}  # fmt: skip
PLAINEST = {"attention_bias": False, "sliding_window": None}
"""What exports are asked for: what else a format holds or refuses is said by `lamella export`."""
CALIBRATION = "calibration={num_tokens: 128, sequence_length: 64}"
METHODS = {
    "slices": ("slice", "slices=4"),
    "upcycling": ("upcycle", "experts=4", "top_k=2"),
    "partition, all parts": (
        "partition", "parts=4", "active=4", "neurons=contiguous", "router=random", "shared=1", "output=plain",
    ),
}  # fmt: skip


class Tiny:
    """A family's tiny model, what was made of it, and where."""

    def __init__(self, family: str, folder: Path):
        self.family, self.folder, self.count = family, folder, 0
        self.own = {"vocab_size": VOCAB} | TRAINABLE_FAMILIES.get(family, {}) | KIN.get(family, {})
        self.fields = {field.name for field in fields(CONFIG_MAPPING[family])}

    def dense(self, dtype: torch.dtype = torch.float32, sharded: bool = False, **changes: Any) -> Path:
        self.count += 1
        folder = self.folder / f"dense-{self.count}"
        return save_tokenizer(tiny_checkpoint(folder, self.family, sharded, dtype, **self.own | changes))

    def converted(self, dense: Path, *words: str) -> Path:
        self.count += 1
        out = self.folder / f"moe-{self.count}"
        convert(dense, out, load_conversion(None, [f"method={words[0]}", *words[1:]]).options)
        return out


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def plain(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def compared(found: torch.Tensor, expected: torch.Tensor) -> str:
    """EXACT; AssertionError for anything else, which is a fault and not a cell."""
    difference = (found - expected).abs().max().item()
    assert difference < CLOSE, difference
    assert expected.std() > 0.02
    return EXACT


def cell(measure: Callable[[], str]) -> str:
    """What came of it; REFUSED where lamella said no, NONE where transformers has no such model."""
    try:
        return measure()
    except UserError:
        return REFUSED
    except NoSuchModel:
        return NONE


class NoSuchModel(Exception):
    """transformers refuses it, or cannot compute it."""


def abilities(tiny: Tiny) -> Iterator[tuple[str, str]]:
    """(column, cell): what can be done with the family."""
    from support.titan import load_titan  # seconds that the reader of a page does not pay

    dense = tiny.dense()
    expected, made = plain(dense), {}
    for name, words in METHODS.items():
        made[name] = tiny.converted(dense, *words)
        yield name, compared(logits(load(made[name], torch.float32)), expected)
    yield "partition, half", cell(lambda: _partition(tiny, dense))
    yield "dense again", cell(lambda: _dense_again(tiny, dense, made["slices"]))
    yield "attention experts", cell(lambda: _attention_experts(tiny, dense, expected))
    yield "train", cell(lambda: compared(logits(load_titan(made["slices"])), expected))
    wanted = PLAINEST if FAMILIES[tiny.family].llama_like else {}
    plainest = {key: value for key, value in wanted.items() if key in tiny.fields} | {"vocab_size": VOCAB + 1}
    for target, source in (("glm4-moe", "slices"), ("mixtral", "upcycling"), ("gguf", "slices")):
        moe = with_merges(tiny.converted(tiny.dense(**plainest), *METHODS[source]))
        yield f"to {target}", cell(lambda moe=moe, target=target: _exported(tiny, moe, target))


def _partition(tiny: Tiny, dense: Path) -> str:
    """With the default choices, calibrated on text and sequential; the model then is another one than the dense."""
    out = tiny.converted(dense, "partition", "parts=4", "active=2", CALIBRATION)
    assert logits(load(out, torch.float32)).isfinite().all()
    return RUNS


def _dense_again(tiny: Tiny, dense: Path, moe: Path) -> str:
    export(moe, "dense", tiny.folder / "back", check=False)
    source, back = (load_file(folder / "model.safetensors") for folder in (dense, tiny.folder / "back"))
    assert source.keys() == back.keys()
    assert all(torch.equal(source[name].view(torch.int32), back[name].view(torch.int32)) for name in source)
    return "same bits"


def _attention_experts(tiny: Tiny, dense: Path, expected: torch.Tensor) -> str:
    model = load(tiny.converted(dense, "attention"), torch.float32)
    model.set_mode("dense")
    return compared(logits(model), expected)


def with_merges(folder: Path) -> Path:
    """llama.cpp wants a tokenizer that merges something."""
    file = folder / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["model"]["vocab"]["th"] = VOCAB
    saved["model"]["merges"] = [["t", "h"]]
    file.write_text(json.dumps(saved))
    return folder


def _exported(tiny: Tiny, moe: Path, target: str) -> str:
    report = export(moe, target, tiny.folder / target)
    return EXACT if report.max_abs_logit_diff is not None else "not tried"  # no llama.cpp here


def configs(tiny: Tiny) -> Iterator[tuple[str, str]]:
    """(column, cell): which configs and files are sliced exactly."""

    def sliced(**changes: Any) -> str:
        return cell(lambda: _sliced(tiny, **changes))

    window = {key: value for key, value in WINDOW.items() if key in tiny.fields}
    if "layer_types" in tiny.fields:
        window["layer_types"] = MIXED
    yield "windows", sliced(**window) if "sliding_window" in window else NONE
    biases = dict.fromkeys((key for key in BIASES if key in tiny.fields), True)
    yield "biases", sliced(**biases) if biases else NONE
    yield "tied", sliced(tie_word_embeddings=True)
    yield "untied", sliced(tie_word_embeddings=False)
    yield "heads wider", NONE if tiny.family in TWO_MATRIX else sliced(head_dim=16)
    for kind, values in ROPES.items():
        yield f"{kind} rope", sliced(**_rope(tiny, kind, values)) if "rope_parameters" in tiny.fields else NONE
    yield "bf16", sliced(dtype=torch.bfloat16)
    yield "fp16", sliced(dtype=torch.float16)
    yield "several files", sliced(sharded=True)


def _rope(tiny: Tiny, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": kind, "rope_theta": 10000.0} | values
    longest = 32 if kind == "dynamic" else 64
    own = tiny.own.get("rope_parameters", {})
    if "partial_rotary_factor" in own:
        rope["partial_rotary_factor"] = 1.0
    by_kind = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": rope}
    ropes = by_kind if FAMILIES[tiny.family].ropes_by_kind else rope
    return {"rope_parameters": ropes, "max_position_embeddings": longest, "head_dim": 8}


def _sliced(tiny: Tiny, **changes: Any) -> str:
    try:
        dense = tiny.dense(**changes)
        expected = plain(dense)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise NoSuchModel from None
    return compared(logits(load(tiny.converted(dense, *METHODS["slices"]), torch.float32)), expected)


def row(family: str, measure: Callable[[Tiny], Iterator[tuple[str, str]]]) -> dict[str, str]:
    """Column -> cell of one family."""
    with tempfile.TemporaryDirectory() as folder:
        return dict(measure(Tiny(family, Path(folder))))


def table(rows: dict[str, dict[str, str]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(table_row(family, cells) for family, cells in rows.items())])


def table_row(family: str, cells: dict[str, str]) -> str:
    return f"| `{family}` | {' | '.join(cells.values())} |"


def not_trained() -> str:
    """The reasons, as a list."""
    return "\n".join(f"- `{name}`: {f.not_trained}" for name, f in FAMILIES.items() if f.not_trained)


def not_held() -> str:
    """The families that are refused, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in NOT_HELD.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    return "\n".join(f"- {reason}: {', '.join(names)}" for reason, names in reasons.items())


TEXT = """\
# Families

What can be done with a model depends on its family (`model_type` in its `config.json`). This page is measured: for
each family a tiny model with random weights is saved by transformers, converted, loaded and compared with plain
transformers on the dense model, at {length} tokens, past every attention window and rope threshold of it. Made by
`docs/families.py`.

A family's tiny model has what sets it apart (biases, windows, factors); exports are asked for models without biases and
windows in the attention.

- **exact**: the logits are the dense model's (or, for exports, the converted model's), within {close:g} in float32.
- **same bits**: every tensor is the dense file's, bit for bit.
- **runs**: the model is meant to be another one; it is made, with calibration, and its logits are finite.
- **refused**: lamella says no, by name and with the reason, before anything is written.
- **–**: models of the family have no such thing.

## What can be done

{abilities}

Not trained, and why:

{not_trained}

## Which configs and files

Sliced, and compared as above. Windows are 7 tokens, in every second layer where the family can mix them.

{configs}

## Families that are refused

Every causal language model of transformers that is not in the tables is refused by name:

{not_held}
"""


def page() -> str:
    """The whole page; minutes."""
    return TEXT.format(
        length=LENGTH, close=CLOSE, abilities=table({name: row(name, abilities) for name in FAMILIES}),
        configs=table({name: row(name, configs) for name in FAMILIES}), not_trained=not_trained(), not_held=not_held(),
    )  # fmt: skip


def main() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    if names := sys.argv[1:]:
        for name in names:
            print(table_row(name, row(name, abilities)), table_row(name, row(name, configs)), sep="\n", flush=True)
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
