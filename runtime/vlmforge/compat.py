"""Run programs that were written for LMDeploy without changing them.

Covers what v0.4.2 and v0.18 export. A name either works, or is there to be imported and says what
to do when it is used, or is not there; `docs/lmdeploy.md` lists them all.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import sys
import types
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from typing import NoReturn

import PIL.Image

from vlmforge.errors import ImageError, NotSupportedError
from vlmforge.version import __version__

_NAME = "lmdeploy"

# Module: its names that work, and where each of them is.
_WORKING: Mapping[str, Mapping[str, str]] = {
    "": {
        "pipeline": "vlmforge.api.load",
        "Pipeline": "vlmforge.api.pipeline",
        "Session": "vlmforge.api.session",
        "Response": "vlmforge.outputs.response",
        "Box": "vlmforge.vl.boxes",
        "GenerationConfig": "vlmforge.outputs.generation_config",
        "EngineConfig": "vlmforge.api.config",
        "TurbomindEngineConfig": "vlmforge.api.config",
        "PytorchEngineConfig": "vlmforge.api.pytorch_config",
        "VisionConfig": "vlmforge.api.config",
        "VisonConfig": "vlmforge.api.config",
        "ChatTemplateConfig": "vlmforge.inputs.template_config",
        "__version__": "vlmforge.compat",
        "version_info": "vlmforge.compat",
    },
    "api": {"pipeline": "vlmforge.api.load"},
    "pipeline": {"Pipeline": "vlmforge.api.pipeline"},
    "messages": {
        "GenerationConfig": "vlmforge.outputs.generation_config",
        "TurbomindEngineConfig": "vlmforge.api.config",
        "PytorchEngineConfig": "vlmforge.api.pytorch_config",
        "VisionConfig": "vlmforge.api.config",
        "VisonConfig": "vlmforge.api.config",
        "Response": "vlmforge.outputs.response",
        "LogitsProcessor": "vlmforge.outputs.sampling",
    },
    "model": {"ChatTemplateConfig": "vlmforge.inputs.template_config"},
    "tokenizer": {},
    "version": {
        "__version__": "vlmforge.compat",
        "short_version": "vlmforge.compat",
        "version_info": "vlmforge.compat",
    },
    "vl": {
        "load_image": "vlmforge.vl",
        "encode_image_base64": "vlmforge.vl",
        "draw_boxes": "vlmforge.vl",
    },
    "vl.utils": {
        "load_image": "vlmforge.vl",
        "encode_image_base64": "vlmforge.vl",
        "load_image_from_base64": "vlmforge.compat",
    },
    "vl.constants": {"IMAGE_TOKEN": "vlmforge.vl.constants"},
}

_NO_SERVER = "run vlmforge serve ENGINE, and ask it with OpenAI's client"
_NO_TOKENIZER = "use pipe.render(prompt).token_ids or pipe.count_tokens(prompt)"
_IMAGES_ONLY = "engines see images only; of a video, pass frames: pipe((text, [image, ...]))"
_PARTS = "give the template's parts: ChatTemplateConfig(name, user=..., assistant=...)"
_INSIDE = "it belongs to LMDeploy's engine; what an answer cost is in response.timings"
_ONE_ENGINE = "leave it out: an engine does its prefill and its decoding itself"
_MEDIA = dict.fromkeys(
    (
        *("load_video", "load_audio", "load_time_series"),
        *("encode_video_base64", "encode_audio_base64", "encode_time_series_base64"),
    ),
    _IMAGES_ONLY,
)
# Module: its names that can be imported, and what to do instead of using them.
_REFUSED: Mapping[str, Mapping[str, str]] = {
    "": {
        "serve": _NO_SERVER,
        "client": _NO_SERVER,
        "Tokenizer": _NO_TOKENIZER,
        "EngineGenerationConfig": "use GenerationConfig(stop_token_ids=..., bad_token_ids=...)",
        "KVTransferConfig": _ONE_ENGINE,
    },
    "api": {"serve": _NO_SERVER, "client": _NO_SERVER},
    "messages": {
        "EngineGenerationConfig": "use GenerationConfig(stop_token_ids=..., bad_token_ids=...)",
        "SpeculativeConfig": "leave it out: answers are the same without",
        "QuantPolicy": "leave quant_policy out: the key/value cache is not quantised",
        "KVTransferConfig": _ONE_ENGINE,
        "KVTransferRole": _ONE_ENGINE,
        "ResponseType": "look at response.finish_reason and response.error_code",
        "EngineOutput": _INSIDE,
        "EngineEvent": _INSIDE,
        "EventType": _INSIDE,
        "RequestMetrics": _INSIDE,
        "ScheduleMetrics": _INSIDE,
    },
    "tokenizer": {"Tokenizer": _NO_TOKENIZER},
    "vl": _MEDIA,
    "vl.utils": _MEDIA,
    "vl.constants": {"Modality": _IMAGES_ONLY},
}

short_version = __version__
version_info = tuple(int(part) for part in __version__.split(".") if part.isdigit())


def load_image_from_base64(image: bytes | str) -> PIL.Image.Image:
    """The image of an encoded file in base64 (ImageError: it is not that)."""
    from vlmforge.vl import load_image

    try:
        data = base64.b64decode(image)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ImageError(
            "This is not base64.",
            found=f"{type(image).__name__}: {error}",
            expected="the bytes of an image file in base64",
            fix="base64.b64encode(data), or vlmforge.vl.load_image for paths and URLs",
        ) from error
    return load_image(data)


class _Refused(type):
    """What stands for a name of LMDeploy's that has no like here: all use of it is refused."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, object]) -> _Refused:
        """A stand-in; but what derives from one is a use of it."""
        for base in bases:
            _refuse(base)
        return super().__new__(cls, name, bases, body)

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        """A call, or the making of an instance."""
        _refuse(cls)

    def __getattr__(cls, name: str) -> NoReturn:
        """Methods and members; what Python itself looks for is not there."""
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(cls)


def _refuse(stand_in: type) -> NoReturn:
    raise NotSupportedError(
        f"{stand_in.__module__}.{stand_in.__name__} is there to be imported only.",
        expected="a name that docs/lmdeploy.md lists as working",
        fix=stand_in.__doc__ or "",
    )


def _stand_in(module: str, name: str, instead: str) -> _Refused:
    return _Refused(name, (), {"__module__": module, "__doc__": instead})


def _any_template(name: str) -> _Refused:
    """`lmdeploy.model` has a class for each of its templates, and new ones in every version."""
    if not name[:1].isupper():
        raise AttributeError(f"module 'lmdeploy.model' has no attribute {name!r}")
    return _stand_in(f"{_NAME}.model", name, _PARTS)


def install_as_lmdeploy() -> None:
    """Make `import lmdeploy` in this process give vlmforge's interface.

    Covers the modules `lmdeploy`, `.api`, `.messages`, `.model`, `.pipeline`, `.tokenizer`,
    `.version`, `.vl`, `.vl.constants` and `.vl.utils`. What has no like here can be imported, and
    raises NotSupportedError with what to do when it is used; `docs/lmdeploy.md` lists all names. A
    real LMDeploy that is installed is hidden, not changed.
    """
    for module in _WORKING:
        _install(module)
    # As in the original, the function hides the module of the same name.
    root = sys.modules[_NAME]
    setattr(root, "pipeline", _found("pipeline", "vlmforge.api.load"))  # noqa: B010


def _install(module: str) -> None:
    full = f"{_NAME}.{module}".rstrip(".")
    view = types.ModuleType(full, "vlmforge under LMDeploy's name; docs/lmdeploy.md")
    view.__spec__ = ModuleSpec(full, None)  # programs ask `find_spec` whether it is installed
    if any(other.startswith(f"{module}.".lstrip(".")) for other in _WORKING if other != module):
        view.__path__ = []
    for name, place in _WORKING[module].items():
        setattr(view, name, _found(name, place))
    for name, instead in _REFUSED.get(module, {}).items():
        setattr(view, name, _stand_in(full, name, instead))
    if module == "model":
        setattr(view, "__getattr__", _any_template)  # noqa: B010
    sys.modules[full] = view
    parent, _, own = full.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, view)


def _found(name: str, place: str) -> object:
    return getattr(importlib.import_module(place), name)
