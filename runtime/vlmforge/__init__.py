"""Serve vision-language engines: `pipeline(ENGINE)(('describe this image', image))`."""

from vlmforge.api import pipeline
from vlmforge.config import (
    ChatTemplateConfig,
    EngineConfig,
    TurbomindEngineConfig,
    VisionConfig,
    VisonConfig,
)
from vlmforge.generation import GenerationConfig
from vlmforge.pipeline import Pipeline
from vlmforge.response import Response
from vlmforge.session import Session
from vlmforge.version import __version__

__all__ = [
    "pipeline",
    "Pipeline",
    "GenerationConfig",
    "EngineConfig",
    "TurbomindEngineConfig",
    "VisionConfig",
    "VisonConfig",
    "ChatTemplateConfig",
    "Response",
    "Session",
    "__version__",
]
