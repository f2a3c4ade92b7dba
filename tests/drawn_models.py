"""Tiny random checkpoints of models that are published today, written by transformers itself.

The classes of transformers make and save the weights and the configurations, a byte-level BPE is
trained on the spot, and the files that processors write are spelled out as they are published.
Every number follows from a seed; the weights are wide enough that answers are not one token
repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

ROOT = Path(__file__).parents[1]
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@cache
def bpe(special: tuple[str, ...], vocabulary: int = 320) -> str:
    """The JSON of a byte-level BPE with these special tokens behind its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    text = (ROOT / "LICENSE").read_text("utf-8")  # nobody edits it: what is drawn stays as it is
    tokenizer.train_from_iterator([text, "\n\n\n\n" * 9], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    found: str = tokenizer.to_str()
    return found


@dataclass(frozen=True)
class Drawn:
    """A checkpoint to draw: `config` is of the model class, `files` are written beside it."""

    model: type[PreTrainedModel]
    config: Any
    tokenizer: str
    seed: int = 1
    files: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def write(self, folder: Path) -> Path:
        """The checkpoint's folder."""
        torch.manual_seed(self.seed)
        model = self.model(self.config).eval()
        draw_weights(model, self.seed)
        model.to(self.dtype).save_pretrained(folder)
        (folder / "tokenizer.json").write_text(self.tokenizer, "utf-8")
        for name, values in self.files.items():
            (folder / name).write_text(json.dumps(values, indent=1), "utf-8")
        return folder


def token_id(tokenizer: str, text: str) -> int:
    """The id of a token (AssertionError: there is none)."""
    found = Tokenizer.from_str(tokenizer).token_to_id(text)
    assert found is not None, text
    return int(found)


def size_of(tokenizer: str) -> int:
    """Tokens, added ones included."""
    return int(Tokenizer.from_str(tokenizer).get_vocab_size())


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Fill a model's parameters, each by its name and the seed alone."""
    for name, tensor in model.named_parameters():
        generator = torch.Generator().manual_seed(seed * 1000003 + sum(name.encode()) * 7919)
        noise = torch.randn(tensor.shape, generator=generator)
        leaf = name.rsplit(".", 1)[-1]
        if "lambda" in name:
            drawn = 0.5 + 0.1 * noise
        elif leaf == "bias" or tensor.dim() == 1:
            drawn = (1.0 if "norm" in name and leaf == "weight" else 0.0) + 0.2 * noise
        elif "embed_tokens" in name:  # small: where the output matrix is tied, tokens differ
            drawn = 0.25 * noise
        elif "embed" in name and tensor.dim() < 4:
            drawn = noise
        else:
            drawn = 1.3 * noise / tensor[0].numel() ** 0.5 * (3.0 if "lm_head" in name else 1.0)
        with torch.no_grad():
            tensor.copy_(drawn.bfloat16())
