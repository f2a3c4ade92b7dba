"""A small SentencePiece BPE tokenizer, and the same one in the `tokenizers` library's format.

The model has the traits of the published one: byte fallback, identity normalisation, a dummy
prefix, and `<unk>`, `<s>`, `</s>` as ids 0, 1, 2. Training is deterministic.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import sentencepiece

from vlmforge_recipes.llava.synthetic.configs import Json, write_json
from vlmforge_recipes.llava.synthetic.spec import IMAGE_ID, PAD_ID, PIECES
from vlmforge_recipes.llava.synthetic.text import TRAINING_TEXT

SPACE = "\u2581"
CONTROL = ("<unk>", "<s>", "</s>")
ADDED: Mapping[str, int] = {"<image>": IMAGE_ID, "<pad>": PAD_ID}


def write_original_tokenizer(folder: Path, model: bytes | None = None) -> None:
    """tokenizer.model (`trained_model()` unless given), its config, the map of special tokens."""
    (folder / "tokenizer.model").write_bytes(trained_model() if model is None else model)
    special: Json = {f"{role}_token": text for role, text in _roles("<unk>").items()}
    write_json(folder / "special_tokens_map.json", special)
    limits: Json = {"model_max_length": 2048, "padding_side": "right"}
    write_json(folder / "tokenizer_config.json", {**_tokenizer_config(special, {}), **limits})


def write_hf_tokenizer(folder: Path) -> None:
    """The same, with `<image>` and `<pad>` added, and tokenizer.json."""
    (folder / "tokenizer.model").write_bytes(trained_model())
    write_json(folder / "tokenizer.json", _tokenizer_json())
    write_json(folder / "added_tokens.json", dict(ADDED))
    roles = {f"{role}_token": text for role, text in _roles("<pad>").items()}
    described: Json = {role: {"content": text, **_plain()} for role, text in roles.items()}
    write_json(folder / "special_tokens_map.json", described)
    write_json(
        folder / "tokenizer_config.json",
        {
            **_tokenizer_config(dict(roles), ADDED),
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            # "No limit", as the published file spells it.
            "model_max_length": int(1e30),
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "spaces_between_special_tokens": False,
            "use_default_system_prompt": False,
        },
    )


@functools.cache
def trained_model() -> bytes:
    """The serialised SentencePiece model, of `PIECES` pieces."""
    return train_tokenizer(TRAINING_TEXT.splitlines())


def train_tokenizer(lines: Iterable[str]) -> bytes:
    """A serialised SentencePiece model of `PIECES` pieces, trained on `lines`."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=made,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return made.getvalue()


def _tokenizer_json() -> Json:
    model = sentencepiece.SentencePieceProcessor(model_proto=trained_model())
    vocab = {model.id_to_piece(index): index for index in range(model.get_piece_size())}
    bos: Json = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    second_bos: Json = {"SpecialToken": {"id": "<s>", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": text, **_plain(), "special": True}
            for text, index in _specials(ADDED).items()
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos,
                {"Sequence": {"id": "A", "type_id": 0}},
                second_bos,
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": list(_merges(vocab)),
        },
    }


def _merges(vocab: Mapping[str, int]) -> Iterator[str]:
    """Every way to make a piece of two others, best piece first: ids are in order of score."""
    for piece, index in vocab.items():
        if index < len(CONTROL) + 256:
            continue
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(vocab[a], vocab[b], a, b) for a, b in pairs if a in vocab and b in vocab]
        yield from (f"{a} {b}" for _, _, a, b in sorted(known))


def _tokenizer_config(roles: Json, added: Mapping[str, int]) -> Json:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(index): {"content": text, **_plain(), "special": True}
            for text, index in _specials(added).items()
        },
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **roles,
    }


def _specials(added: Mapping[str, int]) -> dict[str, int]:
    return {**{text: index for index, text in enumerate(CONTROL)}, **added}


def _roles(pad: str) -> dict[str, str]:
    return {"bos": "<s>", "eos": "</s>", "pad": pad, "unk": "<unk>"}


def _plain() -> Json:
    return {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
