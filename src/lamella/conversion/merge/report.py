"""How a merge's routers send the prompts' tokens, layer by layer: for the manifest, the card and people."""

from __future__ import annotations

from torch import Tensor

from lamella.conversion.merge.fit import Seen, held_out
from lamella.conversion.merge.parts import Merge
from lamella.jsons import Json


def notes_of(found: list[dict[str, Tensor]], seen: Seen, merge: Merge) -> Json:
    """The figures of each layer, and the sentence about all of them."""
    layers: list[Json] = [
        {
            "accuracy": round(layer["accuracy"].item(), 4), "entropy": round(layer["entropy"].item(), 4),
            "load": [round(share, 4) for share in layer["load"].tolist()],
        }
        for layer in found
    ]  # fmt: skip
    measured_on = "held-out prompts" if held_out(seen).any() else "the prompts themselves"
    accuracy = [layer["accuracy"] for layer in layers]
    heaviest = max(max(layer["load"]) * len(layer["load"]) for layer in layers)
    summary = (
        f"the most likely expert is that of the prompt for {sum(accuracy) / len(accuracy):.1%} of the tokens of "
        f"{measured_on} (mean of {len(layers)} layers, {min(accuracy):.1%} in the worst; by chance "
        f"{1 / len(merge.experts):.1%}), and no expert has more than {heaviest:.2f} times its share"
    )
    return {"measured_on": measured_on, "summary": summary, "layers": layers}


def table(gates: Json) -> str:
    """A line per layer: accuracy, entropy and load."""
    lines = ["layer  top-1   entropy  load of the experts"]
    for index, layer in enumerate(gates["layers"]):
        load = " ".join(f"{share:5.1%}" for share in layer["load"][:8])
        more = " ..." if len(layer["load"]) > 8 else ""
        lines.append(f"{index:>5}  {layer['accuracy']:6.1%}  {layer['entropy']:7.2f}  {load}{more}")
    return "\n".join(lines)
