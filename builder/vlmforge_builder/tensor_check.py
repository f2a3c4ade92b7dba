"""A checkpoint's tensors against the parts that are to be made of them, before anything is traced.

Only headers are looked at. Every tensor that a part reads must be there, of the shape that the
configuration says, and of a floating dtype. Every tensor that no part reads must be known not to
matter: a scale, a bias, an adapter or a further layer that nobody reads changes what a model means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from vlmforge.errors import TensorError, UnsupportedModelError
from vlmforge_builder.checkpoint.altered import quantised
from vlmforge_builder.checkpoint.mapped import TensorInfo, torch_dtype
from vlmforge_builder.checkpoint.store import TensorStore
from vlmforge_builder.recipe import ModelSpec, PartSpec, parameters

_FLOATS = ("float32", "float16", "bfloat16", "float64")
# Tables that every implementation computes from the configuration; older ones stored them.
_COMPUTED = (
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    r"(.*\.)?position_ids",
    r"(.*\.)?masked_bias",
)
# By the last part of a name, what stores weights in this way.
_QUANTISED: Mapping[str, str] = {
    r"qweight|qzeros|scales|g_idx": "gptq or awq",
    r"SCB|CB|weight_format|(nested_)?(absmax|quant_map)|quant_state\..+": "bitsandbytes",
    r"weight_packed|weight_shape|weight_g_idx|.*zero_point": "compressed-tensors",
    r"(?!logit_scale$).*_scale(_inv|_2|_ub)?|scale_weight|weight_scales": "fp8 or int8",
    r".*_blocks": "mxfp4",
    r"_data|_scale_and_zero|_packed_params.*": "quanto or torch",
}
_ADAPTERS = re.compile(
    r"(^|\.)(lora_\w+|modules_to_save|original_module|base_layer|hada_\w+|oft_\w+|ia3_\w+)(\.|$)"
)
_NORMED = re.compile(r"(^|\.)(weight_[gv]|parametrizations\..+)$")
_AGAIN = "check that config.json belongs to these weight files"


def check_tensors(spec: ModelSpec, note: Callable[[str], None]) -> None:
    """Refuse what the parts of `spec` cannot be made of, or would leave out in silence.

    Tensors that no part reads are only noted if all of them are in modules of their own at the top
    of the checkpoint, such as the head of another task.

    Raises:
        UnsupportedModelError: quantised weights, or tensors that belong to the model and that no
            part reads: adapters, biases, more layers than the configuration says.
        TensorError: a tensor that is missing, of another shape, or of whole numbers.
    """
    weights = [weight for part in spec.parts for weight in part.weights.values()]
    read = {name for weight in weights for name in weight.names}
    known = re.compile("|".join((*_COMPUTED, *spec.unused)))
    unread = [name for name in spec.store.names() if name not in read and not known.fullmatch(name)]
    _refuse_altered(unread)
    for part in spec.parts:
        _rehearse(part, spec.store)
    _refuse_whole_numbers(spec.store, read)
    inside = _inside(unread, read)
    if inside:
        raise _unread(inside)
    if unread:
        note(f"warning: {_counted(unread)} of the checkpoint that belong to no part are left out")


def _refuse_altered(unread: Iterable[str]) -> None:
    for name in unread:
        for ending, method in _QUANTISED.items():
            if re.search(rf"(^|\.)({ending})$", name):
                raise quantised(f"the tensor {name}", method)
        if _ADAPTERS.search(name):
            raise _variant(
                "The checkpoint's weights have an adapter that is not merged.",
                f"the tensor {name}",
                "merged weights",
                "merge it first (merge_and_unload() of peft), and build what that saves",
            )
        if _NORMED.search(name):
            raise _variant(
                "The checkpoint's weights are stored in two factors.",
                f"the tensor {name}",
                "whole weights",
                "remove the weight norm (torch.nn.utils.remove_weight_norm) and save it again",
            )


@dataclass(frozen=True, slots=True)
class _Headers(TensorStore):
    """A store whose tensors have no values."""

    store: TensorStore

    @override
    def names(self) -> tuple[str, ...]:
        return self.store.names()

    @override
    def info(self, name: str) -> TensorInfo:
        return self.store.info(name)

    @override
    def read(self, name: str) -> Tensor:
        info = self.store.info(name)
        return torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")

    def __contains__(self, name: object) -> bool:
        return name in self.store


def _rehearse(part: PartSpec, store: TensorStore) -> None:
    """Read every weight of a part as it will be read, without values."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in parameters(part.module()).items()}
    headers = _Headers(store)
    for name, weight in part.weights.items():
        if not weight.names or name not in shapes:
            continue
        found = tuple(weight.read(headers, shapes[name]).shape)
        if found != shapes[name]:
            raise TensorError(
                f"The weights of {name} do not have the expected shape.",
                found=f"{found} from {', '.join(weight.names)}",
                expected=str(shapes[name]),
                fix=_AGAIN,
            )


def _refuse_whole_numbers(store: TensorStore, read: Iterable[str]) -> None:
    for name in sorted(read):
        info = store.info(name)
        if info.dtype.startswith("float8"):
            raise quantised(f"the tensor {name} is of {info.dtype}", "fp8")
        if info.dtype not in _FLOATS:
            raise TensorError(
                f"The tensor {name} in {info.file} holds no weights.",
                found=f"{info.dtype} {list(info.shape)}",
                expected="one of: " + ", ".join(_FLOATS),
                fix="if the weights are quantised, build the checkpoint that they were made from, "
                "with --weights int8 or int4; otherwise save them in a floating dtype",
            )


def _inside(unread: Iterable[str], read: Iterable[str]) -> list[str]:
    """Those that lie in a module of which something is read."""
    modules = {name.split(".")[0] for name in read if "." in name}
    return [name for name in unread if name.split(".")[0] in modules]


def _unread(names: list[str]) -> UnsupportedModelError:
    return _variant(
        "The checkpoint stores tensors that belong to the model, and that would not be used.",
        _counted(names),
        "only tensors that config.json tells of",
        "check config.json (numbers of layers, biases, the projector's type) against the weights; "
        "if the tensors are leftovers, save the checkpoint without them",
    )


def _counted(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({shown})"


def _variant(summary: str, found: str, expected: str, fix: str) -> UnsupportedModelError:
    return UnsupportedModelError(summary, found=found, expected=expected, fix=fix)
