"""Run programs that were written for LMDeploy without changing them."""

from __future__ import annotations

import sys
import types

import vlmforge
import vlmforge.vl
import vlmforge.vl.constants

_NAME = "lmdeploy"


def install_as_lmdeploy() -> None:
    """Make `import lmdeploy` in this process give vlmforge's interface.

    Covers `lmdeploy`, `lmdeploy.vl`, `lmdeploy.vl.constants`, `lmdeploy.messages` and
    `lmdeploy.model`. A real LMDeploy that is installed is hidden, not changed.
    """
    package = types.ModuleType(_NAME, "vlmforge under LMDeploy's name")
    package.__path__ = []
    for name in vlmforge.__all__:
        setattr(package, name, getattr(vlmforge, name))
    package.__version__ = vlmforge.__version__  # type: ignore[attr-defined]
    package.vl = vlmforge.vl  # type: ignore[attr-defined]
    sys.modules[_NAME] = package
    sys.modules[f"{_NAME}.vl"] = vlmforge.vl
    sys.modules[f"{_NAME}.vl.constants"] = vlmforge.vl.constants
    for module, names in {
        "messages": ("GenerationConfig", "TurbomindEngineConfig", "VisionConfig", "Response"),
        "model": ("ChatTemplateConfig",),
    }.items():
        view = types.ModuleType(f"{_NAME}.{module}")
        for name in names:
            setattr(view, name, getattr(vlmforge, name))
        setattr(package, module, view)
        sys.modules[f"{_NAME}.{module}"] = view
