"""From Python as short as the command: a dense model in, a transformers model and its tokenizer out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamella.calibrate import CalibrationStep


def convert(
    model: str | Path | None = None,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    on_progress: Callable[[CalibrationStep], None] = lambda _: None,
    **recipe: Any,
) -> tuple[Any, Any]:
    """Convert a dense model and load the result; both generate at once.

        model, tokenizer = lamella.convert("path/to/Llama", method="partition", active=8)

    Args:
        model: folder, .gguf file or hub name; None: the embedded SmolLM2-135M.
        out: folder to keep; None keeps none.
        overwrite: replace the checkpoint in `out`.
        on_progress: told of each step of a calibration (`lamella.calibrate.CalibrationStep`).
        recipe: the keys of a conversion recipe: `method` and the method's own (`lamella keys convert METHOD`).

    Returns:
        (transformers model in evaluation mode, in the checkpoint's dtype; its tokenizer). `model.lamella_report` is the
        `lamella.conversion.ConversionReport`: times, sizes, and the guard's verdicts.

    Raises:
        UserError: as the command, before anything is written.
    """
    from lamella import conversion
    from lamella.recipe.conversion import make_conversion

    chosen = make_conversion(recipe | {"model": model, "out": out})
    with tempfile.TemporaryDirectory(prefix="lamella.") as folder:
        place = Path(folder) / "model" if out is None else Path(out)
        report = conversion.convert(chosen.model, place, chosen.options, overwrite=overwrite, on_progress=on_progress)
        converted, tokenizer = load(place)  # mapped files live on without their names
    converted.lamella_report = report
    return converted, tokenizer


def load(folder: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder that lamella made, or of a dense one."""
    from transformers import AutoTokenizer

    from lamella.hf.models import load as load_model

    return load_model(folder), AutoTokenizer.from_pretrained(folder)


def generate(
    folder: str | Path, prompt: str | list[str], *, chat: bool = False, dtype: str = "auto", device: str = "auto",
    **sampling: Any,
) -> list[str]:  # fmt: skip
    """What a model writes after each prompt.

        lamella.generate("artifacts/moe", "The capital of France is", max_tokens=20)

    `lamella.generation.Generator` does the same for a model that stays loaded, token by token.

    Args:
        folder: of any model that lamella writes, a run directory, a dense model, "embedded" or a hub name.
        prompt: one, or several that are computed together.
        chat: a prompt is what a user says; the answer is in the model's chat template.
        dtype: float32, bfloat16, float16, int8, or "auto" as the file is stored.
        sampling: fields of `lamella.generation.sampling.Sampling`: max_tokens, temperature, top_p, seed, stop, ...

    Raises:
        UserError: as the command.
    """
    from lamella.generation import Generator
    from lamella.generation.sampling import Sampling

    chosen = Sampling(**sampling)
    generator = Generator.open(str(folder), dtype, device)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    given = [[{"role": "user", "content": text}] for text in prompts] if chat else prompts
    return [answer.text for answer in generator.generate(given, chosen)]
