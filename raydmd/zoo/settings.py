"""Training settings of the zoo's pipelines, for experiments and benchmarks."""

from __future__ import annotations

from typing import Any

TRAINING: dict[str, Any] = {
    "fake_updates": 3,
    "fake_warmup": 30,
    "student": {"rate": 2e-4, "lora": None},
    "fake": {"rate": 6e-4},
    "precision": "fp32",
    "sharding": "ddp",
    "gradient_checkpointing": False,
    "ema": 0.99,
    "decay": 0.4,
}
"""Half a million parameters an expert instead of billions: full fine-tuning, at the rates that such a size needs."""
