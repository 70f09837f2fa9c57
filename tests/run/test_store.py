"""Commits of checkpoints on a disk and in places without renaming."""

from __future__ import annotations

import uuid

import pytest
import xxhash

from lamella.errors import UserError
from lamella.run.failure import cause, classify, report
from lamella.run.folder import RunDir
from lamella.run.store import CheckpointStore, seal, unseal

pytestmark = pytest.mark.faults
CONTENT = {".metadata": b"a pickle", "__0_0.distcp": b"weights of rank 0", "__1_0.distcp": b"weights of rank 1"}


@pytest.fixture(params=["path", "file", "memory"])
def store(request, tmp_path):
    places = {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}/run"}
    return CheckpointStore(places[request.param])


def write(store: CheckpointStore, step: int, commit: bool = True) -> None:
    folder = store.unfinished(step).removeprefix(store.folder).strip("/")
    store.files.makedirs(store.inside(folder), exist_ok=True)
    for name, content in CONTENT.items():
        store.files.pipe_file(store.inside(folder, name), content)
    if commit:
        files = {
            name: {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
            for name, content in CONTENT.items()
        }
        store.commit(step, {"step": step, "files": files})


def test_only_what_was_committed_counts(store):
    assert store.steps() == []
    assert store.latest() is None
    for step in (4, 12):
        write(store, step)
    write(store, 16, commit=False)
    assert store.steps() == [4, 12]
    assert store.latest() == 12
    assert not list(store.problems(12))
    assert store.discard_unfinished() == (["step-16.tmp"] if store.folder[0] == "/" else [])  # else maybe another run's
    assert store.found() == [4, 12]
    assert store.half_written() == ([] if store.folder[0] == "/" else ["step-16"])
    assert not any(name.endswith(".tmp") for name in store.names())
    store.revoke(4)
    assert store.steps() == [12]
    assert store.manifest(12)["step"] == 12


def test_what_was_committed_last_is_not_taken_for_unfinished(store):
    write(store, 4)
    store.files.rm(store.inside("step-4", "manifest.json"))
    assert store.found() == [4]
    assert list(store.problems(4)) == ["manifest.json is missing"]


def test_a_checkpoint_written_again_replaces_a_damaged_one(store):
    write(store, 4)
    store.files.pipe_file(store.inside("step-4", ".metadata"), b"A pickle")
    assert list(store.problems(4)) == [".metadata has other bytes than were written"]
    write(store, 4)
    assert not list(store.problems(4))
    assert set(store.names()) == {"step-4", "latest"}


DAMAGE = {
    "has 7 bytes instead of 8": (".metadata", b"a pickl"),
    "other bytes": ("__1_0.distcp", b"weights of rank 2"),
    "is missing": ("__0_0.distcp", None),
    "manifest.json is missing": ("manifest.json", None),
    "manifest.json cannot be trusted": ("manifest.json", b"{}"),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_damage_is_named(store, said):
    write(store, 4)
    name, content = DAMAGE[said]
    if content is None:
        store.files.rm(store.inside("step-4", name))
    else:
        store.files.pipe_file(store.inside("step-4", name), content)
    (problem,) = store.problems(4)
    assert problem.startswith(name)
    assert said in problem
    if not name.startswith("manifest"):  # two ranks find it together
        assert [p for rank in range(2) for p in store.problems(4, rank, 2)] == [problem]


def test_a_seal_shows_any_change():
    text = seal({"step": 4, "files": {}})
    assert unseal(text)["step"] == 4
    for other in (text.replace("4", "5", 1), text.replace('"step": 4,', ""), text[:-3], "[]", ""):
        with pytest.raises(ValueError, match=r"."):
            unseal(other)


def test_a_place_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="cannot be opened"):
        CheckpointStore("nowhere://bucket/run").steps()


def test_the_cause_is_the_failure_that_follows_from_no_other(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.log.mkdir()
    monkeypatch.setattr("lamella.run.failure.ROLL_CALL_S", {})
    lost = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")
    first = report(run, lost, rank=0, world_size=3, step=7)
    assert first["reason"].startswith("ranks 1, 2 died without a word")
    report(run, OSError(28, "No space left on device"), rank=2, world_size=3, step=7)
    report(run, RuntimeError("Timed out waiting 5000ms for recv operation"), rank=1, world_size=3, step=7)
    found = cause(run)
    assert found is not None
    assert (found["rank"], found["failure"], found["retryable"]) == (2, "storage", True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("bad"), "user_config"), (KeyError("x"), "user_config"), (MemoryError(), "oom"),
        (RuntimeError("CUDA out of memory"), "oom"), (OSError(28, "full"), "storage"),
        (RuntimeError("Timed out waiting 5000ms"), "timeout"), (RuntimeError("NCCL error"), "infra"),
        (ConnectionResetError(104, "reset"), "infra"), (RuntimeError("Loss is not finite"), "numerics"),
    ],
)  # fmt: skip
def test_failures_have_classes(error, kind):
    assert classify(error) == kind
