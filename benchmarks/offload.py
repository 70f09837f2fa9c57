"""Run: uv run benchmarks/offload.py [--router random|fitted] [--tokens N] [--work DIR] [--json FILE] [--picture FILE]

Decoding with memory for half of the experts, under a real limit that counts the page cache (cgroup v1, so as root on
Linux), the same for all: the weights beside the experts, half of the experts, and PROCESS for an interpreter, its
libraries and buffers. One contestant per process, float32, one thread:

- lamella, `--expert-memory` of half of the experts, also with `--slices int8`; beside it all in memory, unlimited;
- accelerate's disk offload of the stock GLM4-MoE export, the experts of every second layer on disk;
- llama.cpp with the mapped GGUF file.

Then lamella alone over budgets: hit rate, bytes and time per token.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import figure, positive, print_table, provenance, work_folder, write_json

PROMPT = "The first rule of writing clear programs is"
GROUP = Path("/sys/fs/cgroup/memory/lamella-offload")
MIB = 1 << 20
PROCESS = 256 * MIB
"""Of an interpreter with torch: what it allocates, and the pages of libraries that it uses, which count, too."""


class Limit:
    """This process's group, whose limit is set once the model is loaded."""

    def __init__(self) -> None:
        GROUP.mkdir(exist_ok=True)
        self.file("limit_in_bytes").write_text("-1")
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
        self.before: dict[str, int] = {}

    def file(self, name: str) -> Path:
        return GROUP / f"memory.{name}"

    def stat(self) -> dict[str, int]:
        return {name: int(n) for name, n in (line.split() for line in self.file("stat").read_text().splitlines())}

    def held(self) -> int:
        """Without pages of files."""
        return self.stat()["rss"] + self.stat()["shmem"]

    def set(self, limit: int) -> None:
        """From now on so many bytes at most, the page cache counted, which is empty now; 0: no limit."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("1")
        self.file("limit_in_bytes").write_text(str(limit or -1))
        self.file("max_usage_in_bytes").write_text("0")
        self.before = self.stat()

    def report(self) -> dict[str, int]:
        """`held` is without pages of files; since the limit was set, faults that had to read, and pages of files that
        had been taken away and were read again."""
        peak, now = int(self.file("max_usage_in_bytes").read_text()), self.stat()
        names = ("pgmajfault", "workingset_refault_file")
        since = {name: now[name] - self.before[name] for name in names}
        limit = int(self.file("limit_in_bytes").read_text())
        limit = limit if limit < 1 << 60 else 0  # as it was set
        return since | {"limit": limit, "peak": peak, "held": self.held()}


def read_bytes() -> int:
    """What this process has had read from disks."""
    return int(next(line.split()[1] for line in Path("/proc/self/io").read_text().splitlines() if "read_bytes" in line))


def run_lamella(args: argparse.Namespace) -> dict[str, Any]:
    from lamella.generation import Generator
    from lamella.generation.sampling import Sampling
    from lamella.hf.offload import expert_cache

    limit = Limit()
    budget = f"{args.budget}B" if args.budget else None
    generator = Generator.open(str(args.folder), "float32", "cpu", budget, slices=args.slices)
    sampling = Sampling(args.tokens, ignore_eos=True)
    cache = expert_cache(generator.model)
    opened = limit.held()
    limit.set(args.limit)
    before = read_bytes()
    (answer,) = generator.generate([PROMPT], sampling)
    counts = generator.counts
    report = {"tokens_per_s": counts.tokens_per_s, "prompt_s": counts.prompt_s, "tokens": answer.tokens}
    report |= {"opened": opened, "read_a_token": (read_bytes() - before) / args.tokens} | limit.report()
    if cache is not None:
        c = cache.counts
        report |= {"hit_rate": c.hit_rate, "stall_ms": 1000 * c.stall_s / c.tokens, "num_slots": cache.num_slots}
        report |= {"in_memory": 1 - c.misses / (c.hits + c.misses), "guessed": c.guessed, "right": c.guessed_right}
        report["share_read"] = (c.misses + c.guessed) / (c.hits + c.misses)
    return report


def run_accelerate(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    limit = Limit()
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for i in range(AutoConfig.from_pretrained(args.folder).num_hidden_layers):
        parts = ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate", "mlp.shared_experts")
        places |= {f"model.layers.{i}.{part}": "cpu" for part in parts}
        places[f"model.layers.{i}.mlp.experts"] = "disk" if i % 2 else "cpu"
    folder = args.folder.parent / "accelerate"
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.float32, device_map=places, offload_folder=folder
    ).eval()
    ids = AutoTokenizer.from_pretrained(args.folder)(PROMPT, return_tensors="pt").input_ids
    limit.set(args.limit)
    before, marks = read_bytes(), []

    class Clock:
        def put(self, _: Any) -> None:
            marks.append(time.perf_counter())

        def end(self) -> None:
            pass

    with torch.no_grad():
        out = model.generate(
            ids, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, streamer=Clock()
        )
    speed = (len(marks) - 2) / (marks[-1] - marks[1])
    read = (read_bytes() - before) / args.tokens
    tokens = out[0, ids.shape[1] :].tolist()
    return {"tokens_per_s": speed, "tokens": tokens, "read_a_token": read} | limit.report()


def run_llama_cpp(args: argparse.Namespace) -> dict[str, Any]:
    import xllamacpp
    from transformers import AutoTokenizer

    limit = Limit()
    file = next(args.folder.glob("*.gguf"))
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers, params.port = 256, 1, False, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    ids = AutoTokenizer.from_pretrained(args.tokenizer)(PROMPT).input_ids
    limit.set(args.limit)
    before = read_bytes()
    request = {"prompt": ids, "n_predict": args.tokens, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    result = server.handle_completions(request | {"timings_per_token": True})
    result = json.loads(result) if isinstance(result, str) else result
    timings, read = result["timings"], (read_bytes() - before) / args.tokens
    text = result["choices"][0]["text"] if "choices" in result else result["content"]
    return {"tokens_per_s": timings["predicted_per_second"], "text": text, "read_a_token": read} | limit.report()


def run_lamella_int8(args: argparse.Namespace) -> dict[str, Any]:
    """All slices in memory in int8, twins on disk; beside the speed what rounding the slices costs."""
    return run_lamella(argparse.Namespace(**vars(args) | {"slices": "int8"})) | {"perplexity": perplexities(args)}


def perplexities(args: argparse.Namespace) -> dict[str, list[float]]:
    """Of two texts, the perplexity of the model as it is, and with its slices in int8."""
    from transformers import AutoTokenizer

    from lamella.evaluate.perplexity import perplexity, text_samples
    from lamella.generation import open_model

    Limit().file("limit_in_bytes").write_text("-1")
    found: dict[str, list[float]] = {}
    for kind in ("stored", "int8"):
        budget = None if kind == "stored" else "4GiB"
        model = open_model(str(args.folder), "float32", "cpu", budget, slices=kind)
        for data in ("python-docs", "stdlib-code"):
            samples = text_samples(data, "heldout", str(args.folder), 512, 2048)
            with torch.inference_mode():
                result = perplexity(model, samples, AutoTokenizer.from_pretrained(args.folder), 2048)
            found.setdefault(data, []).append(result.perplexity)
    return found


RUNS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "lamella, slices in int8": run_lamella_int8,
    "lamella": run_lamella, "accelerate": run_accelerate, "llama.cpp": run_llama_cpp,
}  # fmt: skip


def in_a_process(
    kind: str, folder: Path, args: argparse.Namespace, budget: int, limit: int, tokenizer: Path
) -> dict[str, Any]:
    words = [sys.executable, __file__, "--run", kind, "--folder", folder, "--tokens", args.tokens, "--budget", budget]
    words += ["--tokenizer", tokenizer, "--limit", limit]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:  # llama.cpp writes to the standard output, too
        result = Path(temporary) / "result.json"
        done = subprocess.run([*map(str, words), "--json", result], capture_output=True, text=True, env=environment)
        if done.returncode or not result.exists():
            sys.exit(f"error: {kind} failed:\n{done.stderr[-2000:]}")
        return json.loads(result.read_text())


def with_router(moe: Path, out: Path, router: str) -> Path:
    """A copy whose twins have 20% noise, with routers by chance, or fitted: documentation to slices, code to twins."""
    from safetensors.torch import load_file, save_file

    from lamella.hf.models import load

    if out.exists():
        return out
    shutil.copytree(moe, out)
    tensors, generator = load_file(out / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if ".trainable_" in name:
            tensor += 0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        elif name.endswith("selection_bias"):
            tensor.zero_()
        elif name.endswith("router.weight") and router == "random":
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 2 * tensor.shape[1] ** -0.5
    if router == "fitted":
        tensors |= fitted(load(moe, torch.float32), moe)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@torch.no_grad()
def fitted(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Router rows by ridge regression, as a training run's `router_fit` has them: one row for all pairs of a layer."""
    from lamella.evaluate.perplexity import text_samples

    sums: dict[int, list[torch.Tensor]] = {}
    for side, data in ((0, "python-docs"), (1, "stdlib-code")):
        samples = text_samples(data, "train", str(folder), 256, 4096)
        seen: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(model.moe_layers))}
        hooks = [
            layer.register_forward_pre_hook(lambda _, given, parts=parts: parts.append(given[0][0].clone()))
            for parts, layer in zip(seen.values(), model.moe_layers, strict=True)
        ]
        for n in range(16):
            model(samples.sample(n)[0][None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for i, parts in seen.items():
            sums.setdefault(i, []).insert(side, torch.cat(parts))
    rows = {}
    for i, (old_TD, new_TD) in sums.items():
        second_DD = old_TD.T @ old_TD / len(old_TD) + new_TD.T @ new_TD / len(new_TD)
        second_DD += 0.01 * second_DD.diagonal().mean() * torch.eye(len(second_DD))
        row_D = torch.linalg.solve(second_DD, new_TD.mean(0) - old_TD.mean(0))
        layer = model.moe_layers[i]
        name = next(n for n, p in model.named_parameters() if p is layer.router.weight)
        rows[name] = row_D.expand_as(layer.router.weight).contiguous()
    return rows


def expert_bytes(folder: Path, others: bool = False) -> int:
    """In float32; `others`: of all tensors that are no experts."""
    from lamella.checkpoint.source import read_folder

    return sum(t.numel * 4 for name, t in read_folder(folder).items() if (".experts." in name) != others)


def compare(args: argparse.Namespace, work: Path, router: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the contestants, lamella over budgets) for one kind of router."""
    from transformers import AutoTokenizer

    from lamella.export import export

    moe = with_router(args.moe, work / f"moe-{router}", router)
    glm, gguf = work / f"glm-{router}", work / f"gguf-{router}"
    if not glm.exists():
        export(moe, "glm4-moe", glm, check=False)
    if not gguf.exists():
        export(moe, "gguf", gguf, check=False, dtype="F32")
    if args.prepare:
        return [], []
    experts = expert_bytes(moe)
    half, rest = experts // 2, expert_bytes(moe, others=True) + PROCESS
    named = [
        ("lamella, all experts in memory", "lamella", moe, 0, 0),
        ("lamella, half of them", "lamella", moe, half, rest + half),
        ("accelerate, disk offload", "accelerate", glm, 0, rest + half),
        ("llama.cpp, mapped file", "llama.cpp", gguf, 0, rest + half),
        ("lamella, half of them, slices in int8", "lamella, slices in int8", moe, half, rest + half),
    ]
    rows = []
    for name, kind, folder, budget, limit in named:
        rows.append({"router": router, "impl": name} | in_a_process(kind, folder, args, budget, limit, moe))
        print(f"{router}: {name}: {rows[-1]['tokens_per_s']:.2f} tokens/s", flush=True)
    budgets = []
    for share in args.shares:
        row = in_a_process("lamella", moe, args, int(share * experts), rest + int(share * experts), moe)
        budgets.append({"router": router, "share": share} | row)
    if any(row["tokens"] != rows[0]["tokens"] for row in [*rows[:3], *budgets]):
        sys.exit("error: the tokens differ")
    text = AutoTokenizer.from_pretrained(moe).decode(rows[0]["tokens"])
    rows[3]["same_text"] = rows[3]["text"] == text
    return rows, budgets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moe", type=Path, help="a sliced model (default: SmolLM2, converted in the work folder)")
    parser.add_argument("--router", choices=["random", "fitted"], action="append", help="default: both")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.05, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0])
    parser.add_argument("--tokens", type=positive, default=32)
    parser.add_argument("--work", type=work_folder, help="keep models and exports here (default: a temporary folder)")
    parser.add_argument("--prepare", action="store_true", help="convert and export only; --work DIR keeps it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    for hidden in ("--run", "--budget", "--limit", "--folder", "--tokenizer"):
        parser.add_argument(hidden, type=int if hidden in ("--budget", "--limit") else str, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.slices = "stored"
    torch.set_num_threads(1)
    if args.run:
        args.folder = Path(args.folder)
        write_json(args.json, RUNS[args.run](args))
        os._exit(0)
    if os.geteuid() or not GROUP.parent.is_dir():
        sys.exit("error: the memory limit needs root and cgroup v1's memory controller")
    with tempfile.TemporaryDirectory() as temporary:
        measure_all(args, args.work or Path(temporary))


def measure_all(args: argparse.Namespace, work: Path) -> None:
    from lamella.conversion import convert

    if args.moe is None:
        args.moe = work / "moe" if (work / "moe").exists() else convert(None, work / "moe").out
    rows, budgets = earlier(args.json, args.router or [])
    for router in args.router or ["random", "fitted"]:
        some, more = compare(args, work, router)
        rows, budgets = [*rows, *some], [*budgets, *more]
    if args.prepare:
        return
    sizes = ("read_a_token", "limit", "peak")
    table = [
        [r["router"], r["impl"], f"{r['tokens_per_s']:.2f}", *(f"{r[key] / MIB:.0f}" for key in sizes)]
        for r in rows
    ]  # fmt: skip
    header = ["router", "contestant", "tokens/s", "MiB read a token", "limit, MiB", "peak, MiB"]
    print_table(f"half of the experts in memory, {args.tokens} tokens", header, table)
    for row in rows:
        for data, (stored, int8) in row.get("perplexity", {}).items():
            print(f"{row['router']}, {data}: perplexity {stored:.3f}, with slices in int8 {int8:.3f}")
    table = [
        [r["router"], f"{r['share']:.0%}", f"{r['tokens_per_s']:.2f}", f"{r['hit_rate']:.0%}", f"{r['share_read']:.0%}",
         f"{r['read_a_token'] / MIB:.0f}", f"{r['stall_ms']:.0f}"]
        for r in budgets
    ]  # fmt: skip
    header = ["router", "experts in memory", "tokens/s", "there in time", "read", "MiB read a token",
              "ms waited a token"]  # fmt: skip
    print_table("over the budget", header, table)
    write_json(args.json, {**provenance(torch.device("cpu")), "contestants": rows, "budgets": budgets})
    if args.picture and budgets:
        draw(args.picture, budgets)


def earlier(path: Path | None, routers: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the JSON file has of routers other than these, which are measured one after another; else nothing."""
    if path is None or not path.exists() or not routers:
        return [], []
    report = json.loads(path.read_text())
    kept = ([row for row in report[key] if row["router"] not in routers] for key in ("contestants", "budgets"))
    return next(kept), next(kept)


def draw(path: Path, budgets: list[dict[str, Any]]) -> None:
    """Hit rate and speed over the budget."""
    with figure(path, 2) as (left, right):
        fastest = max(row["tokens_per_s"] for row in budgets)
        for router in dict.fromkeys(row["router"] for row in budgets):
            rows = [row for row in budgets if row["router"] == router]
            shares = [row["share"] for row in rows]
            left.plot(shares, [row["hit_rate"] for row in rows], "o-", label=f"{router} router: there in time")
            left.plot(shares, [1 - row["share_read"] for row in rows], "s--", label=f"{router} router: not read")
            right.plot(shares, [row["tokens_per_s"] / fastest for row in rows], "o-", label=f"{router} router")
        left.set_ylabel("share of the experts asked for")
        right.set_ylabel("speed, as a share of the fastest")
        for plot in (left, right):
            plot.set_xlabel("share of the experts in memory")
            plot.set_ylim(0, 1.05)


if __name__ == "__main__":
    main()
