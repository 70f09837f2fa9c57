"""Bad input: one clear error, exit code 2, and nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella.conversion import SliceOptions, convert
from lamella.errors import UserError
from lamella.export import export
from lamella.recipe.conversion import load_conversion
from support.models import tiny_checkpoint

pytestmark = pytest.mark.faults


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def resize(by: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:by] if by < 0 else data + bytes(by))

    return apply


def replace_weights(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(data) and None


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def nan_in_a_matrix(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")


Q = "model.layers.1.self_attn.q_proj.weight"
ROPE = {"rope_type": "spiral", "rope_theta": 1e4}
OVERLAP = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode()
WRONG = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}).encode()
BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown architecture": (
        change_config(model_type="lama"),
        "unknown architecture 'lama'.*did you mean 'llama'.*qwen3",
    ),
    "no causal model": (change_config(architectures=["LlamaForSequenceClassification"]), "only LlamaForCausalLM"),
    "already sliced": (change_config(model_type="lamella_llama"), "converted already"),
    "quantised": (change_config(quantization_config={"quant_method": "awq"}), "quantised"),
    "mlp bias": (change_config(mlp_bias=True), "mlp_bias"),
    "activation": (change_config(hidden_act="mish"), "hidden_act is 'mish'"),
    "unknown rope": (change_config(rope_parameters=ROPE), "unknown rope type 'spiral'"),
    "unknown older rope": (change_config(rope_parameters=None, rope_scaling={"type": "spiral"}), "unknown rope type"),
    "config lacks a key": (change_config(hidden_size=None), "config.json lacks hidden_size"),
    "no heads": (change_config(num_attention_heads=0), "lacks num_attention_heads"),
    "head_dim is a word": (change_config(head_dim="x"), "lacks head_dim"),
    "rope is a list": (change_config(rope_parameters=[1]), "rope_parameters"),
    "endless layers": (change_config(num_hidden_layers=1 << 70), "at most 10000"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "pickle": (pickled, "pickled"),
    "missing tensor": (change_tensors(lambda t: t.pop(Q)), f"missing: {Q}"),
    "extra tensor": (change_tensors(lambda t: t.update(score=torch.ones(2))), "not of this architecture: score"),
    "wrong shape": (change_tensors(lambda t: t.update({Q: torch.ones(32, 31)})), r"\[32, 31\] instead of \[32, 32\]"),
    "wrong depth": (change_config(num_hidden_layers=2), "not of this architecture: model.layers.2"),
    "other dtype": (change_tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})), "dtype I8"),
    "head missing": (change_tensors(lambda t: t.pop("lm_head.weight")), "missing: lm_head.weight"),
    "truncated": (resize(-100), "truncated"),
    "truncated in the header": (replace_weights(b"\x00\x10\0\0\0\0\0\0{"), "truncated or not a safetensors file"),
    "empty file": (replace_weights(b""), "truncated or not a safetensors file"),
    "trailing bytes": (resize(8), "longer than its header says"),
    "header is no JSON": (replace_weights(b"\x08\0\0\0\0\0\0\0notjson!"), "broken safetensors header"),
    "wrong byte range": (replace_weights(len(WRONG).to_bytes(8, "little") + WRONG + bytes(8)), "not those of F32"),
    "header entry is a number": (replace_weights(b"\x08\0\0\0\0\0\0\0" + b'{"a": 1}'), "broken safetensors header"),
    "gap in the file": (replace_weights(len(OVERLAP).to_bytes(8, "little") + OVERLAP + bytes(8)), "follows a gap"),
    "not a number": (change_tensors(nan_in_a_matrix), "NaN"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model(case: str, tmp_path: Path) -> None:
    break_it, message = BAD_MODELS[case]
    dense = tiny_checkpoint(tmp_path / "dense")
    break_it(dense)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message):
        convert(dense, tmp_path / "deep/moe", SliceOptions(slices=4))
    assert tree(tmp_path) == before


def missing_shard(folder: Path) -> None:
    next(folder.glob("*00002-of*.safetensors")).unlink()


def change_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return apply


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (missing_shard, "names model-00002-of-.*not in"),
    "named in the wrong file": (change_index(lambda m: m.update({Q: m["lm_head.weight"]})), "but it does not"),
    "not named": (change_index(lambda m: m.pop(Q)), "which it does not name"),
    "outside": (change_index(lambda m: m.update({Q: "../x.safetensors"})), "not a file beside it"),
    "empty": (change_index(lambda m: m.clear()), "no weight_map"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards(case: str, tmp_path: Path) -> None:
    break_it, message = BAD_SHARDS[case]
    dense = tiny_checkpoint(tmp_path / "dense", sharded=True)
    break_it(dense)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message):
        convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    assert tree(tmp_path) == before


BAD_OPTIONS: dict[str, tuple[dict, str]] = {
    "width": ({"slices": 5}, r"48 is not divisible by 5 slices; choose one of \[2, 3, 4"),
    "no slices": ({"slices": 0}, "not divisible by 0"),
    "top-k larger": ({"slices": 4, "routing": "flat", "top_k": 9}, "top-k 9 is larger than the 8 experts"),
    "twin top-k": ({"slices": 4, "top_k": 3}, "top-k must be 4"),
    "top-k 0": ({"slices": 4, "routing": "flat", "top_k": 0}, "at least 1"),
    "layer": ({"slices": 4, "layers": "3"}, "the model has the layers 0-2"),
    "routing": ({"routing": "twins"}, "did you mean 'twin'"),
    "gate": ({"gate": "relu"}, "sigmoid, softmax"),
    "dtype": ({"dtype": "float23"}, "did you mean 'float32'"),
    "noise": ({"noise": -1.0}, "noise is -1.0"),
    "noise nan": ({"noise": float("nan")}, "noise is nan"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case: str, tmp_path: Path) -> None:
    options, message = BAD_OPTIONS[case]
    dense = tiny_checkpoint(tmp_path / "dense")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message):
        convert(dense, tmp_path / "moe", SliceOptions(**options))
    assert tree(tmp_path) == before


def test_float16_overflow_keeps_nothing(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    change_tensors(lambda tensors: tensors[Q].mul_(1e6))(dense)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="beyond float16's range"):
        convert(dense, tmp_path / "moe", SliceOptions(slices=4, dtype="float16"))
    assert tree(tmp_path) == before


def test_gate_and_up_of_different_dtypes(tmp_path: Path) -> None:
    dense, up = tiny_checkpoint(tmp_path / "dense"), "model.layers.0.mlp.up_proj.weight"
    change_tensors(lambda tensors: tensors.update({up: tensors[up].bfloat16()}))(dense)
    with pytest.raises(UserError, match="choose one for all with --dtype"):
        convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    convert(dense, tmp_path / "moe", SliceOptions(slices=4, dtype="bfloat16"))


@pytest.mark.parametrize("name", ["./nowhere", "no/such/folder", "a b", "nowhere.gguf", "~/nowhere-at-all"])
def test_no_such_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model"):
        convert(name, tmp_path / "moe")
    assert tree(tmp_path) == {}


def test_hub_name_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no such model: nobody/nothing"):
        convert("nobody/nothing", tmp_path / "moe")
    assert tree(tmp_path) == {}


def test_a_hub_model_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own cache layout, as a download leaves it; without a network."""
    import huggingface_hub.constants

    commit, cache = "0123456789" * 4, tmp_path / "hub/models--tiny--llama"
    tiny_checkpoint(cache / "snapshots" / commit, sharded=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    convert("tiny/llama", tmp_path / "moe", SliceOptions(slices=4))
    assert json.loads((tmp_path / "moe/lamella.json").read_text())["source"]["model"] == f"tiny/llama@{commit}"
    change_config(model_type="bloom")(cache / "snapshots" / commit)
    with pytest.raises(UserError, match="bloom models cannot be converted"):
        convert("tiny/llama", tmp_path / "moe2")


def test_a_weights_file_is_no_model(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(UserError, match="give the folder"):
        convert(dense / "model.safetensors", tmp_path / "moe")


BAD_RECIPES = {
    "method: slices": "unknown method 'slices' .did you mean 'slice'..; known: slice, partition, upcycle",
    "slice: 4": "unknown key 'slice' of method 'slice' .did you mean 'slices'",
    "{method: partition, neuron: random}": "unknown key 'neuron' of method 'partition' .did you mean 'neurons'",
    "{method: partition, calibration: {token: 9}}": "unknown key 'calibration.token'.*did you mean 'num_tokens'",
    "{method: partition, neurons: gradiant-max}": "did you mean 'gradient-max'",
    "{method: partition, active: many}": "active: Input should be a valid integer.*not 'many'",
    "{method: partition, guard: {metric: kl, total: -1}}": "the guard's total is -1.0; for kl it is at least 0",
    "{method: partition, scale_factor: 2}": "scale_factor has no effect on gate 'unit'",
    "{model: 3}": "model: Input should be a valid string, not 3",
}


@pytest.mark.parametrize("text", BAD_RECIPES)
def test_bad_recipes(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=BAD_RECIPES[text]):
        load_conversion(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parts=5"], "the FFN width .* is not divisible into 5 parts"),
        (["parts=4", "active=5"], "5 of 4 parts cannot be active"),
        (["parts=4", "active=2", "shared=2"], "2 shared parts leave no routed one of 2 active parts"),
        (["parts=4", "active=2", "first_dense=3"], "leave none of the model's"),
        (["parts=4", "active=2", "layers=7"], "layers names 7"),
        (["parts=4", "active=2", "shared=0", "calibration.sequence_length=64"], "has no tokenizer"),
    ],
)
def test_partitions_that_do_not_fit_the_model(tmp_path: Path, words: list[str], message: str) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    options = load_conversion(None, ["method=partition", *words]).options
    with pytest.raises(UserError, match=message):
        convert(dense, tmp_path / "moe", options)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


OUTPUTS: dict[str, tuple[Callable[[Path], Path], bool, str]] = {
    "exists": (lambda tmp: tmp / "dense", False, "--overwrite"),
    "is the source": (lambda tmp: tmp / "dense", True, "holds the model that is to be read"),
    "is a file": (lambda tmp: tmp / "dense/config.json", True, "not a folder"),
    "is no checkpoint": (lambda tmp: tmp, True, "not a checkpoint"),
    "links to the source": (lambda tmp: links_to(tmp / "dense"), True, "holds the model that is to be read"),
    "within a file": (lambda tmp: tmp / "dense/config.json/moe", False, "cannot write into"),
}


def links_to(folder: Path) -> Path:
    """As the hub's cache does, the folder's weights become links to files elsewhere."""
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to(folder.parent / "blob")
    return folder


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    monkeypatch.chdir(tiny_checkpoint(tmp_path / "here"))
    with pytest.raises(UserError, match="working directory itself"):
        convert(dense, ".", SliceOptions(slices=4), overwrite=True)


@pytest.mark.parametrize("case", OUTPUTS)
def test_bad_output(case: str, tmp_path: Path) -> None:
    place, overwrite, message = OUTPUTS[case]
    dense = tiny_checkpoint(tmp_path / "dense")
    out = place(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message):
        convert(dense, out, SliceOptions(slices=4), overwrite=overwrite)
    assert tree(tmp_path) == before


def test_not_enough_room_is_found_before_writing(tmp_path: Path) -> None:
    from lamella.checkpoint.write import check_output

    with pytest.raises(UserError, match="are free"):
        check_output(tmp_path / "moe", False, 1 << 60)
    assert tree(tmp_path) == {}


def test_to_dense_wants_a_whole_converted_checkpoint(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(UserError, match="is not converted"):
        export(dense, "dense", tmp_path / "back", check=False)
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    change_tensors(lambda tensors: tensors.pop("model.layers.1.mlp.experts.frozen_down_proj"))(tmp_path / "moe")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\.mlp\.experts\.frozen_down_proj"):
        export(tmp_path / "moe", "dense", tmp_path / "back", check=False)
    assert tree(tmp_path) == before


ROOT = Path(__file__).parents[2]


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "convert_by_slicing.py"), *arguments]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slices", "5"], "not divisible"),
        (["--slices", "4", "--top-k", "99", "--routing", "flat"], "top-k 99"),
        (["--dtype", "int8"], "dtype is"),
    ],
)
def test_the_command_exits_with_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    before = tree(tmp_path)
    done = command("--model", str(dense), "--out", str(tmp_path / "moe"), *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_the_command_converts_once_and_says_what_next(tmp_path: Path) -> None:
    dense, out = tiny_checkpoint(tmp_path / "dense"), tmp_path / "moe"
    before = tree(tmp_path)
    dry = command("--model", str(dense), "--out", str(out), "--slices", "4", "--dry-run")
    assert dry.returncode == 0
    assert "model.layers.2.mlp.experts.trainable_down_proj" in dry.stdout
    assert tree(tmp_path) == before
    made = command("--model", str(dense), "--out", str(out), "--slices", "4")
    assert made.returncode == 0, made.stderr
    assert f"lamella verify --dense {dense} --moe {out}" in made.stdout
    size = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    assert f"{size / 1e9:.2f} GB" in made.stdout
    again = command("--model", str(dense), "--out", str(out), "--slices", "4")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


@pytest.mark.slow
def test_the_default_folder_is_kept_where_it_holds_this_conversion(tmp_path: Path) -> None:
    """Training and verifying make it as well, so the commands work in any order; another conversion is refused."""
    dense = tiny_checkpoint(tmp_path / "dense")
    words = ["--model", str(dense), "--slices", "4"]
    first = command(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    made = tree(tmp_path)
    again = command(*words, cwd=tmp_path)
    assert again.returncode == 0
    assert "holds this conversion already" in again.stdout
    other = command(*words, "--seed", "1", cwd=tmp_path)
    assert other.returncode == 2
    assert "--overwrite" in other.stderr
    assert tree(tmp_path) == made
