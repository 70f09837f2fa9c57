"""Run: python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--only NAME] [--json FILE.json]

Damaged input to everything that reads: configs, indexes, headers of safetensors and GGUF, recipes, tokenizer files,
records, prepared tokens, run folders. A case changes one file of a sound folder, by bytes or by what they say, and
reads it. Allowed are a reading and a UserError (exit code 2 of the commands); not another exception, more than 5
seconds, or a change to the folder. Prints a table, and what was found with the smallest example; exit code 1 then.

Cases depend on the seed alone: `--seed S --only NAME` gives the same again.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from huggingface_hub import constants
from measure import positive, print_table, write_json

from lamella.errors import UserError
from support.damage import damaged
from support.readers import READERS, Reader

LIMIT_S = 5.0


class Hang(BaseException):
    """A case took longer than LIMIT_S; no `except Exception` on the way holds it."""


class Finding(NamedTuple):
    """A case that ended neither in a reading nor in a UserError."""

    reader: str
    file: str
    error: str
    """The exception's type and text, or what changed in the folder."""
    where: str
    """The last line of lamella's on the way to it."""
    content: bytes


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """(size, time of the last change) of every file."""
    files = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in files}


def last_line(error: BaseException) -> str:
    """FILE:LINE of the innermost frame that is in lamella."""
    found, trace = "", error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if "/lamella/" in path:
            found = f"{path.rpartition('/lamella/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def run_case(reader: Reader, folder: Path, file: Path, content: bytes) -> Finding | str:
    """Read the folder with other content in one file: what was found, or how it ended ("read" or "refused")."""
    original = file.read_bytes()
    file.write_bytes(content)
    before = listing(folder)
    name = str(file.relative_to(folder))
    try:
        with time_limit(LIMIT_S):
            reader.read(folder)
        end = "read"
    except UserError:
        end = "refused"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also what Rust code raises when it panics
        return Finding(reader.name, name, f"{type(error).__name__}: {str(error)[:200]}", last_line(error), content)
    finally:
        changed = listing(folder) != before
        file.write_bytes(original)
    return Finding(reader.name, name, "the folder was changed", "", content) if changed else end


def cases(reader: Reader, folder: Path, count: int, seed: int) -> Iterator[tuple[Path, bytes]]:
    """(file, new content) of each case."""
    files = [folder / name for name in reader.files]
    originals = [file.read_bytes() for file in files]
    for case in range(count):
        rng = Random(f"{seed} {reader.name} {case}")
        index = rng.randrange(len(files))
        yield files[index], damaged(originals[index], reader.files[index], rng)


def fuzz(reader: Reader, count: int, seed: int) -> tuple[dict[str, int], list[Finding]]:
    """Run `count` cases: how many ended how, and a finding for each place and type of exception, the shortest."""
    ends = {"read": 0, "refused": 0, "found": 0}
    findings: dict[tuple[str, str], Finding] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reader.make(folder)
        reader.read(folder)  # what is not damaged is read
        for file, content in cases(reader, folder, count, seed):
            end = run_case(reader, folder, file, content)
            if isinstance(end, str):
                ends[end] += 1
                continue
            ends["found"] += 1
            key = (end.where, end.error.partition(":")[0])
            if key not in findings or len(content) < len(findings[key].content):
                findings[key] = end
    return ends, list(findings.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=positive, default=10_000, help="in all, divided among the readers")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--only", choices=list(READERS), help="one reader")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    constants.HF_HUB_OFFLINE = True  # no damaged name is asked for
    chosen = [reader for name, reader in READERS.items() if options.only in (None, name)]
    total = sum(reader.share for reader in chosen)
    rows, found, report = [], [], {}
    for reader in chosen:
        start, count = time.perf_counter(), -(-options.cases * reader.share // total)
        ends, findings = fuzz(reader, count, options.seed)
        seconds = time.perf_counter() - start
        rows.append([reader.name, *(str(n) for n in (count, *ends.values())), f"{count / seconds:.0f}"])
        report[reader.name] = {"cases": count, **ends, "seconds": round(seconds, 1)}
        found += findings
        for finding in findings:
            print(f"{finding.reader} {finding.file}: {finding.error} at {finding.where}\n    {finding.content[:300]!r}")
    print_table("Damaged input", ["reader", "cases", "read", "refused", "found", "cases/s"], rows)
    write_json(options.json, {"seed": options.seed, "readers": report})
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
