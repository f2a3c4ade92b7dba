"""Tiny SentencePiece tokenizers, trained on the spot, in folders of checkpoints."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

_generated: Any = sentencepiece_model_pb2
_TEXT = """The picture shows the other cat, that is on the old table in the house.
What is in the picture? There are three things: the table, the cat and another thing.
USER: hello there ASSISTANT: hello, this is a description of the image
def shows(picture):    return    picture  ==  other----------------
aaaa aa aaaaaa aaaaaaaa abab ababab 1234 12 2024 été déjà là où Größe
请描述这张图片 图片中有一只猫 图片 描述 猫
<|a|> <|b|> the\tend\tthe
"""


@functools.cache
def trained(
    *,
    byte_fallback: bool = True,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
    normalization: str = "identity",
    user_defined: tuple[str, ...] = (),
    model_type: str = "bpe",
    vocab_size: int = 420,
) -> bytes:
    """The serialised model."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines() * 4),
        model_writer=made,
        model_type=model_type,
        vocab_size=vocab_size if byte_fallback else vocab_size - 256,
        character_coverage=0.99,
        byte_fallback=byte_fallback,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
        normalization_rule_name=normalization,
        user_defined_symbols=list(user_defined),
        allow_whitespace_only_pieces=True,
        split_digits=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return made.getvalue()


def write_checkpoint(
    folder: Path, model: bytes, config: dict[str, object] | None = None, **files: object
) -> Path:
    """`tokenizer.model`, tokenizer_config.json if given, and other JSON files by their stems."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    if config is not None:
        files = {"tokenizer_config": config, **files}
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return folder


def edited(model: bytes, **changes: tuple[int, str | float]) -> bytes:
    """The model with fields of pieces changed: `field=(piece's id, value or name of a type)`."""
    proto = _generated.ModelProto.FromString(model)
    for field, (index, value) in changes.items():
        kind = getattr(proto.SentencePiece, str(value), value)
        setattr(proto.pieces[index], field, kind)
    data: bytes = proto.SerializeToString()
    return data


def given_json() -> dict[str, Any]:
    """The golden checkpoint's tokenizer.json."""
    source = Path(__file__).parent / "data/llava_1_5_hf/checkpoint/tokenizer.json"
    data: dict[str, Any] = json.loads(source.read_text("utf-8"))
    return data


def given_folder(folder: Path, data: dict[str, Any], **config: object) -> Path:
    """`folder` with this tokenizer.json and a tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WORDS = st.lists(
    st.sampled_from(
        [
            *("a", "b", "e", "t", "T", "U", ":", "-", "=", "1", "\n", "\t", " ", "  ", "▁"),
            *("the", " the", "picture", "aa", "图片", "é", "🙂", "e\u0301"),
            *("<s>", "</s>", "<unk>", "<pad>", "<image>", "<|a|>", "<|b|>", "<0x0A>", "[X]"),
        ]
    ),
    max_size=30,
).map("".join)
TEXTS = WORDS | ANY_TEXT
