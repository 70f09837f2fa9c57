"""Sources -> a folder of shards, tokenised by several processes and resumable: `lamella data prepare`.

One process reads the records in order and cuts them into units of text; batches of a unit go to the workers and come
back in order; a finished unit is a shard per split, and an entry of the manifest. Which document is in which unit
depends on the text alone, so any number of workers writes the same bytes, and a later call reads past the finished
units without tokenising them. What waits in memory is bounded by the workers, not by the text.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamella.architecture.tokenizer_files import template_fingerprint
from lamella.data.chat import ChatRenderer
from lamella.data.files import MANIFEST
from lamella.data.prepared import Manifest, ShardEntry, TokenFolder, open_prepared, read_manifest
from lamella.data.readers import BadRecords, Policy, Record
from lamella.data.records import Conversation, Piece
from lamella.data.shards import ShardWriter
from lamella.data.sources import Source, fingerprint, is_prepared, open_source, records
from lamella.data.tokenizer import Around, DocumentTokenizer, Encoder, Text, Tokens
from lamella.data.tokenizer import fingerprint as tokenizer_fingerprint
from lamella.errors import UserError

UNIT_BYTES = 64 << 20
"""Text of a unit: about 16 million tokens, the most that a kill loses."""
BATCH_CHARS = 1 << 18
BATCHES_AHEAD = 4  # of each worker


@dataclass
class Batch:
    """Documents of one unit on their way through the workers."""

    unit: int
    splits: list[str] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    num_chars: int = 0
    num_bytes: int = 0
    """Read of the sources up to its end."""


@dataclass(frozen=True)
class Done:
    """How far a preparation is; for progress."""

    num_bytes: int
    """Read of the sources."""
    num_tokens: int
    """Tokenised by this call."""
    unit: int


def prepare(
    sources: list[str],
    model: str | Path,
    out: Path,
    *,
    workers: int = 1,
    unit_bytes: int = UNIT_BYTES,
    on_bad_data: Policy = "fail",
    overwrite: bool = False,
    report: Callable[[Done], None] = lambda done: None,
) -> TokenFolder:
    """Tokenise sources into the folder `out`, or go on with what a killed call left there.

    Args:
        model: folder or hub name whose tokenizer (and chat template) is used.
        workers: processes that tokenise.
        unit_bytes: text per shard; the part that a kill can lose.
        on_bad_data: broken records: "fail" names the first, "skip" leaves them out. Blank ones are left out anyway.
        overwrite: replace what is in `out`.

    Raises:
        UserError: no such source, broken records, a folder that holds something else.
    """
    from filelock import FileLock, Timeout

    if workers < 1 or unit_bytes < 1:
        raise UserError(f"workers is {workers} and the text per shard {unit_bytes} bytes; both must be at least 1")
    opened = [open_source(source) for source in sources]
    tokenizer = DocumentTokenizer(model)
    manifest = _manifest(opened, model, tokenizer.encoder, unit_bytes)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            manifest = _continued(out, manifest, overwrite)
            if not manifest.complete:
                bad = BadRecords(on_bad_data)
                stream = (record for source in opened for record in records(source, bad))
                batches = make_batches(stream, renderer(tokenizer, model), bad, manifest, lambda record: record.split)
                with tokenised(batches, tokenizer.encoder, workers) as results:
                    write_units(out, manifest, results, tokenizer.encoder, report=report)
                finish(out, manifest, ", ".join(sources), bad)
    except Timeout:
        raise UserError(f"another call is preparing {out}; wait for it, or choose another folder") from None
    return open_prepared(out, None)


def _manifest(sources: list[Source], model: str | Path, encoder: Encoder, unit_bytes: int) -> Manifest:
    for source in sources:
        if source.kind == "prepared":
            raise UserError(f"{source.word} is prepared already; name it as data of a recipe")
    inputs = {
        "sources": [fingerprint(source) for source in sources],
        "tokenizer": str(model),
        "unit_bytes": unit_bytes,
    }
    return make_manifest(inputs, model, encoder)


def make_manifest(inputs: dict[str, Any], model: str | Path, encoder: Encoder) -> Manifest:
    """Without units, for tokens by this model's tokenizer."""
    return Manifest(
        inputs,
        tokenizer_fingerprint(model),
        encoder.vocab_size,
        encoder.eos_id,
        template_hash=template_fingerprint(model),
    )


def _continued(out: Path, manifest: Manifest, overwrite: bool) -> Manifest:
    """What is there, with the units whose shards are; or the empty manifest of a fresh folder."""
    others = [p for p in out.iterdir() if p.name != ".lock"]
    if overwrite or not is_prepared(out):
        ours = (MANIFEST, ".shard", ".tmp")
        if foreign := [p.name for p in others if not p.name.endswith(ours)]:
            raise UserError(f"{out} holds {foreign[0]}, which is none of ours; choose another folder")
        for path in others:
            path.unlink()
        return manifest
    found = read_manifest(out)
    different = [key for key, value in found.identity().items() if manifest.identity()[key] != value]
    if found.has_other_template(manifest.template_hash):
        different.append("chat template")
    if different:
        raise UserError(f"{out} was made with other {', '.join(different)}; choose another folder, or pass --overwrite")
    present = {unit: e for unit, e in found.units.items() if all(_is_there(out, entry) for entry in e)}
    found.complete = found.complete and len(present) == len(found.units)
    found.units, found.template_hash = present, manifest.template_hash
    return found


def _is_there(out: Path, entry: ShardEntry) -> bool:
    file = out / entry.file
    return file.is_file() and file.stat().st_size == entry.num_bytes


def renderer(tokenizer: DocumentTokenizer, model: str | Path) -> Callable[[Record, str], Text]:
    """Texts as they are, conversations by the chat template, which is looked for when the first of them comes; a
    record and the split that it goes to -> its text."""
    chat: ChatRenderer | None = None

    def render(record: Record, split: str) -> Text:
        nonlocal chat
        if not isinstance(record.content, Conversation):
            return plain_text(record.content, split)
        chat = chat or ChatRenderer(tokenizer.tokenizer, str(model))
        return chat(record.content, record.where)

    return render


def plain_text(content: str | Piece, split: str) -> Text:
    """Of a document that is no conversation, or of a piece of one."""
    if isinstance(content, str):
        return Text(content)
    around = Around(content.begin, content.end, content.is_first, content.is_last, content.begins(split))
    return Text(content.text, around=around)


def make_batches(
    stream: Iterable[Record],
    render: Callable[[Record, str], Text],
    bad: BadRecords,
    manifest: Manifest,
    split_of: Callable[[Record], str],
) -> Iterator[Batch]:
    """The documents of the units that the manifest lacks."""
    unit_bytes = manifest.inputs["unit_bytes"]
    batch, in_unit, num_bytes = Batch(0), 0, 0
    for record in stream:
        if in_unit >= unit_bytes:
            yield batch
            batch, in_unit = Batch(batch.unit + 1), 0
        in_unit += _size(record.content)
        num_bytes += record.num_bytes
        batch.num_bytes = num_bytes
        bad.blank += record.is_blank
        if batch.unit in manifest.units or record.is_blank:
            continue
        split = split_of(record)
        try:
            text = render(record, split)
        except UserError as error:
            bad(error)
            continue
        batch.splits.append(split)
        batch.texts.append(text)
        batch.num_chars += len(text.text)
        if batch.num_chars >= BATCH_CHARS:
            yield batch
            batch = Batch(batch.unit, num_bytes=num_bytes)
    yield batch


def _size(content: str | Piece | Conversation) -> int:
    if isinstance(content, Conversation):
        return sum(len(str(message)) for message in content.messages)
    return len(content.text if isinstance(content, Piece) else content)


@contextmanager
def tokenised(
    batches: Iterable[Batch], encoder: Encoder, workers: int
) -> Iterator[Iterator[tuple[Batch, list[Tokens]]]]:
    """Each batch with its tokens, in order; with 0 workers in this process, by the tokenizer's own threads."""
    if workers == 0:
        yield ((batch, encoder(batch.texts)) for batch in batches)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(encoder, os.getpid())
    )
    try:
        yield _in_order(batches, pool, workers * BATCHES_AHEAD)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises was killed (out of memory?); call again to go on. Workers import the script that "
            "calls this, which therefore needs an if __name__ == '__main__'"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(batches: Iterable[Batch], pool: ProcessPoolExecutor, ahead: int) -> Iterator[tuple[Batch, list[Tokens]]]:
    waiting: deque[tuple[Batch, Future[list[Tokens]]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode, batch.texts)))
        batch.texts = []  # the worker has them
        if len(waiting) > ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


_encoder: Encoder


def _start_worker(encoder: Encoder, parent: int) -> None:
    """One thread per worker; a worker ends with its parent, and leaves Ctrl-C to it."""
    global _encoder
    PR_SET_PDEATHSIG = 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _encoder = encoder


def _encode(texts: list[Text]) -> list[Tokens]:
    return _encoder(texts) if texts else []


def write_units(
    out: Path,
    manifest: Manifest,
    results: Iterable[tuple[Batch, list[Tokens]]],
    encoder: Encoder,
    *,
    max_tokens: int | None = None,
    report: Callable[[Done], None] = lambda done: None,
) -> None:
    """Write the shards of each unit, and its entry in the manifest, up to the document that reaches `max_tokens`."""
    unit = _Unit(out, manifest, encoder)
    count = 0
    try:
        for batch, documents in results:
            if batch.unit != unit.number:
                unit.commit()
                unit = _Unit(out, manifest, encoder, batch.unit)
            for split, tokens in zip(batch.splits, documents, strict=True):
                unit.add(split, tokens)
                count += len(tokens.ids)
                if max_tokens is not None and count >= max_tokens:
                    break
            report(Done(batch.num_bytes, count, batch.unit))
            if max_tokens is not None and count >= max_tokens:
                break
        unit.commit()
    finally:
        unit.abandon()


class _Unit:
    """The shards of a unit, one for each split that has a document in it."""

    def __init__(self, out: Path, manifest: Manifest, encoder: Encoder, number: int = 0):
        self.out, self.manifest, self.encoder, self.number = out, manifest, encoder, number
        self.writers: dict[str, ShardWriter] = {}

    def add(self, split: str, tokens: Tokens) -> None:
        if split not in self.writers:
            file = self.out / f"{split}-{self.number:05d}.shard"
            writer = ShardWriter(file, self.encoder.vocab_size, self.encoder.dtype, self.manifest.tokenizer_hash)
            self.writers[split] = writer
        self.writers[split].add(tokens)

    def commit(self) -> None:
        if self.number in self.manifest.units:
            return
        entries = []
        for split, writer in sorted(self.writers.items()):
            header, index_hash = writer.close()
            entry = ShardEntry(
                writer.file.name,
                split,
                header.num_bytes,
                header.num_tokens,
                header.num_documents,
                header.has_mask,
                writer.largest_id,
                index_hash,
            )
            entries.append(entry)
        self.writers = {}
        self.manifest.units[self.number] = entries
        self.manifest.write(self.out)

    def abandon(self) -> None:
        for writer in self.writers.values():
            writer.abandon()


def finish(out: Path, manifest: Manifest, title: str, bad: BadRecords | None = None) -> None:
    """Mark the folder as whole, with what was left out; UserError, and no folder, where no text came."""
    left_out = bad.describe() if bad is not None else ""
    if not manifest.num_tokens():
        shutil.rmtree(out, ignore_errors=True)
        raise UserError(f"{title} holds no text{f' ({left_out})' if left_out else ''}; use another split or more data")
    manifest.complete, manifest.left_out = True, left_out
    manifest.write(out)
