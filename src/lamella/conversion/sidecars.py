"""The small files beside the weights: manifest, model card, and the two lines that transformers imports."""

from __future__ import annotations

from pathlib import Path

from lamella import __version__
from lamella.architecture.converted import REMOTE_CODE, converted_layers
from lamella.architecture.families import Family
from lamella.architecture.layout import ffn_layout
from lamella.checkpoint.check import read_json
from lamella.checkpoint.folder import write_json
from lamella.checkpoint.manifest import MANIFEST
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.remote import AnyPath
from lamella.checkpoint.source import Checkpoint
from lamella.recipe.methods.common import MethodOptions

_REMOTE_CODE = '''"""Imported by transformers with trust_remote_code=True; needs the package `lamella`."""

from lamella.hf.models import {config}, {model}  # noqa: F401
'''

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, lamella]
{licence_line}---
# {name}, as experts

A mixture of fine-grained experts made from **{name}** by lamella {version}, without training.

- Source: {name} ({architecture}); licence: {licence}.
{recipe}
{layers}
- Size: {total_gb:.2f} GB. Hashes of all tensors are in `{manifest}`.

```python
import lamella.hf.models  # or pass trust_remote_code=True
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


def write_sidecars(
    folder: Path, source: Checkpoint, plan: WritePlan, options: MethodOptions, hashes: dict[str, str]
) -> None:
    """config.json, lamella.json, README.md and modeling_lamella.py."""
    write_json(folder / "config.json", plan.config)
    write_json(folder / MANIFEST, manifest(source, plan, options, hashes))
    (folder / "README.md").write_text(model_card(source, plan, options), encoding="utf-8")
    write_remote_code(folder, source.family)


def write_remote_code(folder: Path, family: Family) -> None:
    """modeling_lamella.py"""
    code = _REMOTE_CODE.format(config=family.converted_config_class, model=family.converted_architecture)
    (folder / f"{REMOTE_CODE}.py").write_text(code, encoding="utf-8")


def manifest(source: Checkpoint, plan: WritePlan, options: MethodOptions, hashes: dict[str, str]) -> dict:
    """No time and no output path: equal inputs give equal files."""
    tensors = {t.name: {"dtype": t.dtype, "shape": list(t.shape), "xxh3_128": hashes[t.name]} for t in plan.tensors}
    return provenance(source, options) | plan.notes | {"tensors": tensors}


def provenance(source: Checkpoint, options: MethodOptions) -> dict:
    """What a conversion is made of: two that agree in it have the same tensors."""
    paths = {tensor.path.name: tensor.path for tensor in source.tensors.values()}
    files = {name: path.stat().st_size for name, path in paths.items()}
    return {
        "lamella_version": __version__,
        "source": {
            "model": source.name,
            "architecture": source.family.architecture,
            "licence": source.licence,
            "files": files,
        },
        "recipe": {"method": options.method} | options.to_dict(),
    }


def holds_conversion(folder: AnyPath, source: Checkpoint, options: MethodOptions) -> bool:
    """Whether the folder's manifest says that it is this conversion of this model."""
    if not (folder / MANIFEST).is_file():
        return False
    found = read_json(folder / MANIFEST, "")
    return all(found.get(key) == value for key, value in provenance(source, options).items())


def model_card(source: Checkpoint, plan: WritePlan, options: MethodOptions) -> str:
    entry = plan.config[options.entry]
    layers = (
        f"- Layers with experts: {len(converted_layers(entry))} of {ffn_layout(plan.config).num_layers}; "
        f"{entry['num_experts_per_tok']} experts active per token, gate `{entry['gate']}`."
    )
    if options.entry == "moe":
        layers += f"\n- Experts are {entry['moe_intermediate_size']} neurons wide; routing `{entry['routing']}`."
    return _CARD.format(
        licence_line=f"license: {source.licence}\n" if source.licence else "",
        name=source.name, version=__version__, architecture=source.family.architecture,
        licence=source.licence or "see the source", recipe=options.describe(entry), layers=layers,
        total_gb=plan.total_bytes / 1e9, manifest=MANIFEST,
    )  # fmt: skip
