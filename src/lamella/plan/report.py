"""The plan as plain values, as text, and what it warns of."""

from __future__ import annotations

from lamella.jsons import Json
from lamella.plan.compute import ASSUMED_MFU, active_part, flops_per_token, gpu, tokens_per_s
from lamella.plan.faults import STORAGE_RATE, faults
from lamella.plan.layout import Layout
from lamella.plan.links import RANKS_PER_NODE
from lamella.plan.memory import fullest
from lamella.plan.roofline import roofline
from lamella.plan.suggest import GPU_RESERVE_BYTES, Suggestion, cuts_unevenly, even_layout

KEPT = {
    "none": "all activations of a layer",
    "selective": "a layer's products of attention and experts",
    "full": "a layer's input alone, the rest is computed again",
}


def plan_values(
    layout: Layout,
    gpu_name: str,
    price_per_hour: float | None = None,
    measured_tokens_per_s: float | None = None,
    per_node: int = RANKS_PER_NODE,
    storage_rate: float = STORAGE_RATE,
) -> Json:
    """Everything, in bytes, seconds, tokens and FLOPs.

    Args:
        price_per_hour: of one GPU.
        measured_tokens_per_s: of all ranks together; None assumes an MFU.
        per_node: ranks of a node.
        storage_rate: bytes a second that all ranks together write to where checkpoints are kept.
    """  # fmt: skip
    on_gpu = layout.device == "gpu"
    rate = measured_tokens_per_s or (tokens_per_s(layout, gpu_name) if on_gpu else None)
    recipe = layout.recipe
    step_tokens = recipe.samples_per_step * recipe.seq_len
    seconds = None if rate is None else recipe.steps * step_tokens / rate
    values = {
        "parameters": _parameters(layout),
        "ranks": {
            "ranks": layout.num_ranks,
            "shards_of_a_weight": layout.shards,
            "ranks_with_samples_of_their_own": layout.batch_ranks,
            **recipe.parallel.model_dump(),
        },
        "batch": {
            "tokens_per_step": step_tokens,
            "micro_batches_per_rank": layout.micro_batches,
            "tokens_per_micro_batch": layout.tokens,
            "activation_checkpointing": recipe.activation_checkpointing,
            "gradient_sync": recipe.gradient_sync,
            "steps": recipe.steps,
            "tokens": recipe.steps * step_tokens,
        },
        "memory_per_rank": _memory(layout, gpu_name),
        "time": {
            "flops_per_token": flops_per_token(layout),
            "tokens_per_s": rate,
            "assumed_mfu": None if measured_tokens_per_s or not on_gpu else ASSUMED_MFU,
            "pipeline_bubble": layout.bubble,
            "seconds": seconds,
            "gpu_hours": None if seconds is None else seconds * layout.num_ranks / 3600,
            "cost": None
            if seconds is None or price_per_hour is None
            else price_per_hour * layout.num_ranks * seconds / 3600,
        },
    }
    if on_gpu:
        step_s = step_tokens / rate if rate else 0.0
        values |= {"step": _step(layout, gpu_name, per_node), "faults": faults(layout, step_s, storage_rate).to_dict()}
    return values | {"warnings": warnings(layout, values)}


def _step(layout: Layout, gpu_name: str, per_node: int) -> Json:
    """What moves in a step, and the time that it takes at best."""
    best = roofline(layout, gpu_name, per_node)
    return {
        "ranks_per_node": per_node,
        "bytes_inside_of_a_node": round(best.traffic.all.inside),
        "bytes_over_the_network": round(best.traffic.all.network),
        "bytes_from_main_memory": round(best.traffic.fetched),
        "bytes_to_main_memory": round(best.traffic.returned),
        "roofline_mfu": best.mfu,
        "seconds": best.step_s,
        "seconds_of": {
            "products": best.products_s,
            "memory": best.memory_s,
            "recomputation": best.recomputed_s,
            "waiting": best.waited_s,
        },
    }


def _parameters(layout: Layout) -> dict[str, int]:
    weights = layout.model.weights()
    return {
        "all": sum(w.numel for w in weights),
        "active_per_token": round(sum(active_part(layout, w) * w.numel for w in weights)),
        "trained": sum(w.numel for w in weights if layout.trains(w)),
    }


def _memory(layout: Layout, gpu_name: str) -> Json:
    memory = fullest(layout)
    peak, main_memory = memory.peak(), memory.main_memory()
    most: dict[str, int] = {}
    for moment in memory.moments():
        most[moment.name] = max(most.get(moment.name, 0), moment.total_bytes)
    return {
        "peak_bytes": peak.total_bytes,
        "peak_moment": peak.name,
        "stage": memory.layout.stage,
        "parts": peak.parts,
        "moments": most,
        "main_memory_bytes": sum(main_memory.values()),
        "main_memory_parts": main_memory,
        "device_bytes": gpu(gpu_name)[1] if layout.device == "gpu" else None,
        "checkpoint_bytes": memory.checkpoint_bytes(),
    }


def warnings(layout: Layout, values: Json) -> list[str]:
    """What a person should know before starting this run."""
    found, memory, recipe = [], values["memory_per_rank"], layout.recipe
    if memory["device_bytes"] and memory["peak_bytes"] + GPU_RESERVE_BYTES > memory["device_bytes"]:
        found.append(
            f"does not fit: {gib(memory['peak_bytes'])} and {gib(GPU_RESERVE_BYTES)} in reserve are more than the "
            f"{gib(memory['device_bytes'])} of the GPU; use more ranks, activation_checkpointing: full, "
            f"offload: frozen or cpu, or fewer tokens in a micro-batch"
        )
    if layout.model.V % layout.shards:
        found.append(
            f"uneven vocabulary: {layout.shards} ranks do not divide {layout.model.V} ids; the last ranks hold less"
        )
    found += expert_warnings(layout)
    if layout.bubble > 0.2:
        found.append(
            f"idle ranks: with {layout.micro_batches} micro-batches for {recipe.parallel.pipeline} stages a rank waits "
            f"{layout.bubble:.0%} of the time; take more samples per step, or smaller micro-batches"
        )
    if layout.attention == "sdpa" and layout.device == "gpu":
        found.append("attention: sdpa holds a mask of tokens x tokens in every layer; flex holds none")
    return found


def expert_warnings(layout: Layout) -> list[str]:
    """What experts shared out over ranks cost."""
    found: list[str] = []
    if cuts_unevenly(layout):
        even = even_layout(layout)
        instead = "Take a number of ranks that divides the experts" if even is None else f"Set {even}"
        found.append(
            f"uneven experts: {layout.shards} ranks cannot cut them into equal parts; some ranks hold less. {instead}"
        )
    moe = layout.model.moe
    if moe is not None and moe.routing == "flat" and layout.recipe.parallel.expert > 1:
        found.append("uneven load: in flat routing a rank waits for the one whose experts were chosen most")
    return found


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def plan_text(values: Json) -> str:
    """Lines for a terminal."""
    parameters, batch, memory, time = (values[k] for k in ("parameters", "batch", "memory_per_rank", "time"))
    ranks = values["ranks"]
    lines = [
        f"parameters        {parameters['all']:,}; {parameters['active_per_token']:,} meet a token, "
        f"{parameters['trained']:,} train",
        f"ranks             {ranks['ranks']}; a weight is cut over {ranks['shards_of_a_weight']}",
        f"step              {batch['tokens_per_step']:,} tokens; each rank {batch['micro_batches_per_rank']} "
        f"micro-batches of {batch['tokens_per_micro_batch']:,}",
        f"kept for backward {KEPT[batch['activation_checkpointing']]}; gradients are summed over ranks once a "
        f"{batch['gradient_sync'].replace('_', '-')}",
        f"run               {batch['steps']:,} steps, {batch['tokens']:,} tokens",
        f"memory of a rank  {gib(memory['peak_bytes'])}, reached in the {memory['peak_moment']}"
        + (f" of stage {memory['stage']}" if ranks["pipeline"] > 1 else "")
        + (f"; the GPU has {gib(memory['device_bytes'])}" if memory["device_bytes"] else ""),
        *_part_lines(memory["parts"]),
        *_main_memory_lines(memory),
        f"checkpoint        {gib(memory['checkpoint_bytes'])} on disk",
        f"FLOPs             {time['flops_per_token']:.3e} a token",
        *_step_lines(values),
    ]
    if time["tokens_per_s"]:
        basis = f"assuming {time['assumed_mfu']:.0%} MFU" if time["assumed_mfu"] else "as given"
        if time["assumed_mfu"] and time["pipeline_bubble"]:
            basis += f", and {time['pipeline_bubble']:.0%} of the time idle between stages"
        lines.append(f"speed             {time['tokens_per_s']:,.0f} tokens/s, {basis}")
        lines.append(f"time              {time['seconds'] / 3600:.1f} h, {time['gpu_hours']:.1f} GPU hours")
    if time["cost"] is not None:
        lines.append(f"cost              {time['cost']:,.2f}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in values["warnings"])])


def _step_lines(values: Json) -> list[str]:
    """Of runs on GPUs."""
    if "step" not in values:
        return []
    step, fault = values["step"], values["faults"]
    storage = fault["storage_bytes_per_s"] / 1e9
    parts = ", ".join(f"{seconds:.2f} s {name}" for name, seconds in step["seconds_of"].items() if seconds >= 0.005)
    return [
        f"moved in a step   {gib(step['bytes_inside_of_a_node'])} a rank inside of a node, "
        f"{gib(step['bytes_over_the_network'])} over the network; nodes of {step['ranks_per_node']} ranks",
        *_copied_lines(step),
        f"roofline          {step['roofline_mfu']:.0%} MFU at best: a step in {step['seconds']:.2f} s; {parts}",
        f"checkpoint time   {fault['write_s']:.0f} s at {storage:.0f} GB/s, of which training waits "
        f"{fault['blocked_s']:.0f} s",
        f"faults            one in {_hours(fault['hours_between'])}; {fault['effective']:.1%} of the time trains, "
        f"{fault['best_effective']:.1%} with save_every_steps={fault['best_save_every_steps']}",
    ]


def _copied_lines(step: Json) -> list[str]:
    """Of runs with offload."""
    fetched, returned = step["bytes_from_main_memory"], step["bytes_to_main_memory"]
    return [f"main memory to GPU {gib(fetched)} a rank and step, {gib(returned)} back"] if fetched else []


def _hours(hours: float) -> str:
    return f"{hours:.0f} hours" if hours < 96 else f"{hours / 24:.0f} days"


def suggestion_text(suggestions: list[Suggestion]) -> str:
    """The layouts, the best first, for a terminal."""
    if not suggestions:
        return "suggested         no layout of these ranks fits: take more of them, or fewer tokens in a micro-batch"
    lines = [f"suggested         {suggestions[0].words()}"]
    header = ["memory", "main memory", "a step", "MFU", "in a node", "network", "layout"]
    rows = [
        [
            gib(s.peak_bytes), gib(s.main_memory_bytes) if s.main_memory_bytes else "",
            f"{s.roofline.step_s:.2f} s", f"{s.roofline.mfu:.0%}",
            gib(s.roofline.traffic.all.inside), gib(s.roofline.traffic.all.network), s.words(),
        ]
        for s in suggestions
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header) - 1)]
    for row in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join(["", *cells, row[-1]]))
    return "\n".join(lines)


def _main_memory_lines(memory: Json) -> list[str]:
    """Without a GPU, main memory is the memory of a rank."""
    if not memory["device_bytes"] or not memory["main_memory_bytes"]:
        return []
    return [f"main memory       {gib(memory['main_memory_bytes'])}", *_part_lines(memory["main_memory_parts"])]


def _part_lines(parts: dict[str, int]) -> list[str]:
    return [f"  {name:<18}{gib(value):>11}" for name, value in parts.items() if value]
