"""Tables of what a run needs, and whether it fits on a device."""

from rich import box
from rich.table import Table

from molf.study.sizing.memory import Needs
from molf.study.sizing.parameters import base_count

_GIB = 2**30
_FLOAT_MOMENTS = 8  # bytes per element: two float32 moments
_TIGHT = 0.9  # the libraries' context and allocator overhead take the rest


def parameters_table(needs: Needs) -> Table:
    """Return a table of the parameter counts by kind."""
    table = Table(title="parameters", title_justify="left", box=box.SIMPLE)
    table.add_column("kind")
    for column in ("total", "trainable"):
        table.add_column(column, justify="right")
    for kind, count in needs.parameters.items():
        table.add_row(kind, f"{count.total:,}", f"{count.trainable:,}")
    total = base_count(needs.parameters) + needs.parameters["LoRA"]
    table.add_section()
    table.add_row("all", f"{total.total:,}", f"{total.trainable:,}")
    return table


def memory_table(needs: Needs) -> Table:
    """Return a table of the memory by use, and its peak."""
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
    """Say whether a run fits on a device, and what would lower its peak if it does not."""
    memory = needs.memory
    if available is None:
        return "no accelerator is visible; give the memory of the device to plan for as --memory_gb"
    sizes = f"{memory.peak / _GIB:.1f} of {available / _GIB:.1f} GiB"
    if memory.peak <= _TIGHT * available:
        return f"it fits: {sizes}"
    trained = base_count(needs.parameters).trainable
    remedies = {
        "gradient_checkpointing": memory.activations > memory.activations_checkpointed,
        "a smaller per_device_train_batch_size with more gradient_accumulation_steps": True,
        "a smaller max_length": True,
        "method molf with optim_bits 8": trained and memory.states >= _FLOAT_MOMENTS * trained,
        "method molf with optimizer_in_backward": trained and memory.freeing_gradients_helps,
        "method molf_e or lora, which leave the base frozen": trained,
    }
    outcome = "does not fit" if memory.peak > available else "hardly fits"
    return f"warning: it {outcome}: {sizes}; try {', '.join(name for name, helps in remedies.items() if helps)}"
