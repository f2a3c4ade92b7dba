"""Qwen-VL-Chat once more, in plain torch and `regex`, from the facts of its publication.

An oracle that shares no code with ours: no cache, no blocks, no tokenizer library, one sequence at
a time. `draw_checkpoint` writes random checkpoints of its layout.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SPLIT = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
IMAGE_ST = (
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "<img>",
    "</img>",
    "<imgpad>",
)
SPAN = 256


@dataclass(frozen=True)
class Tokens:
    """The published tokenizer."""

    ranks: Mapping[bytes, int]

    @classmethod
    def read(cls, path: Path) -> Tokens:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        return cls({base64.b64decode(token): int(rank) for token, rank in lines})

    def special(self, text: str) -> int:
        return len(self.ranks) + [*CONTROL, *IMAGE_ST].index(text)

    def encode(self, text: str, allowed: Sequence[str]) -> list[int]:
        """Ids of text; `<img>..</img>` is spelled out by bytes where `<img>` is allowed."""
        pattern = "|".join(map(regex.escape, sorted(allowed, key=len, reverse=True)))
        parts = regex.split(f"({pattern})", unicodedata.normalize("NFC", text))
        ids: list[int] = []
        while parts:
            part = parts.pop(0)
            if part == "<img>" and part in allowed:
                end = parts.index("</img>")  # ValueError: not closed
                name = list("".join(parts[:end]).encode())
                assert len(name) < SPAN - 1
                ids += [self.special("<img>"), *name]
                ids += [self.special("<imgpad>")] * (SPAN - len(name)) + [self.special("</img>")]
                parts = parts[end + 1 :]
            elif part in allowed:
                ids.append(self.special(part))
            else:
                for piece in SPLIT.findall(part):
                    ids += self._merged([bytes([b]) for b in piece.encode()])
        return ids

    def _merged(self, parts: list[bytes]) -> list[int]:
        """The pair of the lowest rank first, again and again."""
        while True:
            pairs = [(self.ranks.get(a + b), i) for i, (a, b) in enumerate(pairwise(parts))]
            known = [(rank, i) for rank, i in pairs if rank is not None]
            if not known:
                return [self.ranks[part] for part in parts]
            i = min(known)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    def context(
        self, query: str, history: Sequence[tuple[str, str]], system: str, window: int = 6144
    ) -> list[int]:
        """The ids of a chat's prompt: what fits of the history, newest first."""
        start, end = [self.special("<|im_start|>")], [self.special("<|im_end|>")]
        newline = self.encode("\n", IMAGE_ST)

        def turn(role: str, content: str) -> list[int]:
            head = self.encode(role, IMAGE_ST) + newline
            return start + head + self.encode(content, IMAGE_ST) + end

        first, kept = turn("system", system), list[int]()
        for asked, answered in reversed(history):
            both = newline + turn("user", asked) + newline + turn("assistant", answered)
            if len(first) + len(both) + len(kept) >= window:
                break
            kept = both + kept
        opened = newline + start + self.encode("assistant", IMAGE_ST) + newline
        return first + kept + newline + turn("user", query) + opened


@dataclass(frozen=True)
class Original:
    """The model, from a checkpoint folder."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text("utf-8"))
        return found

    @cached_property
    def w(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.bin")):
            found |= torch.load(path, weights_only=True)
        return {name.removeprefix("transformer."): t.float() for name, t in found.items()}

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens.read(self.folder / "qwen.tiktoken")

    # --- pictures --------------------------------------------------------------------------------

    def pixels(self, image: Image.Image) -> Tensor:
        side = self.config["visual"]["image_size"]
        small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        levels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        return ((levels - mean) / std)[None]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        w, name = self.w, f"visual.{name}"
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    @staticmethod
    def _grid(table: Tensor, places: int) -> Tensor:
        """A table of 16 x 16 places as one of `places`."""
        side = math.isqrt(places)
        if side == 16:
            return table
        square = table.reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
        larger = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
        return larger.permute(0, 2, 3, 1).reshape(places, -1)

    @torch.no_grad()
    def features(self, image: Image.Image) -> Tensor:
        w, visual = self.w, self.config["visual"]
        x = F.conv2d(self.pixels(image), w["visual.conv1.weight"], stride=visual["patch_size"])
        x = x.flatten(2).transpose(1, 2)[0]
        x = self._norm(x + self._grid(w["visual.positional_embedding"], len(x)), "ln_pre")
        for i in range(visual["layers"]):
            x = self._encoder_layer(x, f"transformer.resblocks.{i}.", visual["heads"])
        pooled = self._norm(self._pooled(x), "ln_post")
        return pooled @ w["visual.proj"]

    def _encoder_layer(self, x: Tensor, name: str, heads: int) -> Tensor:
        made = self._linear(self._norm(x, f"{name}ln_1"), f"visual.{name}attn.in_proj")
        rows = []
        for part in made.reshape(len(x), heads, -1).unbind(1):  # of each head: its q, k and v
            q, k, v = part.chunk(3, dim=-1)
            rows.append(torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v)
        x = x + self._linear(torch.cat(rows, -1), f"visual.{name}attn.out_proj")
        inner = F.gelu(self._linear(self._norm(x, f"{name}ln_2"), f"visual.{name}mlp.c_fc"))
        return x + self._linear(inner, f"visual.{name}mlp.c_proj")

    def _pooled(self, x: Tensor) -> Tensor:
        """Torch's own attention; its weights have the layout that is published."""
        name, w = "visual.attn_pool.", self.w
        width = w[f"{name}query"].shape[1]
        attention = torch.nn.MultiheadAttention(width, width // 128)
        prefix = f"{name}attn."
        cut = {k.removeprefix(prefix): t for k, t in w.items() if k.startswith(prefix)}
        attention.load_state_dict(cut)
        kv = self._norm(F.linear(x, w[f"{name}kv_proj.weight"]), "attn_pool.ln_kv")
        places = w[f"{name}pos_embed"]
        query = self._norm(w[f"{name}query"], "attn_pool.ln_q") + places
        found: Tensor = attention(query, kv + self._grid(places, len(x)), kv)[0]
        return found

    # --- text ------------------------------------------------------------------------------------

    def alpha(self, prompt: int) -> int:
        if not self.config["use_dynamic_ntk"]:
            return 1
        steps = math.ceil(math.log(prompt / self.config["seq_length"], 2) + 1)
        return max(int(2**steps - 1), 1)

    @torch.no_grad()
    def logits(self, ids: Sequence[int], images: Sequence[Image.Image], prompt: int) -> Any:
        """Of every position `[tokens, vocab]`; the first `prompt` of `ids` were the prompt."""
        begin, w = self.config["visual"]["image_start_id"], self.w
        x = w["wte.weight"][torch.tensor(ids)].clone()
        starts = [i for i, token in enumerate(ids) if token == begin]
        for start, image in zip(starts, images, strict=True):
            x[start + 1 : start + 1 + SPAN] = self.features(image)
        for i in range(self.config["num_hidden_layers"]):
            x = x + self._attention(self._rms(x, f"h.{i}.ln_1"), f"h.{i}.attn.", prompt)
            y, mlp = self._rms(x, f"h.{i}.ln_2"), f"h.{i}.mlp."
            gated = self._linear(y, f"{mlp}w1") * F.silu(self._linear(y, f"{mlp}w2"))
            x = x + self._linear(gated, f"{mlp}c_proj")
        return (self._rms(x, "ln_f") @ w["lm_head.weight"].T).numpy()

    def _rms(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt((x**2).mean(-1, keepdim=True) + self.config["layer_norm_epsilon"])
        return x * scale * self.w[f"{name}.weight"]

    def _attention(self, x: Tensor, name: str, prompt: int) -> Tensor:
        heads, dim = self.config["num_attention_heads"], self.config["kv_channels"]
        parts = self._linear(x, f"{name}c_attn").chunk(3, dim=-1)
        q, k, v = (part.reshape(len(x), heads, dim).transpose(0, 1) for part in parts)
        base = self.config["rotary_emb_base"] * self.alpha(prompt) ** (dim / (dim - 2))
        turns = torch.arange(len(x))[:, None] / base ** (torch.arange(0, dim, 2) / dim)
        q, k = (self._turned(part, turns) for part in (q, k))
        if self.config["use_logn_attn"]:
            trained = self.config["seq_length"]
            far = [math.log(i, trained) if i > trained else 1.0 for i in range(1, len(x) + 1)]
            q = q * torch.tensor(far)[:, None]
        scores = q @ k.transpose(1, 2) / math.sqrt(dim)
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        mixed = (torch.softmax(scores, -1) @ v).transpose(0, 1).flatten(1)
        return self._linear(mixed, f"{name}c_proj")

    @staticmethod
    def _turned(x: Tensor, turns: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * turns.cos() - b * turns.sin(), b * turns.cos() + a * turns.sin()), -1)

    def greedy(self, prompt: Sequence[int], images: Sequence[Image.Image], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logits(ids, images, len(prompt))[-1].argmax()))
        return ids[len(prompt) :]


def draw_checkpoint(folder: Path, golden: Path, seed: int, **config: Any) -> Path:
    """A checkpoint with random weights: the golden one's config with some values replaced."""
    folder.mkdir(parents=True)
    values = json.loads((golden / "config.json").read_text("utf-8"))
    values |= {key: value for key, value in config.items() if key != "visual"}
    values["visual"] = {**values["visual"], **config.get("visual", {})}
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    for name in ("qwen.tiktoken", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(golden / name, folder / name)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _drawn(name, shape, generator) for name, shape in _shapes(values).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    made = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return made / 10
    if "ln_" in name:
        return 1 + made / 10
    if name.endswith(("wte.weight", "query", "pos_embed", "positional_embedding")):
        return made
    return made * (3 if name == "lm_head.weight" else 1) / math.sqrt(math.prod(shape[1:]))


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = (
        config["hidden_size"],
        config["intermediate_size"] // 2,
        config["vocab_size"],
    )
    visual = config["visual"]
    width, out, patch = visual["width"], visual["output_dim"], visual["patch_size"]
    wide = int(width * visual["mlp_ratio"])
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}."
        shapes |= {f"{layer}ln_{n}.weight": (hidden,) for n in (1, 2)}
        linear(f"{layer}attn.c_attn", 3 * hidden, hidden)
        shapes[f"{layer}attn.c_proj.weight"] = (hidden, hidden)
        shapes |= {f"{layer}mlp.{name}.weight": (inner, hidden) for name in ("w1", "w2")}
        shapes[f"{layer}mlp.c_proj.weight"] = (hidden, inner)
    tower, pool = "transformer.visual.", "transformer.visual.attn_pool."
    shapes[f"{tower}conv1.weight"] = (width, 3, patch, patch)
    shapes[f"{tower}positional_embedding"] = (256, width)
    shapes[f"{tower}proj"] = (out, out)
    norm(f"{tower}ln_pre", width)
    norm(f"{tower}ln_post", out)
    for i in range(visual["layers"]):
        block = f"{tower}transformer.resblocks.{i}."
        norm(f"{block}ln_1", width)
        norm(f"{block}ln_2", width)
        linear(f"{block}attn.in_proj", 3 * width, width)
        linear(f"{block}attn.out_proj", width, width)
        linear(f"{block}mlp.c_fc", wide, width)
        linear(f"{block}mlp.c_proj", width, wide)
    shapes |= {f"{pool}query": (256, out), f"{pool}pos_embed": (256, out)}
    shapes[f"{pool}kv_proj.weight"] = (out, width)
    norm(f"{pool}ln_q", out)
    norm(f"{pool}ln_kv", out)
    shapes[f"{pool}attn.in_proj_weight"], shapes[f"{pool}attn.in_proj_bias"] = (
        (3 * out, out),
        (3 * out,),
    )
    linear(f"{pool}attn.out_proj", out, out)
    return shapes
