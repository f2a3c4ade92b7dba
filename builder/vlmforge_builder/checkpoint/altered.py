"""Refuses checkpoints whose tensors are not a model's plain weights, by their JSON files alone.

Those are quantised weights, and adapters that were not merged into the model that they change. What
only the tensors themselves tell is found later, by `tensor_check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.checkpoint.config import read_json

_ADAPTER = "adapter_config.json"
_QUANTISERS: Mapping[str, str] = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
MARKERS = (_ADAPTER, *_QUANTISERS)
"""Small files beside config.json that say what the weights are."""

# What adapters and the tensors that were trained beside them are saved as.
_ADAPTER_WEIGHTS = ("adapter_model.*", "non_lora_trainables.bin")
# `quantization_config` of transformers, and its name in older files of compressed-tensors.
_QUANTISED = ("quantization_config", "compression_config")
# `from_pretrained` then reads this file instead of those with the usual names.
_OTHER_FILE = "transformers_weights"

# How transformers 5 gives plain weights back, by the method's name.
_DEQUANTISERS: Mapping[str, str] = {
    "bitsandbytes": "model.dequantize()",
    "higgs": "model.dequantize()",
    "compressed-tensors": "from_pretrained(..., quantization_config="
    "CompressedTensorsConfig(dequantize=True))",
    "fp8": "from_pretrained(..., quantization_config=FineGrainedFP8Config(dequantize=True))",
    "mxfp4": "from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True))",
}


def refuse_altered(folder: Path) -> None:
    """Refuse a folder whose JSON files say that its tensors are not plain weights.

    Raises:
        CheckpointError: an adapter that is not merged, or weights in a file of another name.
        UnsupportedModelError: quantised weights; names the method.
    """
    _refuse_adapter(folder)
    for name, method in _QUANTISERS.items():
        if (path := folder / name).is_file():
            raise quantised(f"{path} says so", method)
    path = folder / "config.json"
    if not path.is_file():
        return
    config = read_json(path)
    for place, value in _settings(config, ""):
        raise quantised(f"{place} in {path}", _method(value))
    if config.get(_OTHER_FILE) is not None:
        raise CheckpointError(
            f"{path} names a file of weights of its own.",
            found=f"{_OTHER_FILE} {config[_OTHER_FILE]!r}",
            expected="weights in model.safetensors or in shards with an index",
            fix=f"rename the file to model.safetensors and remove {_OTHER_FILE}",
        )


def quantised(found: str, method: str | None) -> UnsupportedModelError:
    """The refusal of quantised weights: where that was found, and the method if it is known."""
    fix = "build the checkpoint that it was quantised from, with --weights int8 or int4"
    if how := _DEQUANTISERS.get(method or ""):
        fix += f"; or make plain weights first: {how} of transformers, then save_pretrained(FOLDER)"
    return UnsupportedModelError(
        "The checkpoint's weights are quantised already.",
        found=f"{method or 'an unknown method'}: {found}",
        expected="weights in float32, float16 or bfloat16",
        fix=fix,
    )


def _settings(values: Mapping[str, object], place: str) -> Iterator[tuple[str, object]]:
    """Every setting of a quantisation that is not null, in any section."""
    for key, value in values.items():
        dotted = f"{place}.{key}" if place else key
        if key in _QUANTISED:
            if value is not None:
                yield dotted, value
        elif isinstance(value, dict):
            yield from _settings(value, dotted)


def _method(settings: object) -> str | None:
    if not isinstance(settings, dict):
        return None
    named = settings.get("quant_method") or settings.get("quant_algo")
    if named is None and any(settings.get(key) for key in ("load_in_8bit", "load_in_4bit")):
        return "bitsandbytes"  # older files name no method
    return None if named is None else str(named)


def _refuse_adapter(folder: Path) -> None:
    config = folder / _ADAPTER
    files = sorted(path.name for glob in _ADAPTER_WEIGHTS for path in folder.glob(glob))
    if not config.is_file() and not files:
        return
    settings = read_json(config) if config.is_file() else {}
    base = settings.get("base_model_name_or_path") or "BASE"
    kind = settings.get("peft_type") or "adapter"
    raise CheckpointError(
        f"{folder} holds an adapter that is not merged into its model.",
        found=f"{kind} of {base} ({', '.join([_ADAPTER] * config.is_file() + files)})",
        expected="the whole model's weights, and no adapter beside them",
        fix="merge it first, and build the folder MERGED: with the script that belongs to the code "
        "that trained it (merge_lora_weights.py, where non_lora_trainables.bin is beside it), or "
        f"with peft: PeftModel.from_pretrained(model of {base}, {str(folder)!r})"
        ".merge_and_unload().save_pretrained('MERGED'); if it is merged already, remove these "
        "files",
    )
