"""Settings of the run that ``molf demo`` is."""

from typing import Any

DEMO: dict[str, Any] = {
    "model_name_or_path": "bundled:smollm2-135m",
    "task": "fact",
    "sample": True,
    "limit": 120,
    "method": "molf",
    "learning_rate": 2e-4,
    "lora_learning_rate": 2e-4,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 8,
    "gradient_checkpointing": False,
    "logging_steps": 4,
    "eval_before": True,
    "output_dir": "runs/demo",
    "overwrite": True,
}
"""Teach a small pretrained model counterfactual facts within minutes, without a GPU or a network."""
