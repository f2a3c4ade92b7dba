"""Serve vision-language engines: `pipeline(ENGINE)(('describe this image', image))`.

Names are imported when they are first used, so that `import vlmforge` alone costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vlmforge.version import __version__

if TYPE_CHECKING:
    from vlmforge.api.config import EngineConfig, TurbomindEngineConfig, VisionConfig, VisonConfig
    from vlmforge.api.load import pipeline
    from vlmforge.api.pipeline import Pipeline
    from vlmforge.api.pytorch_config import PytorchEngineConfig
    from vlmforge.api.session import Session
    from vlmforge.errors import (
        BackendUnavailableError,
        BuildError,
        CancelledError,
        CheckpointError,
        ConfigError,
        ContextLengthError,
        EngineError,
        EngineFormatError,
        EngineIntegrityError,
        EngineStepError,
        ImageError,
        ImageFetchError,
        InternalError,
        NotSupportedError,
        PipelineError,
        PromptError,
        QueueFullError,
        RankError,
        RequestTimeoutError,
        SessionError,
        TensorError,
        TokenizerError,
        UnsupportedModelError,
        VlmforgeError,
    )
    from vlmforge.inputs.template_config import ChatTemplateConfig
    from vlmforge.outputs.generation_config import GenerationConfig
    from vlmforge.outputs.metrics import Metrics
    from vlmforge.outputs.response import Response
    from vlmforge.vl.boxes import Box

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
    "Metrics",
    "VlmforgeError",
    "ConfigError",
    "PromptError",
    "ImageError",
    "ImageFetchError",
    "CheckpointError",
    "TensorError",
    "TokenizerError",
    "UnsupportedModelError",
    "EngineError",
    "EngineFormatError",
    "EngineIntegrityError",
    "BackendUnavailableError",
    "EngineStepError",
    "RankError",
    "BuildError",
    "SessionError",
    "NotSupportedError",
    "PipelineError",
    "QueueFullError",
    "RequestTimeoutError",
    "InternalError",
    "CancelledError",
    "ContextLengthError",
    "__version__",
]

_MODULES = {
    "pipeline": "api.load",
    "Pipeline": "api.pipeline",
    "GenerationConfig": "outputs.generation_config",
    "EngineConfig": "api.config",
    "TurbomindEngineConfig": "api.config",
    "PytorchEngineConfig": "api.pytorch_config",
    "VisionConfig": "api.config",
    "VisonConfig": "api.config",
    "ChatTemplateConfig": "inputs.template_config",
    "Response": "outputs.response",
    "Box": "vl.boxes",
    "Session": "api.session",
    "Metrics": "outputs.metrics",
    "VlmforgeError": "errors",
    "ConfigError": "errors",
    "PromptError": "errors",
    "ImageError": "errors",
    "ImageFetchError": "errors",
    "CheckpointError": "errors",
    "TensorError": "errors",
    "TokenizerError": "errors",
    "UnsupportedModelError": "errors",
    "EngineError": "errors",
    "EngineFormatError": "errors",
    "EngineIntegrityError": "errors",
    "BackendUnavailableError": "errors",
    "EngineStepError": "errors",
    "RankError": "errors",
    "BuildError": "errors",
    "SessionError": "errors",
    "NotSupportedError": "errors",
    "PipelineError": "errors",
    "QueueFullError": "errors",
    "RequestTimeoutError": "errors",
    "InternalError": "errors",
    "CancelledError": "errors",
    "ContextLengthError": "errors",
}


_WITHOUT_NUMPY = ("errors", "inputs.template_config", "outputs.metrics")


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MODULES[name] not in _WITHOUT_NUMPY:
        importlib.import_module(f"{__name__}.early")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
