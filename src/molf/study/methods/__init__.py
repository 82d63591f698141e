"""Training methods: what each one means to the Trainer, PEFT and MoLF, and what each one adds to a run."""
