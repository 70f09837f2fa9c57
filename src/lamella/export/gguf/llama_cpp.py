"""A GGUF file computed by llama.cpp (the package `xllamacpp`), in a process of its own: a file that llama.cpp does not
like ends the process that opens it.

Run by `log_probabilities`: python llama_cpp.py MODEL.gguf PROMPTS.json OUT.npy
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

TIMEOUT_S = 3600


def find() -> str | None:
    """As `lamella.export.apart.find_apart`, of `xllamacpp`."""
    from lamella.export.apart import find_apart

    return find_apart("xllamacpp", "LAMELLA_XLLAMACPP", "xllamacpp")


def log_probabilities(model: Path, prompts: list[list[int] | str]) -> np.ndarray:
    """[prompts, V] float32: of the token after each prompt, which is token ids or a text.

    Raises:
        RuntimeError: llama.cpp did not load or compute the file; the message is its first error.
    """
    folder = find()
    assert folder is not None, "xllamacpp is not installed"
    environment = os.environ | ({"PYTHONPATH": folder} if folder else {})
    with tempfile.TemporaryDirectory() as temporary:
        asked, answer = Path(temporary) / "prompts.json", Path(temporary) / "answer.npy"
        asked.write_text(json.dumps(prompts))
        words = [sys.executable, __file__, str(model), str(asked), str(answer)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode or not answer.is_file():
            raise RuntimeError(_reason(done.stderr))
        return np.load(answer)


def _reason(said: str) -> str:
    """The line of llama.cpp's log that says why."""
    lines = [line.strip() for line in said.splitlines()]
    errors = [line for line in lines if " E " in line] or [line for line in lines if "Error" in line]
    return errors[0] if errors else "it ended without a word"


def main(model: str, asked: str, answer: str) -> None:
    """In the process of its own: computed in fp32, keys and values kept in fp32 too."""
    import xllamacpp

    prompts = json.loads(Path(asked).read_text())
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_ctx = max(len(prompt) for prompt in prompts) + 8
    params.n_parallel, params.warmup, params.n_gpu_layers = 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    params.port = 0
    server = xllamacpp.Server(params)
    np.save(answer, np.stack([_after(server, prompt) for prompt in prompts]))
    os._exit(0)  # its threads need not be waited for


def _after(server: Any, prompt: list[int] | str) -> np.ndarray:
    """[V] log-probabilities of the next token; those that llama.cpp leaves out are minus infinity."""
    # The probabilities are those before sampling. The token that is drawn must be text: one that ends the text, or is
    # a part of a character, comes without them.
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 1 << 20, "logit_bias": [["e", 1e4]], "cache_prompt": True}
    result = server.handle_completions(request)
    result = json.loads(result) if isinstance(result, str) else result
    if "choices" not in result or not result["choices"][0].get("logprobs"):
        raise RuntimeError(str(result)[:500])
    found = result["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    values = np.full(max(entry["id"] for entry in found) + 1, -np.inf, np.float32)
    values[[entry["id"] for entry in found]] = [entry["logprob"] for entry in found]
    return values


if __name__ == "__main__":
    main(*sys.argv[1:])
