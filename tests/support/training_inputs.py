"""Texts, conversations and models that runs of the tests begin with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_texts(folder: Path, text: str, characters: int = 4000) -> None:
    """A folder of documents, of which some are held out."""
    folder.mkdir()
    for number, start in enumerate(range(0, len(text), characters)):
        (folder / f"{number:03}.md").write_text(text[start : start + characters])


def write_half_models(folder: Path) -> None:
    """The same weights, rounded to bfloat16, in a file of bfloat16 and in one of float32."""
    rounded = {name: t.bfloat16() for name, t in load_file(folder / "twin-model" / "model.safetensors").items()}
    for name, dtype in (("half-model", torch.bfloat16), ("half-in-float32", torch.float32)):
        shutil.copytree(folder / "twin-model", folder / name)
        tensors = {key: t.float() if "selection_bias" in key else t.to(dtype) for key, t in rounded.items()}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "lamella.json").unlink(missing_ok=True)  # its hashes are the other file's
        config = json.loads((folder / name / "config.json").read_text())
        config |= {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in config}
        (folder / name / "config.json").write_text(json.dumps(config))


def write_conversations(folder: Path) -> None:
    template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    (folder / "twin-model" / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    with (folder / "chat.jsonl").open("w") as file:
        for i in range(200):
            turns = [{"role": "user", "content": f"{i % 10}?"}, {"role": "assistant", "content": "yes, indeed"}]
            file.write(json.dumps({"messages": turns}) + "\n")
