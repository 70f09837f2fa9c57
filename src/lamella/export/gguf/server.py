"""llama.cpp's own server for one GGUF file, through the package `xllamacpp`, until the process is ended.

Run by `lamella serve-model`: python server.py '{"model": "MODEL.gguf", "name": ..., "port": ..., "context": ...}'
"""

from __future__ import annotations

import json
import os
import signal
import sys


def main(asked: str) -> None:
    """Listen on loopback alone; `context` 0 is the model's own length."""
    import xllamacpp

    settings = json.loads(asked)
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.model_alias = {settings["name"]}
    params.hostnames, params.port = ["127.0.0.1"], settings["port"]
    params.n_ctx, params.n_parallel, params.use_jinja = settings["context"], 1, True
    if threads := int(os.environ.get("OMP_NUM_THREADS") or 0):
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # before the server's threads are made, which inherit it
    server = xllamacpp.Server(params)
    print(f"llama.cpp answers on {server.listening_address}", file=sys.stderr, flush=True)
    signal.sigwait(ENDING)
    os._exit(0)  # its threads need not be waited for


ENDING = {signal.SIGINT, signal.SIGTERM}

if __name__ == "__main__":
    main(sys.argv[1])
