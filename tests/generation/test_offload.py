"""A model whose experts wait on disk writes what it writes with all of them in memory, whatever the memory."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import threading
import time
from pathlib import Path

import pytest
import torch

import lamella
from lamella.conversion import SliceOptions, convert
from lamella.errors import UserError
from lamella.generation import Generator, open_model
from lamella.generation.sampling import Sampling
from lamella.hf.offload import expert_cache, parse_memory
from lamella.moe.matrices import dequantised_int4, dequantised_int8, rounded_to_int4, rounded_to_int8
from lamella.moe.offload.cache import READERS, ExpertCache
from lamella.moe.offload.pages import read_pages_alone
from lamella.moe.offload.slots import DiskHome, MemoryHome, Range
from support.models import save_llama

SAMPLING = Sampling(max_tokens=20, ignore_eos=True)
LAYERS, SLICES = 5, 4
PAIRS = LAYERS * SLICES


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routers and biases by chance, so that half of the twins are asked for; in several files."""
    folder = tmp_path_factory.mktemp("moe")
    save_llama(folder / "dense", layers=LAYERS, std=0.4)
    convert(folder / "dense", folder / "moe", SliceOptions(slices=SLICES, noise=0.5))
    model, _ = lamella.load(folder / "moe")
    torch.manual_seed(0)
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight)
        layer.router.selection_bias.normal_(std=0.1)
    (folder / "moe" / "model.safetensors").rename(folder / "before")
    model.save_pretrained(folder / "moe", max_shard_size="60KB")
    return folder / "moe"


def slots(moe: Path, count: int) -> str:
    """The memory for so many experts."""
    model = open_model(str(moe), "float32", expert_memory="1MiB")
    cache = expert_cache(model)
    assert cache is not None
    return f"{count * cache.home.slot_bytes}B"


@pytest.mark.parametrize("count", [SLICES, SLICES + 1, PAIRS, 2 * PAIRS])
def test_the_same_tokens(moe: Path, count: int) -> None:
    prompts = ["import numpy as np", "def f(x):"]
    resident = Generator.open(str(moe), "float32")
    offloaded = Generator.open(str(moe), "float32", expert_memory=slots(moe, count))
    cache = expert_cache(offloaded.model)
    assert cache is not None
    assert cache.num_slots == count
    for batch in ([prompts[0]], [prompts[1]], prompts):
        expected = [answer.tokens for answer in resident.generate(batch, SAMPLING)]
        assert [answer.tokens for answer in offloaded.generate(batch, SAMPLING)] == expected
    counts = cache.counts
    assert counts.tokens > 0
    assert counts.bytes_read == (counts.misses + counts.guessed) * cache.home.expert_bytes((0, 0))
    if count == 2 * PAIRS:  # each is read once
        assert counts.misses + counts.guessed <= 2 * PAIRS
    if count == SLICES:  # the next layer's take the place of this one's
        assert counts.hit_rate < 0.5


def test_single_tokens_have_the_same_logits(moe: Path) -> None:
    """Whether each expert stays in memory or is read again for every token."""
    one, other = (Generator.open(str(moe), expert_memory=slots(moe, n)) for n in (2 * PAIRS, SLICES + 1))
    resident = Generator.open(str(moe))
    ids = resident.encode("hello world")
    with torch.inference_mode():
        first = [g.decoding.read([ids[:1]], 30) for g in (one, other, resident)]
        for token in ids[1:]:
            logits = [g.decoding.next(torch.tensor([token])) for g in (one, other, resident)]
            for offloaded in logits[:2]:  # fp32; memory that is aligned otherwise is summed up in another order
                torch.testing.assert_close(offloaded, logits[2], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(first[0], first[2], rtol=1e-5, atol=1e-4)


def test_what_is_worth_most_stays() -> None:
    """Two experts asked for in turn with one that is not: the frequent ones stay, and an old favourite goes in time."""
    experts = {0: ([torch.full((2, 2), float(i)) for i in range(8)], [torch.zeros(2, 2)] * 8)}
    cache = ExpertCache(MemoryHome(experts, torch.device("cpu")), 3)

    def ask(expert: int) -> None:
        cache.now += 1
        (slot,) = cache.ask(0, [expert])
        cache.wait(slot)
        assert slot.gate_up[0, 0] == expert
        cache.release([slot])

    for rare in (2, 3, 4, 5):
        ask(0), ask(1), ask(rare)
    assert cache.holds(0, 0)
    assert cache.holds(0, 1)
    assert cache.counts.misses == 6
    for _ in range(400):
        ask(6), ask(7), ask(2)
    assert not cache.holds(0, 0)
    assert cache.counts.hit_rate > 0.9


def stands_for(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype == "int8":
        return dequantised_int8(*rounded_to_int8(weight))
    return dequantised_int4(*rounded_to_int4(weight), weight.shape[-1])


@pytest.mark.parametrize(("dtype", "away"), [("int8", (0.0, 4e-2)), ("int4", (4e-2, 0.4))])
def test_rounded_slices_stay_in_memory_and_twins_are_read(moe: Path, dtype: str, away: tuple[float, float]) -> None:
    """By prompts and single tokens as a float32 model computes whose slices are what the rounded ones stand for; the
    budget counts the slices and holds fewer twins than there are."""
    resident, model = Generator.open(str(moe), "float32"), open_model(str(moe), "float32")
    for layer in model.moe_layers:
        for parameter in layer.experts.frozen_parameters():
            parameter.data = stands_for(parameter.data, dtype)
    reference = Generator(model, resident.tokenizer)
    with pytest.raises(UserError, match=r"beside \d+KiB of slices, .* give at least (\d+)KiB") as told:
        open_model(str(moe), "float32", expert_memory="1KB", slices=dtype)
    rounded = Generator.open(str(moe), "float32", expert_memory=str(told.value).rpartition("least ")[2], slices=dtype)
    cache = expert_cache(rounded.model)
    assert cache is not None
    assert cache.num_slots == SLICES
    ids = resident.encode("def f(x): return")
    with torch.inference_mode():
        for read in (
            lambda g: g.decoding.read([ids], 9),
            lambda g: g.decoding.next(torch.tensor([65])),
            lambda g: g.decoding.next(torch.tensor([66])),
            lambda g: g.decoding.read([ids, ids[2:]], 4),
        ):
            stored, expected, got = (read(generator) for generator in (resident, reference, rounded))
            assert (got - expected).norm() / expected.norm() < 2e-2  # inputs and outputs in bfloat16, and nothing else
            assert away[0] < (got - stored).norm() / stored.norm() < away[1]
    assert {expert >= SLICES for _, expert in cache.home.ranges} == {True}  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="give --expert-memory, too"):
        open_model(str(moe), slices="int8")
    with pytest.raises(UserError, match="slices is 'int3'"):
        open_model(str(moe), expert_memory="1MB", slices="int3")


@pytest.mark.parametrize("offset", [0, 8, 4096, 5000])
def test_ranges_are_read_past_the_page_cache(tmp_path: Path, offset: int) -> None:
    """At any place, up to the end of the file, in the file's dtype and in another."""
    values = torch.randn(3000).bfloat16()
    (tmp_path / "file").write_bytes(b"x" * offset + values.view(torch.uint8).numpy().tobytes())
    gate_up = Range(tmp_path / "file", offset, (20, 100), torch.bfloat16)
    down = gate_up._replace(begin=offset + 4000, shape=(100, 10))
    for dtype in (torch.bfloat16, torch.float32):
        home = DiskHome({(0, 0): (gate_up, down)}, dtype)
        slot = home.new_slot()
        home.fill(slot, (0, 0))
        assert torch.equal(slot.gate_up, values[:2000].view(20, 100).to(dtype))
        assert torch.equal(slot.down, values[2000:].view(100, 10).to(dtype))
        assert sum(len(m) for m in slot.memory) == home.slot_bytes


def resident_pages(mapped: mmap.mmap) -> int:
    """Of a mapped file, by the system's own account."""
    found = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found) == 0
    return sum(flag & 1 for flag in found)


def test_a_fault_reads_a_page_alone(tmp_path: Path) -> None:
    """As of a library's code when memory is scarce: the others would take the place of what is in use."""
    counts = []
    for told in (False, True):
        file = tmp_path / f"library-{told}"
        file.write_bytes(os.urandom(4 << 20))
        with file.open("r+b") as opened:
            os.fsync(opened)
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            mapped = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        if resident_pages(mapped):
            pytest.skip("the file system keeps its files in memory")
        if told:
            assert read_pages_alone() >= len(mapped)
        mapped[2 << 20]  # the fault
        counts.append(resident_pages(mapped))
    assert counts[0] > 1
    assert counts[1] == 1


@pytest.mark.faults
def test_refusals(moe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'lots'; write a size"):
        parse_memory("lots")
    assert (parse_memory("2GiB"), parse_memory("1.5 MB"), parse_memory("7")) == (2 << 30, 1_500_000, 7)
    with pytest.raises(
        UserError, match=r"holds 0 of them, but a token needs 4 in a layer; give at least (\d+)KiB"
    ) as told:
        open_model(str(moe), expert_memory="1KB")
    least = str(told.value).rpartition("least ")[2]
    open_model(str(moe), expert_memory=least)
    with pytest.raises(UserError, match="no converted model"):
        open_model(str(moe.parent / "dense"), expert_memory="1GB")
    with pytest.raises(UserError, match="experts on cpu are for a model on a GPU"):
        open_model(str(moe), expert_memory="1GB", device="cpu", experts_on="cpu")
    with pytest.raises(UserError, match="not packed into int8"):
        open_model(str(moe), "int8", expert_memory="1GB")


@pytest.mark.faults
def test_a_file_that_shrinks_is_told_of(moe: Path, tmp_path: Path) -> None:
    """By the thread that waits for the expert, whatever thread found it."""
    (tmp_path / "file").write_bytes(bytes(4000))
    gate_up = Range(tmp_path / "file", 0, (10, 100), torch.float32)
    cache = ExpertCache(DiskHome({(0, 0): (gate_up, gate_up)}, torch.float32), 1)
    os.truncate(tmp_path / "file", 3000)
    (slot,) = cache.ask(0, [0])
    with pytest.raises(UserError, match="ends 1000 bytes early"):
        cache.wait(slot)


def test_wrong_guesses_go_and_threads_end_with_the_cache() -> None:
    experts = {0: ([torch.full((2, 2), float(i)) for i in range(8)], [torch.zeros(2, 2)] * 8)}
    cache = ExpertCache(MemoryHome(experts | {1: experts[0]}, torch.device("cpu")), 4)
    before = threading.active_count()
    for turn in range(20):
        cache.guess(1, [turn % 8, (turn + 1) % 8])
        cache.release(cache.ask(1, [(turn + 1) % 8, (turn + 2) % 8]))
    assert 0 < cache.counts.guessed_right < cache.counts.guessed
    slots = cache.ask(0, [0, 1, 2, 3])  # all of the memory, wrong guesses or not
    for slot in slots:
        cache.wait(slot)
    del cache, slot, slots
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before - READERS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before - READERS
