"""`lamella generate`: answers to prompts as they are written, or a conversation on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from transformers.utils import logging as transformers_logging

from lamella.errors import UserError
from lamella.evaluate.checkpoints import check_json_path, lower, write_json
from lamella.generation import Counts, Generated, Generator, Message
from lamella.generation.sampling import Sampling
from lamella.hf.offload import expert_cache
from lamella.hf.packing import packed_bytes

END_OF_CHAT = ("/bye", "/exit")


def run(
    folder: str,
    prompts: Sequence[str],
    prompt_file: Path | None,
    sampling: Sampling,
    *,
    chat: bool,
    system: str | None,
    json_path: Path | None,
    dtype: str,
    device: str,
    expert_memory: str | None = None,
    experts_on: str = "disk",
    slices: str = "stored",
    top_k: int | None = None,
    twins: float | None = None,
    draft: str | None = None,
    draft_tokens: int = 4,
    draft_dtype: str = "auto",
) -> None:
    """Print the answers; without a prompt hold a conversation with who writes lines to this command.

    Args:
        prompts: several are computed together.
        chat: prompts are what a user says, each in a conversation of its own.
        top_k, twins: see `lamella.evaluate.checkpoints.lower`.
        draft, draft_tokens, draft_dtype: see `Generator.use_draft`.
    """
    check_json_path(json_path)
    prompts = [*prompts, *_lines(prompt_file)]
    if draft is None and (draft_tokens, draft_dtype) != (4, "auto"):
        raise UserError("--draft-tokens and --draft-dtype are of a draft; give --draft, too")
    if draft is not None and len(prompts) > 1:
        raise UserError("--draft writes ahead of one prompt at a time; give one, or leave --draft out")
    if not prompts and not chat:
        raise UserError("there is no prompt; give --prompt TEXT or --prompt-file FILE, or converse with --chat")
    if system is not None and not chat:
        raise UserError("--system is of a conversation; add --chat")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    generator = Generator.open(folder, dtype, device, expert_memory, experts_on, slices)
    lower(generator.model, top_k, twins)
    if draft is not None:
        generator.use_draft(draft, draft_tokens, draft_dtype)
    first = [] if system is None else [{"role": "system", "content": system}]
    if not prompts:
        generator.encode([*first, {"role": "user", "content": "?"}])  # refused before a line is read
        converse(generator, first, sampling, sys.stdin, sys.stdout)
        return
    given = [[*first, {"role": "user", "content": text}] for text in prompts] if chat else list(prompts)
    answers = _print_answers(generator, prompts, given, sampling)
    print(told(generator), file=sys.stderr)
    if json_path is not None:
        rows = [{"prompt": text} | asdict(answer) for text, answer in zip(prompts, answers, strict=True)]
        report = {"folder": folder, "answers": rows, "counts": asdict(generator.counts)}
        cache = expert_cache(generator.model)
        if cache is not None:
            report["experts"] = asdict(cache.counts)
        write_json(json_path, report)


def converse(
    generator: Generator, messages: Sequence[Message], sampling: Sampling, source: TextIO, out: TextIO
) -> list[Message]:
    """A conversation, a line a turn, until the lines end or one of END_OF_CHAT; what was said is given back."""
    messages = list(messages)
    if source.isatty():
        print(f"Say something; {END_OF_CHAT[0]} or Ctrl-D ends it.", file=out)
    while line := _ask(source, out):
        if line.strip() in END_OF_CHAT:
            break
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        said = []
        for _, new in _growing(generator, [messages], sampling):
            said.append(new)
            out.write(new)
            out.flush()
        out.write("\n")
        messages.append({"role": "assistant", "content": "".join(said)})
    return messages


def told(generator: Generator) -> str:
    """What generating took, in a line."""
    counts: Counts = generator.counts
    line = (
        f"{counts.prompt_tokens} tokens read in {counts.prompt_s:.2f} s, {counts.new_tokens} written in "
        f"{counts.decode_s:.2f} s: {counts.tokens_per_s:.1f} steps/s; weights take "
        f"{packed_bytes(generator.model) / 2**20:,.1f} MiB"
    )
    cache = expert_cache(generator.model)
    more = [counts.draft.told()] if counts.draft is not None else []
    return "\n".join([line, *more, *([] if cache is None else [cache.told()])])


def _ask(source: TextIO, out: TextIO) -> str:
    if source.isatty():
        out.write("> ")
        out.flush()
    return source.readline()


def _growing(
    generator: Generator, given: Sequence[str | Sequence[Message]], sampling: Sampling
) -> Iterator[tuple[list[Generated], str]]:
    """(the answers, what is new of the first one's text). What may begin a stop text is held back until it does not."""
    said, answers = 0, []
    longest = max((len(stop) for stop in sampling.stop), default=1)
    for answers in generator.stream(given, sampling):
        text = answers[0].text
        upto = max(said, len(text) - (longest - 1))
        yield answers, text[said:upto]
        said = upto
    if answers:
        yield answers, answers[0].text[said:]


def _print_answers(
    generator: Generator, prompts: Sequence[str], given: Sequence[str | Sequence[Message]], sampling: Sampling
) -> list[Generated]:
    """One answer as it grows, several when they are there."""
    if len(prompts) == 1:
        answers: list[Generated] = []
        for grown, new in _growing(generator, given, sampling):
            print(new, end="", flush=True)
            answers = grown
        print()
        return answers
    answers = generator.generate(given, sampling)
    for text, answer in zip(prompts, answers, strict=True):
        print(f"--- {text}\n{answer.text}")
    return answers


def _lines(path: Path | None) -> list[str]:
    """The prompts of a file, one a line."""
    if path is None:
        return []
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompts in {path} cannot be read: {error}") from None
    if not lines:
        raise UserError(f"{path} holds no prompt; write one a line")
    return lines
