"""A tiny LLaVA that tells the truth about drawn pictures: its training, and its checkpoint."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The trained checkpoint, in the original LLaVA v1.5 layout."""
