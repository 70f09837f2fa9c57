"""torchtitan's checkpoints with a commit: files, their hashes in a manifest, then the rename that makes them count.

The hashes are taken of the bytes on their way to the disk and travel to rank 0 with torch's own write results, so that
synchronous and asynchronous saves are committed alike, by rank 0, when every rank has written.
"""

from __future__ import annotations

import io
import os
import posixpath
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypedDict, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import MODEL
from torchtitan.components.checkpointer.dcp import AsyncMode
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

from lamella.architecture.names import stays_in_model
from lamella.checkpoint.distributed import WeightsOnlyPlanner, checkpoint_reader
from lamella.checkpoint.manifest import changed_tensors
from lamella.checkpoint.seams import FileSystem, FsspecWriter
from lamella.errors import UserError
from lamella.jsons import Json
from lamella.run.failure import Fault
from lamella.run.folder import RunDir
from lamella.run.store import CheckpointStore
from lamella.titan.decoder import LamellaDecoder
from lamella.train import fault_hook

StateDict: TypeAlias = dict[str, object]
Answer = TypeVar("Answer")


class FileEntry(TypedDict):
    """What a manifest says of one file."""

    bytes: int
    xxh3_128: str
    """The hash of its content, in hex."""


class HashingStream:
    """A file being written; knows the size and hash of what went through it."""

    def __init__(self, stream: io.IOBase):
        self.stream, self.digest, self.num_bytes = stream, xxhash.xxh3_128(), 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write, and hash, these bytes."""
        self.digest.update(data)
        self.num_bytes += memoryview(data).nbytes
        return self.stream.write(data)  # type: ignore[attr-defined]  # all streams that torch opens have it

    def tell(self) -> int:
        """The number of bytes so far."""
        return self.num_bytes

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


class HashingFiles(FileSystem):
    """torch's file system over fsspec, which remembers what it wrote: `written` is {name: FileEntry}."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        """A file to write or to read; what is written is hashed."""
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            hashing = HashingStream(stream)
            yield hashing  # type: ignore[misc]  # it has what torch calls on a stream
            entry: FileEntry = {"bytes": hashing.num_bytes, "xxh3_128": hashing.digest.hexdigest()}
            self.written[posixpath.basename(str(path))] = entry

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Rename a file, and its entry."""
        super().rename(path, new_path)
        self.written[posixpath.basename(str(new_path))] = self.written.pop(posixpath.basename(str(path)))


@dataclass(frozen=True)
class HashedResult(WriteResult):
    """torch's own record of one written item, with the file that it is in."""

    file: FileEntry = field(kw_only=True)
    """Size and hash of the whole file that the item is in."""


class CommittingWriter(FsspecWriter):
    """Writes into `path`, local or remote; `commit(files)` runs on rank 0 when every rank has written."""

    def __init__(self, path: str, step: int, commit: Callable[[dict[str, FileEntry]], None]):
        super().__init__(path)
        self.files = HashingFiles()
        self.fs = self.files  # type: ignore[assignment]  # FsspecWriter has made its own already
        self.path = self.fs.init_path(path)
        self.step, self.commit = step, commit

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part; each result carries its file's hash to rank 0."""
        with fault_hook.during_save(self.step):
            results = super().write_data(plan, planner).wait()
        hashed: Future[list[WriteResult]] = Future()
        hashed.set_result(
            [
                HashedResult(
                    r.index, r.size_in_bytes, r.storage_data, file=self.files.written[r.storage_data.relative_path]
                )
                for r in results
            ]
        )
        return hashed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write torch's metadata and commit, on rank 0."""
        super().finish(metadata, results)
        files = {".metadata": self.files.written[".metadata"]}
        for result in (r for of_rank in results for r in of_rank):
            assert isinstance(result, HashedResult)
            files[result.storage_data.relative_path] = result.file
        self.commit(files)


class CommittedCheckpoints(CheckpointManager):
    """Saves commit; loads take the newest checkpoint whose every byte is as it was written, or refuse."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """torchtitan's."""

        pass

    def __init__(self, config: Config, *, base_folder: str = "", **parts: object):
        super().__init__(config, base_folder=base_folder, **parts)
        self.run = RunDir(Path(base_folder))
        self.store = CheckpointStore(self.folder)
        self.identity = self.run.identity()
        decoders = cast(list[LamellaDecoder], parts["model_parts"])
        self.in_model = {
            name
            for part in decoders
            for name in map(canonical_fqn, dict(part.named_parameters()))
            if stays_in_model(name, part.config.trains)
        }
        self.stager: DefaultStager | None = None

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: StateDict,
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> object:
        """Write a step, and commit it; the future of a save that goes on, or None."""
        state_dict = {name: value for name, value in state_dict.items() if name not in self.in_model}
        step = int(posixpath.basename(checkpoint_id).removeprefix("step-"))
        commit = partial(self._commit, step, self._about(step), time.perf_counter())
        writer = CommittingWriter(self.store.unfinished(step), step, commit)
        if async_mode == AsyncMode.DISABLED:
            dcp.save(state_dict, storage_writer=writer)
            future = None
        else:
            self.stager = self.stager or DefaultStager(StagingOptions(False, False, False, False))
            future = dcp.async_save(state_dict, storage_writer=writer, process_group=self.pg, async_stager=self.stager)
        if enable_garbage_collection:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
        return future

    def dcp_load(self, state_dict: StateDict, checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Load a checkpoint, and from the model's folder what does not train; no pickle of theirs runs anything."""
        self._check_model()
        if from_hf:
            return super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        kept = {n: t for n, t in state_dict.items() if n in self.in_model and isinstance(t, torch.Tensor)}
        self._load_from_model(kept)
        trained = {name: value for name, value in state_dict.items() if name not in self.in_model}
        dcp.load(trained, storage_reader=checkpoint_reader(checkpoint_id), planner=WeightsOnlyPlanner())
        self.states[MODEL].load_state_dict(state_dict | trained)

    def _load_from_model(self, tensors: dict[str, torch.Tensor]) -> None:
        if not tensors:
            return
        assert self.sd_adapter is not None
        reader = self.sd_adapter.get_hf_storage_reader(self.initial_load_path, False)
        dcp.load(self.sd_adapter.to_hf(tensors), storage_reader=reader)

    def _check_model(self) -> None:
        """Each rank reads a share of the model's tensors, whose hashes its manifest has; Fault where one differs."""
        folder = Path(str(self.initial_load_path))
        mine = list(changed_tensors(folder, dist.get_rank(), dist.get_world_size()))
        shares: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, mine)
        if changed := sorted({name for share in shares for name in share}):
            more = f" and {len(changed) - 1} more" if changed[1:] else ""
            raise Fault(
                "storage",
                f"{folder}: {changed[0]}{more} is not what the conversion wrote; convert the model again, or put an "
                "undamaged copy there",
                retryable=False,
            )

    def _about(self, step: int) -> Json:
        data = self.states["dataloader"].state_dict()
        consumed = {k: v for k, v in data.items() if isinstance(v, int)}  # what a person may want to read
        text = self.states["dataloader"].samples.hashes()
        versions = {"torch": str(torch.__version__), "world_size": dist.get_world_size()}
        return {"step": step, "data": consumed, "text": text} | versions | self.identity

    def _commit(self, step: int, about: Json, began: float, files: dict[str, FileEntry]) -> None:
        """Write the manifest that makes a checkpoint count: on rank 0, in the thread that saves."""
        self.store.commit(step, about | {"time": time.time(), "files": files})
        num_bytes = sum(entry["bytes"] for entry in files.values())
        self.run.event("save", step=step, seconds=round(time.perf_counter() - began, 3), bytes=num_bytes)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        saved = super()._save(curr_step, last_step)
        if saved and last_step:  # torchtitan purges after the others only
            self._purge_stale_checkpoints()
        return saved

    def discard_unfinished(self) -> None:
        """Remove what a killed attempt left half-written: at the start of a run nobody writes yet."""
        if dist.get_rank() == 0 and (left := self.store.discard_unfinished()):
            logger.warning(f"Discarded unfinished checkpoints: {', '.join(left)}")
        if dist.get_rank() == 0 and (left := self.store.half_written()):
            logger.warning(f"Half-written, not counted, not removed: {', '.join(left)} in {self.store.folder}")

    def _load(self, step: int = -1) -> bool:
        return super()._load(self._trusted_step(step))

    def _find_load_step(self, folder: str = "") -> int:
        return -1  # `_load` has looked already: there is no checkpoint

    def _trusted_step(self, wanted: int) -> int:
        """The newest checkpoint without damage (or the wanted one); -1 where none was ever committed.

        Raises:
            Fault: of class `storage`, on every rank, when there are checkpoints and all are damaged or gone.
            UserError: when they belong to another run.
        """
        found, latest = self._on_rank0(lambda: (self.store.found(), self.store.latest()))
        candidates = [wanted] if wanted != -1 else found[::-1]
        damage: list[str] = []
        for step in candidates:
            problems = self._problems(step)
            if not problems:
                self._check_owner(step)
                if wanted == -1:
                    self._say_fallback(step, damage, latest)
                return step
            damage.append(f"step {step}: {problems[0]}" + (f" and {len(problems) - 1} more" if problems[1:] else ""))
        if not damage and latest is not None:
            damage.append(f"step {latest} was committed, and is gone")
        if damage:
            raise Fault(
                "storage",
                f"no checkpoint in {self.folder} can be trusted ({'; '.join(damage)}); put an undamaged copy there, "
                f"or set {'out' if self.store.is_inside(self.run.path) else 'checkpoint_folder'}= to another folder to "
                "start again from the model",
                retryable=False,
            )
        return -1

    def _problems(self, step: int) -> list[str]:
        """Each rank reads a share of the files; all learn what all found."""
        mine = list(self.store.problems(step, dist.get_rank(), dist.get_world_size()))
        shares: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
        return sorted({problem for share in shares for problem in share})

    def _check_owner(self, step: int) -> None:
        manifest = self._on_rank0(lambda: self.store.manifest(step))
        other = [name for name, value in self.identity.items() if manifest.get(name) != value]
        if other:
            raise UserError(
                f"the checkpoints in {self.folder} belong to another run (another {' and '.join(other)}); "
                f"set checkpoint_folder to a folder of this run's own"
            )
        self._check_text(manifest.get("text", {}))

    def _check_text(self, of_checkpoint: dict[str, str]) -> None:
        """UserError on every rank where one of them has other text than the checkpoint was trained on."""
        mine = self.states["dataloader"].samples.hashes()
        changed = [name for name, digest in of_checkpoint.items() if mine.get(name) != digest]
        of_ranks: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(of_ranks, changed)
        if names := sorted({name for names in of_ranks for name in names}):
            raise UserError(
                f"the text of {', '.join(names)} is not that of {self.folder} any more, so samples would come twice or "
                f"never; bring the old text back, or train the result on in a new run: model={self.run.path}/hf/step-N "
                "with another out="
            )

    def _on_rank0(self, read: Callable[[], Answer]) -> Answer:
        """One answer for all: ranks may see a shared folder differently for a moment."""
        answer = [read() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(answer, src=0)
        return cast(Answer, answer[0])

    def _say_fallback(self, step: int, damage: list[str], latest: int | None) -> None:
        if latest is not None and latest > step and not damage:
            damage = [f"step {latest} was committed, and is gone"]
        if damage and dist.get_rank() == 0:
            for newer in self.store.steps():
                if newer > step:  # or it would count among those that are kept
                    self.store.revoke(newer)
            logger.error(f"DAMAGED CHECKPOINTS ({'; '.join(damage)}): continuing from step {step}")
            self.run.event("fallback", step=step, damage=damage)
            self.fallback = f"damaged checkpoints ({'; '.join(damage)}): continuing from step {step}"

    fallback = ""
    """What people must be told, on rank 0."""

    def _purge_stale_checkpoints(self) -> None:
        """Only committed ones count and only older committed ones go; one that is being written is neither."""
        if self.keep_latest_k > 0 and dist.get_rank() == 0:
            for step in self.store.steps()[: -self.keep_latest_k]:
                self.store.revoke(step)
                self.purge_queue.put(self.store.path(step))
