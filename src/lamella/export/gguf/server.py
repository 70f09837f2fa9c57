"""llama.cpp's own server for one GGUF file, through the package `xllamacpp`, until the process is ended.

Run by `lamella serve-model` and `lamella.export.gguf.llama_cpp.running`:
python server.py '{"model": "MODEL.gguf", "name": ..., "port": ..., "context": ..., "measure": false, "slots": 1}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any


def main(asked: str) -> None:
    """Listen on loopback alone.

    Of the settings, `context` 0 is the model's own length; port 0 is one that is free. With `measure` the server
    computes in fp32, keys and values too, and ends when its standard input does.
    """
    import xllamacpp

    settings = json.loads(asked)
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.model_alias = {settings["name"]}
    params.hostnames, params.port = ["127.0.0.1"], settings["port"]
    params.n_ctx, params.n_parallel, params.use_jinja = settings["context"], settings.get("slots", 1), True
    if settings.get("measure"):
        _exactly(params, xllamacpp)
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    if threads := int(os.environ.get("OMP_NUM_THREADS") or 0):
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # before the server's threads are made, which inherit it
    server = xllamacpp.Server(params)
    sys.stderr.write(f"{ANSWERS}{server.listening_address}\n")  # in one piece: llama.cpp's threads write there, too
    sys.stderr.flush()
    signal.sigwait(ENDING)
    os._exit(0)  # its threads need not be waited for


def _exactly(params: Any, xllamacpp: Any) -> None:
    """Nothing is rounded below fp32, and what a prompt has in common with the one before is never computed twice."""
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.n_gpu_layers, params.cache_ram_mib = False, 0, 0
    params.kv_unified, params.swa_full = False, True


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


ANSWERS = "llama.cpp answers on "
ENDING = {signal.SIGINT, signal.SIGTERM}

if __name__ == "__main__":
    main(sys.argv[1])
