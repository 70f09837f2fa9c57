"""Run: python benchmarks/gpu_day.py [--json FILE]        on one GPU, at most 10 minutes
     python benchmarks/gpu_day.py --device cpu --tiny   without one, a minute or two

What a new GPU has to show, from a fresh clone: the tests of the kernels, the expert paths beside peers, training steps
of one and of eight layers at the widths of Llama 3 8B, a training run's memory beside its plan, a resumed run's losses
bit for bit, offload, and the logits of a converted model. lamella need not be installed.

Each part is a process of its own with a time limit. A part that fails, hangs or cannot run here is named with its
reason, and the next one begins. Prints one table and writes one JSON file; exits 1 if a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LEAST_SECONDS = 15
"""With less left of the time no part begins."""
GPU_STEP = r"^lamella, experts\+router(, frozen sharded)?$"
"""The contestants of train_step.py beside the dense model, in both homes: what eight layers leave room for."""
Row = list[str]
"""What was measured, and the figure with its unit."""


@dataclass(frozen=True)
class Settings:
    """Where the parts compute and write."""

    device: str
    tiny: bool
    folder: Path


@dataclass(frozen=True)
class Part:
    name: str
    limit_s: int
    command: Callable[[Settings, Path], list[str]]
    """What is run, given the JSON file that it is to write."""
    rows: Callable[[Any], list[Row]]
    """The lines of the table, from that file."""
    needs: tuple[str, ...] = ()
    """"gpu", or modules that must be installed."""


@dataclass
class Result:
    """What became of a part."""

    name: str
    state: str
    """passed, failed, or left out."""
    reason: str = ""
    wall_s: float = 0.0
    rows: list[Row] = field(default_factory=list)
    report: Any = None
    """The part's own JSON."""


def own(name: str) -> Callable[[Settings, Path], list[str]]:
    """A function of gpu_day_parts.py."""

    def command(settings: Settings, out: Path) -> list[str]:
        words = [str(HERE / "gpu_day_parts.py"), name, "--device", settings.device, "--json", str(out)]
        return [*words, "--folder", str(settings.folder), *(["--tiny"] if settings.tiny else [])]

    return command


def kernel_tests(settings: Settings, out: Path) -> list[str]:
    return ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/moe/test_gpu.py", f"--junitxml={out}"]


def expert_paths(*chosen: str) -> Callable[[Settings, Path], list[str]]:
    """benchmarks/experts.py: what it calls by one of these expressions."""

    def command(settings: Settings, out: Path) -> list[str]:
        size = ["--shape", "tiny", "--repeats", "2"] if settings.tiny else ["--shape", "8b"]
        words = [str(HERE / "experts.py"), *size, "--device", settings.device, "--only", *chosen]
        return [*words, "--json", str(out)]

    return command


def train_step(layers: int, tokens: int) -> Callable[[Settings, Path], list[str]]:
    def command(settings: Settings, out: Path) -> list[str]:
        words = [str(HERE / "train_step.py"), "--device", settings.device, "--layers", str(layers), "--only", GPU_STEP]
        if settings.tiny:
            words += ["--shape", "tiny", "--tokens", "256", "--seq-len", "128", "--repeats", "1", "--threads", "1"]
        else:
            words += ["--shape", "8b-layers", "--tokens", str(tokens), "--seq-len", "4096", "--repeats", "3"]
        return [*words, "--json", str(out)]

    return command


def test_rows(report: Any) -> list[Row]:
    return [["tests passed", f"{report['passed']} of {report['tests']}, {report['skipped']} skipped"]]


def expert_rows(report: Any) -> list[Row]:
    rows = [
        [
            row["impl"],
            f"{row['forward_backward_s'] * 1e3:.2f} ms, {row['forward_backward_over_dense']:.2f}x dense"
            + ("" if row["relative_error"] is None else f", error {row['relative_error']:.0e}"),
        ]
        for row in report["rows"]
    ]
    return rows + [[left["impl"], f"left out: {left['reason']}"] for left in report["left_out"]]


def step_rows(report: Any) -> list[Row]:
    return [
        [
            row["impl"],
            f"{row['step_s'] * 1e3:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s, {row['tokens_per_s_over_dense']:.2f}x "
            f"dense, peak {row['peak_bytes'] / 2**30:.2f} GiB" + (f", MFU {row['mfu']:.1%}" if row.get("mfu") else ""),
        ]
        for row in report["rows"]
    ]


def own_rows(report: Any) -> list[Row]:
    return report["rows"]


PARTS = [
    Part("machine", 60, own("machine"), own_rows),
    Part("kernel tests", 150, kernel_tests, test_rows, ("gpu", "pytest")),
    Part("expert paths", 120, expert_paths("lamella"), expert_rows),
    Part("step, 1 layer", 90, train_step(1, 16384), step_rows),
    Part("step, 8 layers", 120, train_step(8, 8192), step_rows),
    Part("memory", 90, own("memory"), own_rows, ("gpu", "torchtitan")),
    Part("resume", 120, own("resume"), own_rows, ("torchtitan",)),
    Part("offload", 120, own("offload"), own_rows, ("gpu", "torchtitan")),
    Part("verify", 90, own("verify"), own_rows),
    Part("peers", 120, expert_paths("transformers", "torchtitan", "sonic", "every expert"), expert_rows),
]
REASONS = {
    "gpu": "needs a GPU",
    "memory": "needs a GPU's allocator; benchmarks/plan.py measures ranks on CPUs",
}


def missing(part: Part, settings: Settings) -> str | None:
    """Why the part cannot run here; None where it can."""
    for need in part.needs:
        if need == "gpu":
            if settings.device == "cpu":
                return REASONS.get(part.name, REASONS["gpu"])
        elif importlib.util.find_spec(need) is None:
            return f"needs {need}, which is not installed"
    return None


def environment(settings: Settings) -> dict[str, str]:
    """lamella from this clone; one rank, alone; on a CPU no GPU and one thread."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    values |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if settings.device == "cpu":
        values["CUDA_VISIBLE_DEVICES"] = ""
    return values


def run(part: Part, settings: Settings, limit_s: float) -> Result:
    """Run a part to its end, or to its limit."""
    if reason := missing(part, settings):
        return Result(part.name, "left out", reason)
    if limit_s < LEAST_SECONDS:
        return Result(part.name, "left out", "no time left; give more with --minutes")
    out, log = settings.folder / f"{part.name}.json", settings.folder / f"{part.name}.log"
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command(settings, out)], cwd=ROOT, env=environment(settings), stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # its ranks too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = Result(part.name, "passed", wall_s=time.monotonic() - began)
    if code != 0:
        result.state = "failed"
        result.reason = f"not done after {limit_s:.0f} s" if code is None else last_line(log) or f"exit code {code}"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a part that failed may have written some
        result.report = read(out)
        result.rows = part.rows(result.report)
    if result.state == "passed" and result.report is None:
        result.state, result.reason = "failed", f"it wrote no figures; its last line: {last_line(log)}"
    return result


def read(out: Path) -> Any:
    """A part's JSON, or what pytest says in its XML."""
    text = out.read_text()
    if not text.startswith("<"):
        return json.loads(text)
    from xml.etree import ElementTree

    (suite,) = ElementTree.fromstring(text).iter("testsuite")
    tests, bad, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "skipped"))
    return {"tests": tests, "skipped": skipped, "passed": tests - bad - skipped - int(suite.get("errors", 0))}


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def table(results: Sequence[Result]) -> str:
    lines = [["part", "what", "figure"]]
    for result in results:
        took = f" in {result.wall_s:.0f} s" if result.wall_s else ""
        lines.append([result.name, result.state + took, result.reason])
        lines += [["", *row] for row in result.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in lines)


def has_gpu() -> bool:
    """Known without torch, which may be what is broken; the part "machine" says what torch sees."""
    return shutil.which("nvidia-smi") is not None and bool(list(Path("/dev").glob("nvidia[0-9]*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes: that every part works, and no more")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all parts together")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gpu-day-") as name:
        settings = Settings(args.device, args.tiny, Path(name))
        for part in PARTS:
            if args.only is None or part.name in args.only:
                results.append(run(part, settings, min(part.limit_s, end - time.monotonic())))
                print(f"{part.name}: {results[-1].state} {results[-1].reason}".rstrip(), file=sys.stderr, flush=True)
                if args.json is not None:  # whatever comes next, what there is stays
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    report = {"device": args.device, "tiny": args.tiny, "parts": [asdict(r) for r in results]}
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))
    sys.exit(any(result.state == "failed" for result in results))


if __name__ == "__main__":
    main()
