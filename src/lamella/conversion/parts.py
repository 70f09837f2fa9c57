"""A conversion written shard by shard, by one machine or several, to a folder that may be remote.

OUT/model-00001-of-00400.safetensors   a shard: made in a temporary file of this machine, then sent
OUT/.parts/NAME.json                   that the shard is there, with the hashes of its tensors; written after it
OUT/config.json                        written last, with all else: a folder without it is no model

Part i of n makes every n-th shard. A part that is started again makes what is missing. Whoever finds all shards there
finishes: index, manifest, tokenizer, config.json. A folder of this machine's own file systems is made beside its place,
as .OUT.parts, and renamed. Memory holds a few blocks, and the disk one shard, whatever the size of the model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.remote import AnyPath, RemotePath, any_path
from lamella.checkpoint.write import check_output, write_index, write_shard
from lamella.conversion.plan import ConversionPlan
from lamella.conversion.sidecars import holds_conversion, provenance, write_sidecars
from lamella.errors import UserError
from lamella.jsons import Json, json_object
from lamella.recipe.methods.common import MethodOptions

RECORDS = ".parts"
LAST = "config.json"


@dataclass(frozen=True)
class Part:
    """Which share of the shards is made here."""

    number: int = 1
    """From 1."""
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """ "3/16"; UserError for anything else."""
        number, slash, of = text.partition("/")
        if not slash or not number.isdecimal() or not of.isdecimal() or not 1 <= int(number) <= int(of):
            raise UserError(f"--part is {text!r}; say which part of how many, as in --part 3/16")
        return cls(int(number), int(of))


@dataclass(frozen=True)
class PartReport:
    """What one call of `write_part` did."""

    made: int
    """Shards."""
    found: int
    """Shards of this part that were there already."""
    missing: int
    """Shards of other parts that are not there yet."""
    bytes_written: int
    wall_s: float

    @property
    def is_whole(self) -> bool:
        """Whether the model is complete."""
        return not self.missing


def write_part(
    planned: ConversionPlan,
    options: MethodOptions,
    out: str,
    part: Part | None,
    *,
    scratch: Path | None = None,
    on_plan: Callable[[WritePlan], None] = lambda _: None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> PartReport:
    """Make this part's shards, and finish the model if all are there.

    Args:
        out: a folder, or a URL that fsspec opens.
        part: None: no shard is made; the model is finished where all are there.
        scratch: where one shard at a time is made; None: the system's folder for temporary files.

    Raises:
        UserError: a plan that depends on text; a folder that holds something else; parts of another conversion.
    """
    began = time.perf_counter()
    if planned.decide is not None:
        raise UserError(
            f"method {options.method} decides by a text, for all shards; convert into a folder, in one part"
        )
    plan, place, token = planned.listing, _Place(out), _token(planned, options)
    shards = list(plan.shards().items())
    own = [] if part is None else shards[part.number - 1 :: part.of]
    if place.is_finished() and holds_conversion(place.final, planned.source, options):
        return PartReport(0, len(own), 0, 0, time.perf_counter() - began)
    place.check(planned)
    made = [(name, tensors) for name, tensors in own if not place.has(name, token)]
    on_plan(replace(plan, tensors=[tensor for _, tensors in made for tensor in tensors]))
    with tempfile.TemporaryDirectory(dir=scratch, prefix="lamella-part-") as folder:
        for name, tensors in made:
            file = Path(folder) / name
            place.put(file, write_shard(file, tensors, on_bytes), token)
            file.unlink()
        missing = [name for name, _ in shards if not place.has(name, token)]
        if not missing:
            _finish(planned, options, place, Path(folder))
        elif place.is_finished():  # by another part, meanwhile
            missing = []
    size = sum(tensor.nbytes for _, tensors in made for tensor in tensors)
    return PartReport(len(made), len(own) - len(made), len(missing), size, time.perf_counter() - began)


class _Place:
    """Where the model will be, and where its shards wait."""

    def __init__(self, out: str):
        self.final: AnyPath = any_path(out)
        if isinstance(self.final, RemotePath):
            self.unfinished = self.final
        else:
            path = self.final.absolute()
            self.unfinished = RemotePath.open((path.parent / f".{path.name}.parts").as_uri())

    def check(self, planned: ConversionPlan) -> None:
        """UserError where a model cannot be made."""
        if isinstance(self.final, Path):
            check_output(self.final, False, 0, {tensor.path for tensor in planned.source.tensors.values()})
        elif self.is_finished():
            raise UserError(f"{self.final} holds another model; remove it, or give another --out")
        elif not (self.final / RECORDS).is_dir() and any(self.final.iterdir()):
            raise UserError(f"{self.final} holds something else; give another --out")

    def is_finished(self) -> bool:
        """Whether the model is there whole."""
        return (self.final / LAST).is_file()

    def has(self, shard: str, token: str) -> bool:
        """Whether a shard was sent whole.

        Raises:
            UserError: it is one of another conversion.
        """
        record = self.record(shard)
        if record is None:
            return False
        if record.get("conversion") != token:
            raise UserError(f"{self.unfinished} holds parts of another conversion; remove it, or give another --out")
        sent = self.unfinished / shard
        return sent.is_file() and sent.stat().st_size == record["bytes"]

    def record(self, shard: str) -> Json | None:
        """What was said of a shard when it had been sent."""
        path = self.unfinished / RECORDS / f"{shard}.json"
        try:
            return json_object(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None

    def put(self, file: Path, hashes: dict[str, str], token: str) -> None:
        """Send a shard, and say so."""
        (self.unfinished / file.name).upload(file)
        record = {"conversion": token, "bytes": file.stat().st_size, "hashes": hashes}
        folder = self.unfinished / RECORDS
        folder.make_folder()
        (folder / f"{file.name}.json").write_bytes(json.dumps(record).encode())

    def appear(self) -> None:
        """The finished folder takes its place; another part may have been quicker."""
        if isinstance(self.final, RemotePath):
            (self.final / RECORDS).remove()
            return
        try:
            Path(self.unfinished.place).rename(self.final)
        except OSError:
            if not self.is_finished():
                raise
        shutil.rmtree(self.final / RECORDS, ignore_errors=True)


def _token(planned: ConversionPlan, options: MethodOptions) -> str:
    """Two conversions that agree in it make the same shards."""
    text = json.dumps(provenance(planned.source, options), sort_keys=True) + planned.listing.describe()
    return xxhash.xxh3_128_hexdigest(text.encode())


def _finish(planned: ConversionPlan, options: MethodOptions, place: _Place, scratch: Path) -> None:
    """Everything beside the shards, config.json last."""
    plan, folder = planned.listing, scratch / "beside"
    folder.mkdir()
    hashes: dict[str, str] = {}
    for name in plan.shards():
        record = place.record(name)
        if record is None:  # another part has just finished the model
            return
        hashes |= record["hashes"]
    planned.source.copy_sidecars(folder)
    write_index(plan, folder)
    write_sidecars(folder, planned.source, plan, options, hashes)
    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == LAST)
    for path in paths:
        (place.unfinished / path.relative_to(folder).as_posix()).upload(path)
    place.appear()
