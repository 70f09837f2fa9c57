"""Run: python benchmarks/data.py --json benchmarks/results/data-cpu.json

Tokens per second of preparing, of what the trainer is given, and the time to resume, beside plain `datasets` (map to
blocks, shuffle, read) on the same text: the standard library's sources, repeated, in SmolLM2's tokens.

torch and what needs it are imported inside functions: the processes that tokenise import this file anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamella.data.prepared import TokenFolder

SEQ_LEN = 2048
MANY = 10**9


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def write_text(file: Path, num_bytes: int) -> None:
    """Sources of the standard library, over and over, one document a line."""
    from lamella.data.sources import documents

    size = 0
    with file.open("w") as out:
        for text in cycle(list(documents("stdlib-code"))):
            size += out.write(json.dumps({"text": text}) + "\n")
            if size >= num_bytes:
                return


def open_training(source: str, seed: int = 0, stream: bool = False) -> Any:
    from lamella.checkpoint.embedded import embedded_model
    from lamella.recipe.sections import Portion
    from lamella.train.data import open_samples

    return open_samples([Portion(source=source, stream=stream)], "train", embedded_model(), SEQ_LEN, seed, MANY, 49152)


def micro_batches(samples: Any, first: int = 0) -> Iterator[Any]:
    return iter(loader_at(samples, {"consumed_samples": first}))


def loader_at(samples: Any, state: dict[str, Any]) -> Any:
    from lamella.train.data import SampleLoader

    loader = SampleLoader.Config(samples=samples).build(dp_world_size=1, dp_rank=0, local_batch_size=1)
    if state["consumed_samples"]:
        loader.load_state_dict(state)
    return loader


def delivered(batches: Iterator[Any], count: int) -> float:
    """Tokens per second of `count` micro-batches of one sample."""
    next(batches)
    took, _ = seconds(lambda: [None for _ in islice(batches, count)])
    return count * SEQ_LEN / took


def preparing(text: Path, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Wall time of whole calls, the first one's imports aside: start of the workers, reading, writing, verifying."""
    from measure import median_spread

    from lamella.checkpoint.embedded import embedded_model
    from lamella.data.prepare import prepare

    rows = []
    prepare(["python-docs"], embedded_model(), folder / "imports")
    for workers in (1, 2):
        rates = []
        for _ in range(repeats):
            shutil.rmtree(folder / str(workers), ignore_errors=True)
            call = lambda: prepare([str(text)], embedded_model(), folder / str(workers), workers=workers)  # noqa: B023, E731
            took, tokens = seconds(call)
            rates.append(len(tokens) / took)
        rate, spread = median_spread(rates)
        rows.append(
            {"what": f"prepare, {workers} workers", "tokens_per_s": rate, "spread": spread, "tokens": len(tokens)}
        )
    return rows


def peer_preparing(text: Path, folder: Path) -> tuple[list[dict[str, Any]], Any]:
    """`datasets`: tokenise, append EOS, join and cut into blocks of SEQ_LEN; no boundaries, no held-out part."""
    import datasets
    from transformers import AutoTokenizer

    from lamella.checkpoint.embedded import embedded_model

    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    eos = tokenizer.eos_token_id

    def blocks(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [i for row in tokenizer(rows["text"])["input_ids"] for i in (*row, eos)]
        return {"input_ids": [ids[i : i + SEQ_LEN] for i in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]}

    rows = []
    for workers in (1, 2):
        cache = folder / f"datasets-{workers}"

        def call() -> Any:
            loaded = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(cache))  # noqa: B023
            processes = workers if workers > 1 else None  # noqa: B023
            return loaded.map(blocks, batched=True, remove_columns=loaded.column_names, num_proc=processes)

        took, mapped = seconds(call)
        tokens = len(mapped) * SEQ_LEN
        rows.append({"what": f"datasets map, {workers} processes", "tokens_per_s": tokens / took, "tokens": tokens})
    return rows, mapped


def reading(text: Path, prepared: Path, mapped: Any, count: int, repeats: int) -> list[dict[str, Any]]:
    from measure import median_spread

    shuffled = mapped.shuffle(seed=0).with_format("torch")
    sources = {
        "prepared shards": lambda: micro_batches(open_training(str(prepared))),
        "stdlib-code (cached)": lambda: micro_batches(open_training("stdlib-code")),
        "python-docs (cached)": lambda: micro_batches(open_training("python-docs")),
        "streamed": lambda: micro_batches(open_training(str(text), stream=True)),
        "datasets, mapped and shuffled": lambda: (shuffled[i % len(shuffled)] for i in range(MANY)),
    }
    rows = []
    for name, make in sources.items():
        rate, spread = median_spread([delivered(make(), count) for _ in range(repeats)])
        rows.append({"what": f"read: {name}", "tokens_per_s": rate, "spread": spread})
    return rows


def large_corpus(text: Path, folder: Path, num_tokens: int) -> TokenFolder:
    """Shards of real documents, repeated."""
    from lamella.checkpoint.embedded import embedded_model
    from lamella.data.prepare import Batch, finish, write_units
    from lamella.data.prepared import Manifest, open_prepared
    from lamella.data.tokenizer import DocumentTokenizer, Text, fingerprint

    encoder = DocumentTokenizer(embedded_model()).encoder
    lines = [json.loads(line)["text"] for line in islice(text.open(), 1200)]
    unit = encoder([Text(t) for t in lines])
    units = -(-num_tokens // sum(len(t.ids) for t in unit))
    manifest = Manifest({}, fingerprint(embedded_model()), encoder.vocab_size, encoder.eos_id)
    folder.mkdir()
    results = ((Batch(i, splits=["train"] * len(unit)), unit) for i in range(units))
    write_units(folder, manifest, results, encoder)
    finish(folder, manifest, "repeated text")
    return open_prepared(folder, "train")


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resuming(text: Path, tokens: TokenFolder, mapped: Any, repeats: int) -> list[dict[str, Any]]:
    """Open the corpus and read the micro-batch at 90% of it; of a stream, at 90% of the text."""
    from measure import median_spread

    from lamella.data.shards import Shard

    late = int(0.9 * len(tokens) / SEQ_LEN)
    cases = {
        "resume: warm": lambda: next(micro_batches(open_training(str(tokens.folder)), late)),
        "resume: from disk": lambda: next(micro_batches(open_training(str(tokens.folder)), late)),
    }
    rows = []
    for name, call in cases.items():
        timed = []
        for _ in range(repeats):
            if name == "resume: from disk":
                forget(tokens.folder)
            timed.append(seconds(call)[0])
        middle, spread = median_spread(timed)
        shards = [Shard(tokens.folder / e.file) for e in tokens.entries]
        rows.append({
            "what": name, "seconds": middle, "spread": spread, "tokens": len(tokens), "sample": late,
            "shards": len(shards), "index_bytes": sum(s.header.num_bytes - s.header.starts_at for s in shards),
        })  # fmt: skip
    stream = open_training(str(text), stream=True)
    consumed = int(0.9 * 0.9 * sum(map(len, mapped["input_ids"])) / SEQ_LEN)
    state = {"consumed_samples": consumed, "streams": stream.stream_states(stream.advance(consumed))}
    timed = [
        seconds(lambda: next(iter(loader_at(open_training(str(text), stream=True), state))))[0] for _ in range(repeats)
    ]
    middle, spread = median_spread(timed)
    rows.append({
        "what": "resume: streamed", "seconds": middle, "spread": spread, "sample": consumed,
        "state_bytes": len(state["streams"]), "passes": stream.streams[0].passes(),
    })  # fmt: skip
    shuffle, shuffled = seconds(lambda: mapped.shuffle(seed=0))
    read, _ = seconds(lambda: shuffled[int(0.9 * len(shuffled))])
    rows.append({"what": "resume: datasets, shuffled", "seconds": shuffle + read, "tokens": len(mapped) * SEQ_LEN})
    return rows


def main() -> None:
    import torch
    from measure import positive, print_table, provenance, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-mb", type=positive, default=24)
    parser.add_argument("--large-tokens", type=positive, default=110_000_000)
    parser.add_argument("--samples", type=positive, default=1500)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--step-tokens-per-s", type=float, default=78, help="of a training step (train_step.py)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        write_text(text, args.text_mb << 20)
        rows = preparing(text, folder, args.repeats)
        peers, mapped = peer_preparing(text, folder)
        rows += peers + reading(text, folder / "2", mapped, args.samples, args.repeats)
        rows += resuming(text, large_corpus(text, folder / "large", args.large_tokens), mapped, args.repeats)
    for row in rows:
        if "tokens_per_s" in row:
            row["over_training_step"] = row["tokens_per_s"] / args.step_tokens_per_s
    table = [
        [
            r["what"],
            f"{r['tokens_per_s']:,.0f}" if "tokens_per_s" in r else "",
            f"{r['over_training_step']:,.0f}x" if "tokens_per_s" in r else "",
            f"{r['seconds'] * 1000:.0f}" if "seconds" in r else "",
            f"{r['spread']:.0%}" if "spread" in r else "",
        ]
        for r in rows
    ]
    title = f"samples of {SEQ_LEN} tokens; a training step here: {args.step_tokens_per_s:.0f} tokens/s"
    print_table(title, ["", "tokens/s", "over a step", "ms", "+-"], table)
    settings = {key: getattr(args, key) for key in ("text_mb", "large_tokens", "samples", "step_tokens_per_s")}
    write_json(args.json, {**provenance(torch.device("cpu")), **settings, "seq_len": SEQ_LEN, "rows": rows})


if __name__ == "__main__":
    main()
