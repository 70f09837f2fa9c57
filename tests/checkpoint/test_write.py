"""Writing a tensor's bytes: past the page cache or through it, in any order, and the same noise however it is cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from lamella.checkpoint import blocks
from lamella.checkpoint.blocks import BLOCK_BYTES, BUFFER_BYTES, BlockFile, Stream
from lamella.checkpoint.pieces import Piece, SplitColumns, Stretch, Stretches
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.tensors import CHUNK_ELEMENTS, SourceTensor, read_header
from lamella.checkpoint.write import MAX_STREAMS, write_tensors
from lamella.conversion.noise import Noise
from lamella.moe.noise import add_noise, matrix_std
from support.slicing import slice_down

# Within a block, across one, exactly blocks, and over several buffers; none of the starts is that of a block.
LENGTHS = (1, 40, BLOCK_BYTES - 140, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, BUFFER_BYTES, 2 * BUFFER_BYTES + 12345)


@pytest.fixture(params=[True, False], ids=["direct", "through the page cache"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:  # as on a file system that refuses O_DIRECT
        monkeypatch.setattr(blocks, "_open_direct", lambda path: None)
    return request.param


def test_streams_side_by_side(direct: bool, tmp_path: Path) -> None:
    """Neighbours share blocks; they are written in turns, in pieces of odd lengths."""
    random.seed(0)
    expected = random.randbytes(sum(LENGTHS))
    file = BlockFile(tmp_path / "file", len(expected))
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    streams = {Stream(file, start): start + length for start, length in zip(starts, LENGTHS, strict=True)}
    while streams:
        stream = random.choice(list(streams))
        count = min(random.randint(1, 300_000), streams[stream] - stream.end)
        stream.write(memoryview(expected)[stream.end : stream.end + count])
        if stream.end == streams[stream]:
            stream.close()
            del streams[stream]
    for at, count in ((0, len(expected)), (100, 10), (4000, 200), (5000, len(expected) - 7777)):
        assert b"".join(bytes(view) for view in file.read(at, count)) == expected[at : at + count]
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == expected


def saved(folder: Path, rows: int, width: int) -> SourceTensor:
    weights = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"w": weights}, folder / "dense.safetensors")
    return read_header(folder / "dense.safetensors")["w"]


def write(folder: Path, pieces: dict[str, tuple[Piece, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    """The tensors as the safetensors library reads them back, after comparing the hashes of their bytes."""
    tensors = [OutputTensor(name, "BF16", shape, piece) for name, (piece, shape) in pieces.items()]
    hashes = write_tensors(WritePlan(tensors, {}), folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        made = {name: file.get_tensor(name) for name in pieces}
    for name, tensor in made.items():
        assert xxhash.xxh3_128(tensor.view(torch.uint8).numpy().data).hexdigest() == hashes[name]
    return made


@pytest.mark.parametrize("width", [960, 1024, 1000])  # rows of a chunk that divide the noise's blocks, and that do not
def test_noise_is_the_same_however_it_is_cut(width: int, direct: bool, tmp_path: Path) -> None:
    rows, noise = CHUNK_ELEMENTS // 900, Noise(0.05, 3)
    source = saved(tmp_path, rows, width)
    weights, count = source.read(0, source.numel), source.numel
    assert count > CHUNK_ELEMENTS
    std = noise.scale * matrix_std(source.read(*chunk) for chunk in source.chunks())
    noisy = add_noise(weights.float(), "w", noise.seed, std).bfloat16().view(rows, width)
    made = write(
        tmp_path,
        {
            "odd": (Stretches((Stretch(source, 0, 1),)), (1,)),  # so that no tensor starts at a block
            "runs": (
                Stretches((Stretch(source, 0, 12345), Stretch(source, 12345, count - 12345)), noise),
                (rows, width),
            ),
            "columns": (SplitColumns(source, 8, noise), (8, rows, width // 8)),
            "plain columns": (SplitColumns(source, 8), (8, rows, width // 8)),
        },
    )
    assert torch.equal(made["runs"], noisy)
    assert torch.equal(made["columns"], slice_down(noisy, 8))
    assert torch.equal(made["plain columns"], slice_down(weights.view(rows, width), 8))


def test_more_streams_than_are_kept_open(direct: bool, tmp_path: Path) -> None:
    slices = 2 * MAX_STREAMS
    source = saved(tmp_path, CHUNK_ELEMENTS // slices // 8 + 50, slices * 10)
    rows, width = source.shape
    made = write(tmp_path, {"w": (SplitColumns(source, slices), (slices, rows, width // slices))})
    assert torch.equal(made["w"], slice_down(source.read(0, source.numel).view(rows, width), slices))


def test_std_sums_chunk_by_chunk_in_float64() -> None:
    chunks = [torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.02 for n in (5000, 5000, 77)]
    values = torch.cat(chunks).double()
    assert matrix_std(chunks) == pytest.approx(values.std(correction=0).item(), rel=1e-14)  # float64, another order
