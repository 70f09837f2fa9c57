"""What may be submitted: one section per kind of job, as strict as a recipe, and never a shell command.

Each becomes the words of a command of lamella. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import yaml
from pydantic import Field

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.recipe.check import Strict
from lamella.recipe.conversion import make_conversion
from lamella.recipe.stages import make_stages
from lamella.recipe.training import Recipe
from lamella.service.queue import Capacity

RECIPE = "recipe.yaml"
RANKS_PER_CORE = 4
"""More ranks than this on each core of a machine without GPUs are a mistake."""
Word = Annotated[str, Field(min_length=1, max_length=4096)]
Name = Annotated[str, Field(max_length=200)]
Stored = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M",
    "Q6_K", "IQ4_NL", "IQ4_XS", "INT8", "INT4",
]  # fmt: skip
DEFAULT_CONVERSION = "artifacts/moe"


class TrainJob(Strict):
    """Train a converted model: `lamella train`."""

    kind: Literal["train"]
    recipe: Json = Field(default={})
    """The keys of a training recipe (`lamella keys train`), with their sections nested; `stages` too."""
    ranks: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """The run has this many processes; null: one for each GPU of the machine, or one."""

    def stages(self) -> list[Recipe]:
        """The checked recipe of each stage; UserError with all problems at once."""
        return make_stages(dict(self.recipe))

    def check(self) -> None:
        """UserError with all problems at once."""
        self.stages()

    def files(self) -> dict[str, str]:
        """What the command reads: name -> content."""
        return {RECIPE: yaml.safe_dump(self.recipe, sort_keys=False)}

    def words(self, folder: Path, ranks: int) -> list[str]:
        """The command's words after `lamella`, with `files` in `folder`."""
        return ["train", str(folder / RECIPE), "--nproc", str(ranks)]

    def outs(self) -> list[str]:
        """The folders that it writes, in order."""
        return [stage.out for stage in self.stages()]

    def out(self) -> str | None:
        """The folder that no other job may write meanwhile."""
        stages = self.stages()
        return stages[0].out if len(stages) == 1 else str(Path(stages[0].out).parent)


class ConvertJob(Strict):
    """Convert a dense model: `lamella convert`."""

    kind: Literal["convert"]
    recipe: Json = Field(default={})
    """The keys of a conversion recipe (`lamella keys convert METHOD`)."""
    overwrite: bool = False
    """A converted model in the same folder is replaced."""

    def check(self) -> None:
        """UserError with all problems at once."""
        make_conversion(dict(self.recipe))

    def files(self) -> dict[str, str]:
        """What the command reads: name -> content."""
        return {RECIPE: yaml.safe_dump({"out": DEFAULT_CONVERSION} | self.recipe, sort_keys=False)}

    def words(self, folder: Path, ranks: int) -> list[str]:
        """The command's words after `lamella`."""
        return ["convert", str(folder / RECIPE), *(["--overwrite"] if self.overwrite else [])]

    def out(self) -> str | None:
        """The folder that no other job may write meanwhile."""
        return make_conversion(dict(self.recipe)).out or DEFAULT_CONVERSION


class EvaluateJob(Strict):
    """Measure a model's perplexity: `lamella evaluate`."""

    kind: Literal["evaluate"]
    folder: Word
    """The folder of a model, a run directory, or a hub name."""
    data: Word = "python-docs"
    """It is measured on this text."""
    split: Literal["heldout", "train", "all"] = "heldout"
    """This part of the text is taken."""
    dense: Word | None = None
    """This dense model is measured beside it."""
    tokens: Annotated[int, Field(ge=2, le=10**12)] = 8192
    """So many tokens are scored."""
    seq_len: Annotated[int, Field(ge=2, le=10**8)] = 1024
    """The text is cut into windows of this many tokens."""
    mode: Literal["routed", "dense", "learned", "random"] | None = None
    """Who chooses the experts; null: the router."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The model is computed in this type."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The model is computed there."""

    def check(self) -> None:
        """There is nothing more to check."""

    def files(self) -> dict[str, str]:
        """It reads none."""
        return {}

    def words(self, folder: Path, ranks: int) -> list[str]:
        """The command's words after `lamella`."""
        words = ["evaluate", f"--json={folder / 'result.json'}", *_options(self, ("kind", "folder"))]
        return [*words, "--", self.folder]

    def out(self) -> str | None:
        """It writes nothing but its figures."""
        return None


class VerifyJob(Strict):
    """Compare a converted model's logits with the dense model's: `lamella verify`."""

    kind: Literal["verify"]
    moe: Word
    """The folder of the converted model."""
    dense: Word | None = None
    """The dense model that it was made of; null: the embedded one."""
    data: Word = "python-docs"
    """They are compared on the held-out part of this text."""
    tokens: Annotated[int, Field(ge=64, le=10**9)] = 512
    """So many tokens are compared in float32."""
    bf16_tokens: Annotated[int, Field(ge=64, le=10**9)] = 256
    """So many tokens are compared in bfloat16, too."""
    seq_len: Annotated[int, Field(ge=64, le=10**8)] = 256
    """The text is cut into windows of this many tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The models are computed there."""
    ratios: bool = True
    """What random routing does to the perplexity is measured, too."""

    def check(self) -> None:
        """UserError where no whole window is compared."""
        if min(self.tokens, self.bf16_tokens) < self.seq_len:
            raise UserError(f"seq_len: windows of {self.seq_len} tokens need as many tokens and bf16_tokens, or more")

    def files(self) -> dict[str, str]:
        """It reads none."""
        return {}

    def words(self, folder: Path, ranks: int) -> list[str]:
        """The command's words after `lamella`."""
        words = ["verify", f"--json={folder / 'result.json'}", *_options(self, ("kind", "ratios"))]
        return words if self.ratios else [*words, "--no-ratios"]

    def out(self) -> str | None:
        """It writes nothing but its figures."""
        return None


class ExportJob(Strict):
    """Write a model for other tools: `lamella export`."""

    kind: Literal["export"]
    source: Word
    """A run directory, or the folder of a converted model."""
    to: Literal["auto", "glm4-moe", "mixtral", "qwen3-moe", "qwen2-moe", "ernie", "gguf", "dense", "lamella"]
    """It becomes this."""
    out_folder: Word = Field(alias="out")
    """The exported model is written to this folder."""
    dtype: Stored | None = None
    """The weights are stored so: INT8 and INT4 with `to: lamella`, the other quantised ones in a GGUF file alone; null:
    as they are."""
    max_shard_size: Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,3})?[KMGT]?i?B$")] | None = None
    """The weights are cut into files of at most this size, such as 2GB; null: 5GB."""
    mode: Literal["dense"] | None = None
    """With `to: dense`, of a trained model: its trained copies and routers are left out."""
    tokenizer: Word | None = None
    """A GGUF file gets the tokenizer of this GGUF file."""
    step: Annotated[int, Field(ge=0, le=10**12)] | None = None
    """A run's checkpoint of this step is taken; null: the newest."""
    compare: bool = Field(default=True, alias="check")
    """The export is loaded again in plain transformers or llama.cpp, and its logits compared."""
    overwrite: bool = False
    """What is in the folder is replaced."""

    def check(self) -> None:
        """There is nothing more to check."""

    def files(self) -> dict[str, str]:
        """It reads none."""
        return {}

    def words(self, folder: Path, ranks: int) -> list[str]:
        """The command's words after `lamella`."""
        words = ["export", f"--out={self.out_folder}", *_options(self, ("kind", "source", "out_folder", "compare"))]
        return [*words, *([] if self.compare else ["--no-check"]), "--", self.source]

    def out(self) -> str | None:
        """The folder that no other job may write meanwhile."""
        return self.out_folder


Job: TypeAlias = Annotated[TrainJob | ConvertJob | VerifyJob | EvaluateJob | ExportJob, Field(discriminator="kind")]
Kind = Literal["train", "convert", "verify", "evaluate", "export"]


class Cluster(Strict):
    """Where and how an executor other than `local` runs a job."""

    nodes: Annotated[int, Field(ge=1, le=10_000)] = 1
    """The job takes this many machines."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 8
    """It takes this many GPUs of each; 0: none."""
    gpu: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,40}$")] | None = None
    """The GPUs are of this kind, as SkyPilot or Slurm calls it."""
    cores_per_node: Annotated[int, Field(ge=1, le=4096)] = 64
    """It takes this many cores of each machine."""
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,3}:\d{2}:\d{2}$")] = "24:00:00"
    """Slurm: it may run so long at once; training saves and goes on in the next turn."""
    partition: Annotated[str, Field(pattern=r"^[A-Za-z0-9._,-]{1,100}$")] | None = None
    """Slurm: the partition."""
    account: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")] | None = None
    """Slurm: the account."""
    image: Annotated[str, Field(pattern=r"^[A-Za-z0-9._/:@-]{1,300}$")] = "lamella:latest"
    """Kubernetes: the container image, in which lamella is installed."""
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = "default"
    """Kubernetes: the namespace."""
    runtime: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")] = "torch-distributed"
    """Kubernetes: the ClusterTrainingRuntime of Kubeflow Trainer."""
    volume: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?$")] | None = None
    """Kubernetes: the claim of the shared volume that holds models and run directories."""
    cloud: Annotated[str, Field(pattern=r"^[A-Za-z0-9_/-]{1,100}$")] | None = None
    """SkyPilot: the cloud or cluster; null: whatever is cheapest."""
    spot: bool = False
    """SkyPilot: machines that may be taken away at any time."""
    bucket: (
        Annotated[str, Field(pattern=r"^(s3|gs|r2)://[a-z0-9][a-z0-9._-]{1,62}(/[A-Za-z0-9._-]{1,99})*$")] | None
    ) = None
    """SkyPilot: the bucket that is mounted as the folder in which jobs run: models, and what jobs write, lie there."""

    @property
    def ranks(self) -> int:
        """Processes of a training run: one for each GPU, or for each node without."""
        return self.nodes * max(1, self.gpus_per_node)


class Submission(Strict):
    """A job, and how it is to be run."""

    job: Job
    name: Name = ""
    """People know it by this name; empty: one is made."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Of the runs that wait, those of higher priority start first."""
    cores: Annotated[int, Field(ge=1, le=4096)] | None = None
    """On a machine without GPUs the job computes with this many cores; null: all."""
    executor: Literal["local", "slurm", "kubernetes", "skypilot"] = "local"
    """The job runs on this machine, or there."""
    cluster: Cluster = Cluster()
    """How, where it is not this machine."""

    def check(self) -> None:
        """UserError with all problems of the job at once."""
        self.job.check()
        if self.executor != "local" and isinstance(self.job, TrainJob):
            for stage in self.job.stages():
                stage.check_world_size(self.cluster.ranks)
        if self.executor == "skypilot":
            self._check_kept()

    def _check_kept(self) -> None:
        """UserError where what the job makes would go with the machine that SkyPilot gives back."""
        if isinstance(self.job, TrainJob):
            folders = [stage.checkpoint_folder or "" for stage in self.job.stages()]
            if not all("://" in folder for folder in folders):
                raise UserError("machines of SkyPilot keep nothing: set checkpoint_folder, such as s3://bucket/run")
            return
        out = self.job.out()
        if out is None or "://" in out or (self.cluster.bucket and not Path(out).is_absolute()):
            return
        raise UserError(
            f"machines of SkyPilot keep nothing, {out} neither: name a bucket (--cluster bucket=s3://NAME) and a "
            "folder in it, such as out=moe"
        )

    def ranks(self, capacity: Capacity) -> int:
        """Processes of a training run."""
        if self.executor != "local":
            return self.cluster.ranks
        asked = self.job.ranks if isinstance(self.job, TrainJob) else None
        return asked or capacity.gpus or 1

    def needs(self, capacity: Capacity) -> tuple[int, int]:
        """(GPUs, cores) of this machine.

        Raises:
            UserError: more than it has.
        """
        if self.executor != "local":
            return 0, 0
        ranks = self.ranks(capacity)
        if isinstance(self.job, TrainJob):
            most = capacity.gpus or RANKS_PER_CORE * capacity.cores
            if ranks > most:
                there = f"{capacity.gpus} GPUs" if capacity.gpus else f"{capacity.cores} cores, for {most} ranks"
                raise UserError(f"{ranks} ranks are more than this machine can run: it has {there}")
            for stage in self.job.stages():
                stage.check_world_size(ranks)
        if self.cores is not None and self.cores > capacity.cores:
            raise UserError(f"{self.cores} cores are more than the {capacity.cores} of this machine")
        if capacity.gpus:
            return (ranks if isinstance(self.job, TrainJob) else 1), self.cores or 0
        return 0, self.cores or capacity.cores

    def strings(self) -> Iterator[tuple[str, str]]:
        """(key, value) of every text in the job, nested ones too."""
        return _strings("", self.job.model_dump(exclude={"kind"}))


def _options(job: Strict, without: Sequence[str]) -> list[str]:
    """--name=value of the fields that are set to something else than nothing."""
    words = []
    for name, value in job.model_dump(by_alias=False).items():
        if name in without or value is None or value is False:
            continue
        option = f"--{name.replace('_', '-')}"
        words.append(option if value is True else f"{option}={value}")
    return words


def _strings(key: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield key, str(name)
            yield from _strings(f"{key}.{name}" if key else str(name), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(key, inner)
