"""Run: uv run benchmarks/offload_limits.py DIR [--limits MIB...] [--router random|fitted] [--json FILE]

What `offload.py` measures under one limit of memory, under several: lamella with memory for half of the experts, and
accelerate and llama.cpp with the same limit. DIR is what `offload.py --prepare --work DIR` has made.

The limit counts what a contestant has after its imports, which are alike: weights, buffers, and what it reads of files,
libraries too. With `--imports` it counts everything from the process' first instruction on. Pages that others use
already are theirs, so this process loads no libraries, and nothing else should use the same installation meanwhile.
While a contestant runs, its group is looked at for what cannot be taken away: memory that is no file's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

GROUP = Path("/sys/fs/cgroup/memory/lamella-offload")  # as in offload.py, whose libraries must not be loaded here
MIB = 1 << 20
LIMITS = [600, 700, 770, 850, 1000]
LOOK_EVERY_S = 0.05
KINDS = {"lamella": "moe", "accelerate": "glm", "llama.cpp": "gguf"}


def join() -> None:
    """Put this process into the group; in the child, before its program."""
    (GROUP / "cgroup.procs").write_text(str(os.getpid()))


def held() -> int:
    """Bytes of the group that are no file's."""
    stat = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
    return int(stat["rss"]) + int(stat["shmem"])


def run(kind: str, router: str, args: argparse.Namespace, budget: int, limit: int) -> dict[str, Any] | None:
    """What offload.py reports of one contestant, and `most_held`; None where the system ended it."""
    (GROUP / "memory.limit_in_bytes").write_text("-1")
    Path("/proc/sys/vm/drop_caches").write_text("1")
    script, most = Path(__file__).with_name("offload.py"), 0
    words = [sys.executable, script, "--run", kind, "--folder", args.folder / f"{KINDS[kind]}-{router}"]
    words += [
        "--tokens",
        args.tokens,
        "--budget",
        budget,
        "--limit",
        limit,
        "--tokenizer",
        args.folder / f"moe-{router}",
    ]
    with tempfile.TemporaryDirectory() as temporary, (Path(temporary) / "log").open("w+") as log:
        result = Path(temporary) / "result.json"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*map(str, words), "--json", str(result)],
            stdout=log,
            stderr=log,
            env=environment,
            preexec_fn=join if args.imports else None,
        )
        while process.poll() is None:
            if int((GROUP / "memory.limit_in_bytes").read_text()) == limit:
                most = max(most, held())
            time.sleep(LOOK_EVERY_S)
        if process.returncode == -9 or not result.exists():
            log.seek(0)
            print(f"{kind} under {limit // MIB} MiB ended with {process.returncode}: {log.read()[-500:]}", flush=True)
            return None
        return json.loads(result.read_text()) | {"most_held": most}


def sizes(folder: Path) -> tuple[int, int]:
    """(bytes of the experts, of the rest) of a model in float32."""
    import numpy as np
    from safetensors import safe_open

    experts = rest = 0
    with safe_open(folder / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            nbytes = int(np.prod(file.get_slice(name).get_shape())) * 4
            experts, rest = (experts + nbytes, rest) if ".experts." in name else (experts, rest + nbytes)
    return experts, rest


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--limits", type=int, nargs="+", default=LIMITS, metavar="MIB")
    parser.add_argument("--router", choices=["random", "fitted"], default="random")
    parser.add_argument("--only", choices=KINDS, action="append", help="default: all three")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--imports", action="store_true", help="count imports, too")
    parser.add_argument("--json", type=Path, help="rows that it has of other limits, routers and contestants are kept")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if os.geteuid() or not GROUP.parent.is_dir():
        sys.exit("error: the memory limit needs root and cgroup v1's memory controller")
    if missing := [kind for kind in KINDS.values() if not (args.folder / f"{kind}-{args.router}").is_dir()]:
        sys.exit(f"error: {args.folder} lacks {missing[0]}-{args.router}; run offload.py --prepare --work first")
    GROUP.mkdir(exist_ok=True)
    experts, rest = sizes(args.folder / f"moe-{args.router}")
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    for limit in args.limits:
        for kind in args.only or KINDS:
            found = run(kind, args.router, args, experts // 2 if kind == "lamella" else 0, limit * MIB)
            about = {"router": args.router, "impl": kind, "limit_mib": limit, "budget": experts // 2, "rest": rest}
            rows = [r for r in rows if any(r[key] != about[key] for key in ("router", "impl", "limit_mib"))]
            rows.append(about | (found or {"tokens_per_s": None}))
            print(f"{kind} under {limit} MiB: {rows[-1]['tokens_per_s']} tokens/s", flush=True)
            if args.json:  # a sweep takes long
                args.json.write_text(json.dumps({"rows": rows}))
    report(args, rows)
    if args.picture:
        draw(args.picture, rows)


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The table, and the JSON file; when all contestants have run, since it loads libraries that they use."""
    import torch
    from measure import print_table, provenance, write_json

    write_json(args.json, {**provenance(torch.device("cpu")), "rows": rows})
    table = [
        [r["router"], str(r["limit_mib"]), r["impl"], *(["did not run"] + [""] * 4 if r["tokens_per_s"] is None else [
            f"{r['tokens_per_s']:.2f}", f"{r['read_a_token'] / MIB:.0f}", f"{r['pgmajfault'] / args.tokens:.0f}",
            f"{r['workingset_refault_file'] / args.tokens:.0f}", f"{r['most_held'] / MIB:.0f}"])]
        for r in sorted(rows, key=lambda r: (r["router"], r["limit_mib"]))
    ]  # fmt: skip
    header = ["router", "limit, MiB", "contestant", "tokens/s", "MiB read a token", "faults that read, a token",
              "pages read again, a token", "most held beside files, MiB"]  # fmt: skip
    print_table(f"half of the experts in memory, {args.tokens} tokens", header, table)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Speed over the limit, and how many times that of each peer."""
    from measure import figure

    routers = list(dict.fromkeys(row["router"] for row in rows))
    with figure(path, len(routers)) as plots:
        for router, plot in zip(routers, plots, strict=True):
            for kind in KINDS:
                found = [r for r in rows if (r["router"], r["impl"]) == (router, kind) and r["tokens_per_s"]]
                found.sort(key=lambda r: r["limit_mib"])
                plot.plot([r["limit_mib"] for r in found], [r["tokens_per_s"] for r in found], "o-", label=kind)
            plot.set(xlabel=f"limit of memory, MiB ({router} router)", ylabel="tokens a second", yscale="log")


if __name__ == "__main__":
    main()
