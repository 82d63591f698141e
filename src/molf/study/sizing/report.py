"""What a run needs: tables for a terminal, and whether a device has it."""

from rich import box
from rich.table import Table

from molf.study.sizing.memory import Count, Needs

_GIB = 2**30
_FLOAT_MOMENTS = 8  # bytes per element: two float32 moments
_TIGHT = 0.9  # the libraries' context and what the allocator wastes take the rest


def parameters_table(needs: Needs) -> Table:
    """Return the counts of parameters by kind."""
    table = Table(title="parameters", title_justify="left", box=box.SIMPLE)
    for column in ("kind", "total", "trainable"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, count in needs.parameters.items():
        table.add_row(kind, f"{count.total:,}", f"{count.trainable:,}")
    counts = needs.parameters.values()
    total = Count(sum(count.total for count in counts), sum(count.trainable for count in counts))
    table.add_section()
    table.add_row("all", f"{total.total:,}", f"{total.trainable:,}")
    return table


def memory_table(needs: Needs) -> Table:
    """Return the memory by part, and the most there is at a time."""
    memory, (batch, length) = needs.memory, needs.tokens
    table = Table(title=f"memory, {batch} x {length} tokens at a time", title_justify="left", box=box.SIMPLE)
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for label, size in (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer states", memory.states),
        ("LoRA pairs with their states", memory.lora),
        ("activations", memory.activations),
        ("  without gradient checkpointing", memory.activations_all),
        ("  with gradient checkpointing", memory.activations_checkpointed),
        ("logits", memory.logits),
    ):
        table.add_row(label, f"{size / _GIB:.2f}", style="dim" if label.startswith("  ") else "")
    table.add_section()
    table.add_row("peak", f"{memory.peak / _GIB:.2f}", style="bold")
    return table


def verdict(needs: Needs, available: int | None) -> str:
    """Say whether a run fits.

    Args:
        needs: What it needs.
        available: Memory of the device in bytes, or None where it is not known.

    Returns:
        A sentence, which starts with ``warning`` where it does not fit or hardly does.
    """
    peak = needs.memory.peak
    if available is None:
        return "no accelerator is visible; give the memory of the one to plan for as --memory_gb"
    sizes = f"{peak / _GIB:.1f} of {available / _GIB:.1f} GiB"
    if peak <= _TIGHT * available:
        return f"it fits: {sizes}"
    remedies = ["a smaller per_device_train_batch_size with more gradient_accumulation_steps", "a smaller max_length"]
    if needs.memory.activations > needs.memory.activations_checkpointed:
        remedies.insert(0, "gradient_checkpointing")
    trained = sum(count.trainable for kind, count in needs.parameters.items() if kind != "LoRA")
    if trained and needs.memory.states >= _FLOAT_MOMENTS * trained:
        remedies.append("method molf with optim_bits 8")
    if trained and needs.memory.freeing_gradients_helps:
        remedies.append("method molf with optimizer_in_backward")
    if trained:
        remedies.append("method molf_e or lora, which leave the base frozen")
    outcome = "does not fit" if peak > available else "hardly fits"
    return f"warning: it {outcome}: {sizes}; try {', '.join(remedies)}"
