"""Serve vision-language engines: `pipeline(ENGINE)(('describe this image', image))`.

Names are imported when they are first used, so that `import vlmforge` alone costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vlmforge.version import __version__

if TYPE_CHECKING:
    from vlmforge.api import pipeline
    from vlmforge.boxes import Box
    from vlmforge.config import (
        EngineConfig,
        TurbomindEngineConfig,
        VisionConfig,
        VisonConfig,
    )
    from vlmforge.errors import (
        BuildError,
        CancelledError,
        CheckpointError,
        ConfigError,
        ContextLengthError,
        EngineError,
        ImageError,
        PromptError,
        VlmforgeError,
    )
    from vlmforge.generation import GenerationConfig
    from vlmforge.pipe import Pipeline
    from vlmforge.pytorch_config import PytorchEngineConfig
    from vlmforge.response import Response
    from vlmforge.session import Session
    from vlmforge.template_config import ChatTemplateConfig

__all__ = [
    "pipeline",
    "Pipeline",
    "GenerationConfig",
    "EngineConfig",
    "TurbomindEngineConfig",
    "PytorchEngineConfig",
    "VisionConfig",
    "VisonConfig",
    "ChatTemplateConfig",
    "Response",
    "Box",
    "Session",
    "VlmforgeError",
    "ConfigError",
    "PromptError",
    "ContextLengthError",
    "ImageError",
    "CheckpointError",
    "EngineError",
    "BuildError",
    "CancelledError",
    "__version__",
]

_MODULES = {
    "pipeline": "api",
    "Pipeline": "pipe",
    "GenerationConfig": "generation",
    "EngineConfig": "config",
    "TurbomindEngineConfig": "config",
    "PytorchEngineConfig": "pytorch_config",
    "VisionConfig": "config",
    "VisonConfig": "config",
    "ChatTemplateConfig": "template_config",
    "Response": "response",
    "Box": "boxes",
    "Session": "session",
    "VlmforgeError": "errors",
    "ConfigError": "errors",
    "PromptError": "errors",
    "ContextLengthError": "errors",
    "ImageError": "errors",
    "CheckpointError": "errors",
    "EngineError": "errors",
    "BuildError": "errors",
    "CancelledError": "errors",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
