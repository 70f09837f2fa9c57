"""The model card of an export: what it is, what it was made of, how near it is to its source, what to know of it."""

from __future__ import annotations

from collections.abc import Sequence

from lamella import __version__
from lamella.checkpoint.check import read_json
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.source import card_licence
from lamella.export.measured import Measured
from lamella.export.model import ConvertedModel
from lamella.jsons import Json

MANIFEST = "lamella.json"

_CARD = """---
{licence_line}{library_line}pipeline_tag: text-generation
tags: [mixture-of-experts, lamella]
---
# {name}, as {architecture}

{what}

- Made by lamella {version} with `--to {to}`, out of a converted {family} model.
{lines}
{usage}"""
_TRANSFORMERS = """
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""
_LAMELLA = """
```bash
lamella generate path/to/this/folder
```
"""
_LLAMA_CPP = """
```bash
llama-server --model {file}
```
"""


def card(
    model: ConvertedModel, to: str, plan: WritePlan, parity: str | None, gguf_file: str | None = None,
    measured: Sequence[Measured] = (),
) -> str:  # fmt: skip
    """README.md of an export.

    Args:
        parity: how the reloaded export compared; None where it was not compared.
        gguf_file: the file's name where it is one for llama.cpp.
        measured: perplexities of the model that was exported.
    """
    manifest = read_json(model.folder / MANIFEST, "") if (model.folder / MANIFEST).is_file() else {}
    source: Json = manifest.get("source") or {}
    licence = source.get("licence") or card_licence(model.folder)
    architecture = plan.config["general.architecture"] if gguf_file else plan.config["architectures"][0]
    lines = [f"- Base model: {source['model']} ({source.get('architecture')})."] if source.get("model") else []
    lines.append(f"- Licence of the base model: {licence or 'not known; see where it came from'}.")
    if recipe := manifest.get("recipe"):
        lines.append(f"- Conversion: {', '.join(f'{key} {value}' for key, value in recipe.items() if value)}.")
    if model.ffn and to != "dense":
        moe = model.ffn
        lines.append(
            f"- Experts: {moe.num_experts} of {moe.moe_intermediate_size} neurons in {len(moe.moe_layers)} layers, "
            f"{moe.num_experts_per_tok} active per token."
        )
    lines.append(f"- Compared with its source: {parity or 'no'}.")
    if measured:
        lines.append("- Perplexity of the source, on text that nothing was fitted to:")
        lines += [f"  - {one.describe()}." for one in measured]
    lines += [f"- To know: {trick}." for trick in plan.notes.get("tricks", [])]
    what, usage = f"A stock `{architecture}`, no custom code.", _TRANSFORMERS
    if gguf_file:
        what, usage = "A GGUF file for llama.cpp.", _LLAMA_CPP.format(file=gguf_file)
    elif to == "lamella":
        what, usage = f"Frozen experts in {plan.config['moe']['frozen_dtype']}, which lamella reads.", _LAMELLA
    return _CARD.format(
        licence_line=f"license: {licence}\n" if licence else "", name=model.folder.resolve().name,
        library_line="" if gguf_file else "library_name: transformers\n", architecture=architecture, what=what,
        version=__version__, to=to, family=model.family.name, lines="\n".join(lines),
        usage=usage,
    )  # fmt: skip
