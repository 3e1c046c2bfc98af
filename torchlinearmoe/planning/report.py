"""A plan as text: a few tables that fit a terminal or a log file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from torchlinearmoe.metrics.console import format_number
from torchlinearmoe.planning.time import Machine

MEMORY = {
    "parameters": "float32 masters, this rank's part",
    "padding": "equal shards on all ranks",
    "gradients": "float32 shards; {dtype} where nothing is sharded or summed",
    "optimizer": "its states",
    "gathered_weights": "{dtype}; kept units and two blocks, or a pipeline stage",
    "gradient_buffers": "of the largest block",
    "activations": "estimate: projections, norms, experts; no scores",
    "loss": "estimate: logits of a chunk, gradients of head and hidden states",
    "total": "the sum; not all of it is held at once",
}
"""Rows of the memory table and what each counts."""


def print_plan(plan: dict[str, Any], stream: TextIO) -> None:
    """Write `plan`, made by `planning.plan`, to `stream` for people."""
    from rich.console import Console

    # In a pipe the tables keep their width, so that nothing is cut.
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 110)
    for table in (_parameters(plan), _flops(plan), _step(plan), _memory(plan), *_communication(plan)):
        console.print(table)


def print_choice(rows: Sequence[dict[str, Any]], machine: Machine, stream: TextIO) -> None:
    """Write the rows of `planning.choose_layouts` to `stream` for people, those of a GPU's memory together."""
    from rich.console import Console

    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 150)
    caption = (
        f"seconds: estimates, at {machine.flops / 1e12:.0f} TFLOP/s a GPU, {machine.node_bytes / 1e9:.0f} GB/s to its "
        f"node of {machine.node_ranks} and {machine.network_bytes / 1e9:.0f} GB/s to others; waits: for other ranks\n"
        f"memory: of the rank that holds most, experts evenly loaded; at most {machine.usable:.0%} of a GPU"
    )
    columns = ("ranks", "tokens a sequence", "memory", "tokens a step", "step, s", "waits, s", "tokens/s", "a GPU")
    for memory in dict.fromkeys(row["gpu_gib"] for row in rows):
        title = f"Fastest layout that fits into GPUs of {memory:g} GiB"
        table = _table(title, *columns, "layout, or why there is none", caption=caption)
        for row in (row for row in rows if row["gpu_gib"] == memory):
            table.add_row(str(row["world_size"]), f"{row['sequence_length']:,}", *_chosen(row))
        console.print(table)


def _chosen(row: dict[str, Any]) -> tuple[str, ...]:
    if not row["fits"]:
        return ("",) * 6 + (row["why"],)
    seconds, speed = row["seconds"], row["tokens_per_second"]
    return (
        format_bytes(row["memory"]["total"]),
        f"{row['tokens_per_step']:,}",
        f"{seconds['total']:.2f}",
        f"{seconds['total'] - seconds['compute']:.2f}",
        f"{speed:,.0f}",
        f"{speed / row['world_size']:,.0f}",
        layout_text(row["layout"]),
    )


def layout_text(layout: dict[str, Any]) -> str:
    """The degrees above 1 and what runs again.

    >>> layout_text({"context": 8, "tensor": 1, "expert": 4, "data_shard": 2, "activation_checkpointing": "full"})
    'context 8, expert 4, data_shard 2, checkpointing full'
    """
    shown = [f"{axis} {degree}" for axis, degree in layout.items() if isinstance(degree, int) and degree > 1]
    return ", ".join([*shown, f"checkpointing {layout['activation_checkpointing']}"])


def _table(title: str, *columns: str, caption: str | None = None):
    """A table whose first and last columns are words and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, len(columns) - 1) else "right")
    return table


def format_bytes(size: float) -> str:
    """Bytes in binary units.

    >>> [format_bytes(n) for n in (0, 512, 1536, 3 * 2**30)]
    ['0 B', '512 B', '1.5 KiB', '3.0 GiB']
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _parameters(plan: dict[str, Any]):
    counts = plan["parameters"]
    caption = f"embedding and head included; {plan['checkpoint_bytes'] / 2**30:.2f} GiB a checkpoint"
    table = _table("Parameters", "part", "layers", "each", "all", "active", "", caption=caption)
    for kind in counts["kinds"]:
        layers = kind["layers"]
        rows = [
            (kind["mixer"], kind["mixer_parameters"], kind["mixer_active"], ""),
            ("  feed-forward", kind["ffn_parameters"], kind["ffn_active"], ""),
            ("  norms", kind["norm_parameters"], kind["norm_parameters"], ""),
        ]
        for name, each, active, note in rows:
            if not each:  # no feed-forward, or no norm before it
                continue
            table.add_row(name, str(layers), f"{each:,}", f"{each * layers:,}", f"{active * layers:,}", note)
    for name in ("embedding", "head", "shared", "final_norm"):
        size, note = counts[name], "tied to the embedding" if name == "head" and not counts["head"] else ""
        if size or note:
            table.add_row(name.replace("_", " "), "", "", f"{size:,}", f"{size:,}", note)
    share = f"{counts['active'] / counts['total']:.0%} active"
    table.add_row("total", "", "", f"{counts['total']:,}", f"{counts['active']:,}", share)
    return table


def _flops(plan: dict[str, Any]):
    flops = plan["flops"]
    table = _table(f"FLOPs a token, documents of {flops['document_length']} tokens", "term", "GFLOP", "formula")
    for term in flops["forward_terms"]:
        table.add_row(term["name"], f"{term['flops'] / 1e9:.4f}", term["formula"])
    table.add_row("forward", f"{flops['forward_per_token'] / 1e9:.4f}", "the sum")
    table.add_row("training", f"{flops['training_per_token'] / 1e9:.4f}", "3 x forward")
    return table


def _step(plan: dict[str, Any]):
    step, run, mesh = plan["step"], plan["run"], plan["mesh"]
    degrees = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if axis != "expert")
    table = _table("Layout and run", "", "")
    table.add_row("mesh", f"{degrees} = {plan['world_size']} ranks, expert {mesh['expert']}")
    if step["stages"]:
        table.add_row("stages", "layers " + ", ".join(f"{start}-{stop - 1}" for start, stop in step["stages"]))
    table.add_row("compute type", plan["dtype"])
    table.add_row(
        "tokens a step",
        f"{step['tokens']:,} = {step['sequence_length']} x {step['micro_batch_size']} x "
        f"{mesh['data_replicate'] * mesh['data_shard']} data ranks x {step['accumulation']} micro-batches",
    )
    table.add_row("run", f"{run['steps']:,} steps, {format_number(run['tokens'])} tokens")
    table.add_row("work", f"{step['flops_per_rank'] / 1e12:.2f} TFLOP a step and rank")
    return table


def _memory(plan: dict[str, Any]):
    own, largest = plan["memory"]["rank"], plan["memory"]["largest"]
    same = own == largest
    columns = [f"rank {own['rank']}"] + ([] if same else [f"rank {largest['rank']}"])
    title = "Memory" + (f" (no rank holds more than rank {own['rank']})" if same else "")
    table = _table(title, "", *columns, "what it counts")
    for row, note in MEMORY.items():
        if row == "gradients" and plan["step"]["accumulation"] > 1:
            note = "float32, of the whole weights while micro-batches accumulate"
        values = [format_bytes(memory[row]) for memory in ([own] if same else [own, largest])]
        table.add_row(row.replace("_", " "), *values, note.format(dtype=plan["dtype"]))
    return table


def _communication(plan: dict[str, Any]) -> list:
    communication = plan["communication"]
    sent = format_bytes(communication["sent_bytes"])
    caption = f"{communication['units']} units; a rank sends {sent} a step; scalars and expert counts not counted"
    if communication["padding_factor"] > 1.05:
        factor = communication["padding_factor"]
        caption += f"\nbuffers are {factor:.1f} x the weights: those with fewer rows (or experts) than ranks are padded"
    table = _table(
        "Communication a step and rank", "axis", "ranks", "count", "buffers", "sent", "collective", caption=caption
    )
    for entry in communication["collectives"]:
        table.add_row(
            entry["axis"],
            str(entry["ranks"]),
            str(entry["count"]),
            format_bytes(entry["bytes"]),
            format_bytes(entry["sent_bytes"]),
            entry["operation"],
        )
    return [table, _spans(plan)] if communication["spans"] else [table]


def _spans(plan: dict[str, Any]):
    caption = "where a document crosses from rank to rank; else nothing is sent"
    title = "Between spans, a layer, micro-batch and rank"
    table = _table(title, "mixer", "layers", "count", "buffers", "collective", caption=caption)
    for kind in plan["communication"]["spans"]:
        for operation, count in kind["calls"].items():
            size = format_bytes(kind["bytes"][operation])
            table.add_row(kind["mixer"], str(kind["layers"]), str(count), size, operation)
    return table
