"""docs/checkpoints.md is true: each key that it lists, changed, does what it says there."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer

from configuration_keys import DOCUMENT, LAYOUTS, Row, Section, load, plan, rows, section
from conftest import ROOT
from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.checkpoint import store
from vlmforge_builder.tokenizer import byte_bpe, convert
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer
from vlmforge_builder.tokenizer.proof import TokenizerProof
from vlmforge_recipes.qwen_vl import prompting

ROWS = tuple(rows())
PLACES = sorted({(row.file, row.when, row.place, row.layouts) for row in ROWS})
UNKNOWN = {f"unheard_of_{n}": value for n, value in enumerate((None, False, "", [], {}))}
HONOURED, REFUSED, UNUSED = "honoured", "refused", "cannot matter"

# Values that a honoured key is changed to, where doubling a number or turning a flag is no change
# that means something. Those of a key in several sections are tried in each.
VALUES: Mapping[str, tuple[object, ...]] = {
    "architectures": (["LlamaForCausalLM"],),
    "text_config": ({}, 7),
    "vision_config": ({"hidden_size": 32, "model_type": "clip_vision_model"}, 7),
    "visual": (7,),
    "image_token_index": (7,),
    "image_token_id": (7,),
    "vision_feature_layer": (-1, 0, [-2, -1]),
    "vision_feature_select_strategy": ("full", "other"),
    "projector_hidden_act": ("silu", "other"),
    "hidden_act": ("quick_gelu", "gelu", "other"),
    "model_type": ("qwen2",),
    "head_dim": (64,),
    "max_position_embeddings": (64,),
    "num_key_value_heads": (2, 1),
    "rope_theta": (123456.0,),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 123.0}, {"rope_type": "yarn"}, 7),
    "rope_scaling": ({"rope_type": "linear", "factor": 2.0}, {"type": "dynamic"}, 7),
    "sliding_window": (64, 100),
    "tokenizer_model_max_length": (64,),
    "eos_token_id": (5, [5, 6], "5", -5),
    "image_grid_pinpoints": ([[336, 336]], [[1, 2]], "[[336, 672]]", "text"),
    "mm_vision_tower": ("nowhere/at-all",),
    "mm_vision_select_layer": (-1, 0),
    "mm_vision_select_feature": ("cls_patch", "other"),
    "mm_projector_type": ("linear", "mlp3x_gelu"),
    "image_aspect_ratio": ("square", "pad", "other"),
    "mm_patch_merge_type": ("flat", "spatial", "other"),
    "do_pad": (True,),
    "mm_tunable_parts": ("mm_vision_tower,mm_mlp_adapter,mm_language_model",),
    "size": (200, {"height": 99, "width": 98}, {"longest_edge": 99}, [7], "99"),
    "crop_size": (99, {"height": 168, "width": 98}, [168], "99"),
    "resample": (2, 99, "3"),
    "rescale_factor": (0.5, "x"),
    "image_mean": ([0.1, 0.2, 0.3], 0.4, [1, 2]),
    "image_std": ([0.1, 0.2, 0.3], 0.4, [0, 0, 0]),
    "image_processor": ({}, 7),
    "chat_template": ("{{ messages[0].content }}", [{"name": "default", "template": "x"}], [], 7),
    "patch_size": (7, 28),
    "num_additional_image_tokens": (0, 2),
    "added_tokens_decoder": ({"3": {"content": "<new>", "special": True}}, [1], {"0": 7}),
    "additional_special_tokens": (["<new>"], "<unk>", [7]),
    "extra_special_tokens": ({"image_token": "<new>"}, "<new>"),
    "image_token": ("<new>",),
    "max_window_size": (100,),
    "mlp_ratio": (2.0,),
    "n_queries": (16,),
    "image_start_id": (3,),
    "vision_start_token_id": (7,),
    "vision_end_token_id": (7,),
    "fullatt_block_indexes": ([0], [9], 7),
    "deepstack_visual_indexes": ([1], [9], [1, 0], 7),
    "mrope_section": ([6, 4, 6], [1, 2, 3], 7),
    "downsample_ratio": (1.0, 0.3),
    "norm_type": ("rms_norm",),
    "max_image_size": ({"longest_edge": 99}, {"height": 42, "width": 42}, 7),
    "rope_type": ("yarn", "dynamic"),
    "type": ("yarn",),
}
for _role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
    VALUES = {**VALUES, f"{_role}_token": ("<new>", 7)}

# What of it changes nothing, and rightly so, by layout; None: whatever the value.
NO_CHANGE: Mapping[tuple[str, str], tuple[object, ...] | None] = {
    # The default: of the tower, of the decoder.
    ("LLaVA v1.5 of transformers, Llama", "hidden_act"): ("quick_gelu", "silu"),
    # An image on a square has no sides to cut off, and becomes one view.
    ("original LLaVA, Llama", "do_center_crop"): (False,),
    ("original LLaVA, Llama", "mm_patch_merge_type"): ("flat", "spatial"),
    ("original LLaVA, Llama", "image_grid_pinpoints"): None,
    # The golden checkpoint has no tower inside; that of v1.6 is to be used already.
    ("original LLaVA, Llama", "unfreeze_mm_vision_tower"): None,
    ("original LLaVA, Llama", "mm_tunable_parts"): None,
    ("original LLaVA, Mistral", "mm_tunable_parts"): None,
    # A head that is stored and differs is used in any case.
    **{(layout, "tie_word_embeddings"): (True,) for layout in LAYOUTS},
    # It is in the section where rotary positions are described.
    ("Qwen2-VL of transformers 5", "rope_theta"): (123456.0,),
    ("Qwen2.5-VL of transformers 5", "rope_theta"): (123456.0,),
    ("Qwen3-VL of transformers 5", "rope_theta"): (123456.0,),
    # `rope_type` is before it.
    ("Idefics3 and SmolVLM of transformers", "type"): None,
    # Tiles have their size before these steps.
    ("LLaVA v1.6 of transformers, Llama", "do_resize"): (False,),
    ("LLaVA v1.6 of transformers, Llama", "do_center_crop"): (False,),
}


@pytest.fixture(autouse=True, scope="module")
def _no_proofs() -> Iterator[None]:
    """Tokenizers are converted once, and proven in tests of their own; weights stay as they are."""
    proof = TokenizerProof("none", 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        for module in (convert, byte_bpe):
            patch.setattr(module, "prove", lambda *_, **__: proof)
        patch.setattr(convert, "_differing", lambda *_: None)
        patch.setattr(convert, "_converted", _once(convert._converted))
        patch.setattr(store, "read_torch_file", lru_cache(_by_content(store.read_torch_file)))
        patch.setattr(store, "read_safetensors", lru_cache(store.read_safetensors))
        patch.setattr(prompting, "convert_byte_bpe", _once(byte_bpe.convert_byte_bpe))
        patch.setattr(ConvertedTokenizer, "token_id", _token_id)
        yield


@lru_cache
def _parsed(tokenizer_json: bytes) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json.decode())


def _token_id(tokenizer: ConvertedTokenizer, token: str) -> int | None:
    found: int | None = _parsed(tokenizer.json).token_to_id(token)
    return found


def _by_content(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """`read`, asked once for all files of one name and content."""
    known: dict[tuple[str, bytes], object] = {}

    def asked(path: Path) -> object:
        key = (path.name, path.read_bytes())
        if key not in known:
            known[key] = read(path)
        return known[key]

    return asked


def _once(function: Callable[..., object]) -> Callable[..., object]:
    """`function`, asked once for all folders that say the same."""
    known: dict[str, object] = {}

    def asked(*args: object, **options: object) -> object:
        said = re.sub(r"PosixPath\('[^']*'\)|file='[^']*'", "", repr((args, options)))
        if said not in known:
            known[said] = function(*args, **options)
        return known[said]

    return asked


def _named(place: tuple[str, str, str, tuple[str, ...]]) -> str:
    file, when, part, layouts = place
    names = filter(None, (file, part, when, str(len(layouts)), layouts[0]))
    return "-".join(names).replace(" ", "_")


def _layout(row: Row) -> str:
    """One of those with the table: of a tower's folder, one that has the section in question."""
    flat = row.when == "of the vision tower" and not row.place
    return row.layouts[-1 if flat else 0]


@pytest.mark.parametrize("place", PLACES, ids=_named)
def test_each_key_does_what_the_document_says(
    place: tuple[str, str, str, tuple[str, ...]], tmp_path: Path
) -> None:
    found = [row for row in ROWS if (row.file, row.when, row.place, row.layouts) == place]
    part = section(tmp_path / "model", found[0], _layout(found[0]))
    before = part.plan()
    unused = [key for row in found if row.fate == UNUSED for key in row.keys]
    changes = {key.replace("*", "some"): 7 for key in unused}
    assert part.plan(**changes, **UNKNOWN) == before, [
        key for key in changes if part.plan(**{key: 7}) != before
    ]
    _check_unknown(part)
    _check_admitted([row for row in found if row.fate == REFUSED], part, before)
    for row in found:
        for key in row.keys:
            if row.fate == REFUSED:
                _check_refused(key, row, part)
            elif row.fate == HONOURED:
                _check_honoured(key, part, before)


def _check_unknown(part: Section) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        part.plan(unheard_of=7)
    name = f"{part.place}.unheard_of" if part.place else "unheard_of"
    assert str(caught.value).endswith(f"--ignore-config-key {name}")
    assert part.path.name in str(caught.value)


def _check_admitted(refused: list[Row], part: Section, before: object) -> None:
    for number in range(-1, max((len(row.admitted) for row in refused), default=0)):
        changes = {
            key: None if number < 0 else row.admitted[number]
            for row in refused
            if number < len(row.admitted)
            for key in row.keys
        }
        assert part.plan(**changes) == before, changes


def _check_refused(key: str, row: Row, part: Section) -> None:
    for value in (7, *(not flag for flag in row.admitted if isinstance(flag, bool))):
        with pytest.raises(UnsupportedModelError) as caught:
            part.plan(**{key: value})
        assert key in str(caught.value)
        assert part.path.name in str(caught.value)


def _check_honoured(key: str, part: Section, before: object) -> None:
    for value in VALUES.get(key, (_changed(part.values().get(key)), "other")):
        try:
            after = part.plan(**{key: value})
        except CheckpointError as error:
            assert str(error)
        else:
            if not _unchanging(part, key, value):
                assert after != before, (part.path, part.place, key, value)


def _unchanging(part: Section, key: str, value: object) -> bool:
    if part.values().get(key) == value:
        return True
    known = NO_CHANGE.get((part.layout, key), ())
    return known is None or value in known


def _changed(value: object) -> object:
    if isinstance(value, bool):
        return not value
    return value * 2 if isinstance(value, int | float) else 8


def test_the_document_has_the_tables_of_the_recipes() -> None:
    document = DOCUMENT.read_text("utf-8")
    assert _script().with_tables(document) == document, "run: python scripts/checkpoint_keys.py"
    assert set(_script().layouts()) == set(LAYOUTS)


def _script() -> ModuleType:
    path = ROOT / "scripts/checkpoint_keys.py"
    spec = importlib.util.spec_from_file_location("checkpoint_keys", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plans_differ_by_what_closures_hold(tmp_path: Path) -> None:
    """The comparison sees what it must: equal for one checkpoint, other for another number."""
    row = next(row for row in ROWS if row.place == "text_config")
    part = section(tmp_path / "a", row, row.layouts[0])
    assert plan(load(part.checkpoint)) == part.plan()
    assert part.plan(rms_norm_eps=0.5) != part.plan()
