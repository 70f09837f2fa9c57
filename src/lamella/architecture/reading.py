"""What a config.json means: transformers' own config object is asked, and nothing else reads the JSON for meaning.

AutoConfig decides which class a config is (Mistral with `layer_types` is Ministral), the class which fields the family
has (a `sliding_window` in a Llama config is none), old spellings, defaults, and what follows from what.

Imports no torch: transformers' config classes do, so they are asked in another process (about 1 s), unless
transformers has been imported here anyway. Equal configs are asked once, and the answers of that process are kept.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lamella.architecture.kept import Kept
from lamella.errors import UserError

# Names that families share whatever their own fields are called (GPT-2's `n_embd` answers to `hidden_size`). The models
# read `head_dim` even where the class has no such field (Qwen2).
SHARED_NAMES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size", "head_dim",
)  # fmt: skip
# Of files, hubs and converted models; none says what the dense model computes.
_NOT_ASKED = ("auto_map", "architectures", "moe", "attention_moe", "adapters", "_name_or_path", "quantization_config")
_MOST_ANSWERS = 256
_TIMEOUT_S = 600  # a machine that has no memory left reads every library from the disk


@dataclass(frozen=True)
class Reading:
    """The fields of a config as transformers understands them."""

    model_type: str
    values: Mapping[str, Any]
    """The class's own fields and `SHARED_NAMES`, nothing that the class does not know."""


def read_meaning(config: dict[str, Any]) -> Reading:
    """transformers' reading of a dense model's config.json.

    Raises:
        UserError: a config that transformers refuses.
    """
    text = _asked(config)
    _ask([text])
    answer = _answers[text]
    if "refused" in answer:
        raise UserError(f"transformers does not accept this config.json: {answer['refused']}")
    return Reading(answer["model_type"], answer["values"])


def read_together(configs: Iterable[dict[str, Any]]) -> None:
    """Ask for several configs in one process; `read_meaning` then has its answers without another."""
    _ask([_asked(config) for config in configs])


def _asked(config: dict[str, Any]) -> str:
    asked = {key: value for key, value in config.items() if key not in _NOT_ASKED}
    try:
        return json.dumps(asked, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"config.json is damaged ({error}); copy it again from the model's source") from None


_answers: dict[str, dict[str, Any]] = {}


def _ask(texts: list[str]) -> None:
    """Fill in the answers that are not there yet."""
    new = [text for text in dict.fromkeys(texts) if text not in _answers]
    if not new:
        return
    if len(_answers) > _MOST_ANSWERS:
        _answers.clear()
        new = list(dict.fromkeys(texts))
    if "transformers" in sys.modules:
        _answers.update((text, answer(text)) for text in new)
        return
    kept = Kept("configs", __file__, _MOST_ANSWERS)
    found = {text: kept.get([text.encode()]) for text in new}
    _answers.update((text, told) for text, told in found.items() if told is not None and _is_reading(told))
    if new := [text for text in new if text not in _answers]:
        _ask_elsewhere(new)
        for text in new:
            if _is_reading(_answers[text]):
                kept.put([text.encode()], _answers[text])


def _is_reading(found: Any) -> bool:
    """Whether it is an answer that says something: refusals are asked for again."""
    return isinstance(found, dict) and isinstance(found.get("values"), dict) and "model_type" in found


def _ask_elsewhere(new: list[str]) -> None:
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(new), capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode < 0:  # killed: it says nothing about the config
        raise ChildProcessError(f"the process that reads config.json was killed by signal {-done.returncode}")
    if done.returncode != 0 or not done.stdout:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        _answers.update((text, {"refused": reason}) for text in new)
        return
    _answers.update(zip(new, json.loads(done.stdout.splitlines()[-1]), strict=True))


def answer(text: str) -> dict[str, Any]:
    """{model_type, values} of a config.json's text, or {refused: why}; imports transformers."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(text, encoding="utf-8")
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        own = {field.name for field in fields(config)}
        names = own | {name for name in SHARED_NAMES if hasattr(config, name)}
        if null := [name for name in names - own if getattr(config, name) is None]:
            return {"refused": f"{null[0]} is null, which {type(config).__name__} does not fill in; leave it out"}
        values = {name: getattr(config, name) for name in sorted(names)}
        values["dtype"] = str(values.get("dtype") or "float32").removeprefix("torch.")
        return {"model_type": config.model_type, "values": json.loads(json.dumps(values, default=str))}
    except (
        StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, IndexError, OSError,
        RecursionError, ImportError,
    ) as error:  # fmt: skip
        text = " ".join(str(error).replace(folder, "the model's folder").split())
        return {"refused": text.partition(" in (<class")[0]}
    finally:
        logging.set_verbosity(verbosity)


# Config classes and tokenizers work without these; torch takes seconds, the others a tenth of one.
_HIDDEN = ("torch", "torchvision", "torchaudio", "PIL", "pygments")


class _Hiding:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in _HIDDEN:
            raise ModuleNotFoundError(name)


def hide_torch() -> None:
    """Let this process import transformers without torch: for config classes and tokenizers, in seconds less."""
    find = importlib.util.find_spec
    sys.meta_path.insert(0, _Hiding())  # type: ignore[arg-type]

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name.partition(".")[0] in _HIDDEN else find(name, package)

    importlib.util.find_spec = find_spec


def main() -> None:
    """Answer a list of config.json from standard input, in a process of its own."""
    hide_torch()
    print(json.dumps([answer(text) for text in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
