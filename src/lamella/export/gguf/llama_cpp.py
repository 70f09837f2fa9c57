"""A GGUF file computed by llama.cpp (the package `xllamacpp`), in a process of its own: a file that llama.cpp does not
like ends the process that opens it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeAlias

import httpx
import numpy as np

from lamella.export.apart import find_apart, path_with
from lamella.export.gguf import server
from lamella.jsons import Json

Post: TypeAlias = Callable[[str, Json], Json]
TIMEOUT_S = 3600
WHOLE_VOCABULARY = 1 << 20


def find() -> str | None:
    """As `lamella.export.apart.find_apart`, of `xllamacpp`."""
    return find_apart("xllamacpp", "LAMELLA_XLLAMACPP", "xllamacpp")


@contextmanager
def running(model: Path, context: int, slots: int = 1) -> Iterator[str]:
    """The address of llama.cpp's server for a file while it runs; it computes in fp32, keys and values too.

    Args:
        context: tokens of a prompt and its answer.
        slots: prompts that are computed together.

    Raises:
        RuntimeError: llama.cpp does not load the file; the message is its first error.
    """
    folder = find()
    assert folder is not None, "xllamacpp is not installed"
    asked = {"model": str(model), "name": model.stem, "port": 0, "context": context * slots, "slots": slots}
    threads = os.environ.get("OMP_NUM_THREADS") or "1"
    environment = os.environ | path_with(folder) | {"OMP_NUM_THREADS": threads}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, server.__file__, json.dumps(asked | {"measure": True})],
            env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            yield _address(process, log)
        finally:
            process.kill()
            process.communicate()


def _address(process: subprocess.Popen, log: IO[str]) -> str:
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        ended = process.poll() is not None
        log.seek(0)
        said = log.read()
        if line := re.search(f"{server.ANSWERS}(.+)\n", said):
            return line[1]
        if ended:
            raise RuntimeError(_reason(said))
        time.sleep(0.02)
    raise RuntimeError(f"it does not answer after {TIMEOUT_S} s")


def _reason(said: str) -> str:
    """The line of llama.cpp's log that says why."""
    lines = [line.strip() for line in said.splitlines()]
    errors = [line for line in lines if " E " in line] or [line for line in lines if "Error" in line]
    return errors[0] if errors else "it ended without a word"


def log_probabilities(model: Path, prompts: list[list[int] | str]) -> np.ndarray:
    """[prompts, V] float32: of the token after each prompt, which is token ids or a text.

    Raises:
        RuntimeError: llama.cpp did not load or compute the file; the message is its first error.
    """
    with (
        running(model, max(len(prompt) for prompt in prompts) + 8) as address,
        httpx.Client(base_url=address, timeout=TIMEOUT_S) as client,
    ):

        def post(path: str, asked: Json) -> Json:
            answer: Json = client.post(path, json=asked).json()
            if "error" in answer:
                raise RuntimeError(str(answer["error"])[:500])
            return answer

        rows = []
        for prompt in prompts:
            found = candidates(post, prompt, WHOLE_VOCABULARY)
            row = np.full(max(found) + 1, -np.inf, np.float32)  # llama.cpp leaves out what has no probability
            row[list(found)] = list(found.values())
            rows.append(row)
        return np.stack(rows)


def candidates(post: Post, prompt: list[int] | str, count: int, slot: int = -1) -> dict[int, float]:
    """{token id: log-probability} of the `count` likeliest next tokens, the likeliest first."""
    # The token that is drawn must be text: a part of a character comes without probabilities.
    found = drawn(post, prompt, count, ["e", 1e4], slot)
    return {row["id"]: row["logprob"] for row in found["top_logprobs"]} if found else {}


def drawn(post: Post, prompt: list[int] | str, count: int, bias: list, slot: int = -1) -> Json | None:
    """What llama.cpp's server says of the token that it draws after a prompt: probabilities before any sampling.

    Args:
        post: sends a request to a path of the server, and gives the answer.
        count: likeliest tokens to be told of.
        bias: [token id or text, bias]: what is added to the log-odds when the token is drawn.
        slot: where keys and values of a prompt before this one may lie; -1: the server chooses.

    Returns:
        {id, logprob, top_logprobs}, or None where the token that was drawn is a part of a character.
    """
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": count, "temperature": 0, "cache_prompt": True}
    answer = post("/completion", asked | {"logit_bias": [bias], "id_slot": slot})
    return (answer.get("completion_probabilities") or [None])[0]
