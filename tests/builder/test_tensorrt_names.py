"""What our code asks of TensorRT is there, in the library that cannot be installed here too.

Enterprise TensorRT's bindings are on PyPI, its libraries are not: the extension cannot be imported.
So the names that the code uses are looked for among the strings of the extension, which hold every
name and docstring. This shows that they exist, not that they work.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import vlmforge.backends.plans as plans
import vlmforge_builder.tensorrt.compiler as compiler
import vlmforge_plugins.cached_attention.plugin as plugin

MODULES = (compiler, plugin, plans)
# Of TensorRT-RTX alone; asked for only with --compute-capability, which the other flavour refuses.
RTX_ONLY = {"ComputeCapability"}
METHODS = {
    *("parse_from_file", "num_errors", "get_error", "create_network", "create_builder_config"),
    *("build_serialized_network_to_stream", "create_optimization_profile", "set_preview_feature"),
    *("add_optimization_profile", "set_shape", "progress_monitor", "get_input", "num_inputs"),
    *("num_layers", "get_layer", "get_output", "num_outputs", "get_dimension_name"),
    *("deserialize_cuda_engine", "create_execution_context", "set_device_memory"),
    *("get_device_memory_size_for_profile_v2", "set_optimization_profile_async"),
    *("set_input_shape", "set_tensor_address", "execute_async_v3"),
    *("num_io_tensors", "get_tensor_name", "num_optimization_profiles"),
    *("register_creator", "field_names", "plugin_namespace", "plugin_version", "INT8"),
}
# What the library calls on our classes.
CALLED = {
    *("phase_start", "phase_finish", "step_complete", "log", "write", "create_plugin"),
    *("get_capability_interface", "get_output_data_types", "get_output_shapes", "clone"),
    *("get_aliased_input", "supports_format_combination", "configure_plugin", "enqueue"),
    *("get_workspace_size", "get_fields_to_serialize", "on_shape_change", "attach_to_context"),
    *("get_valid_tactics", "set_tactic"),
}


def names_of_the_library(path: Path) -> set[str]:
    """Every `trt.A.B` or `self._trt.A.B` of a module, as A and B."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        chain: list[str] = []
        value: ast.expr | ast.AST = node
        while isinstance(value, ast.Attribute):
            chain.append(value.attr)
            value = value.value
        if chain and isinstance(value, ast.Name):
            if value.id == "trt":
                found |= set(chain)
            elif (value.id, chain[-1]) == ("self", "_trt"):
                found |= set(chain[:-1])
    return found


def used() -> set[str]:
    return set().union(*(names_of_the_library(Path(str(m.__file__))) for m in MODULES))


def missing_in(module: str, names: set[str]) -> set[str]:
    """Names that occur nowhere in a module's extension.

    Not as whole strings: the linker stores one that another ends with inside that one.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    (extension,) = Path(folder).glob("*.so")
    content = extension.read_bytes()
    return {name for name in names if name.encode() + b"\0" not in content}


def test_enough_is_looked_for() -> None:
    assert {"Builder", "OnnxParser", "IPluginV3OneBuildV2", "ALIASED_PLUGIN_IO_10_03"} <= used()
    source = "".join(Path(str(module.__file__)).read_text("utf-8") for module in MODULES)
    assert all(re.search(rf"\b{name}\b", source) for name in METHODS | CALLED)


@pytest.mark.parametrize(
    ("module", "missing"),
    [("tensorrt_bindings", RTX_ONLY), ("tensorrt_rtx_bindings", set())],
    ids=["enterprise 11.4", "rtx"],
)
def test_every_name_is_in_the_library(module: str, missing: set[str]) -> None:
    assert missing_in(module, used() | METHODS | CALLED) == missing
    assert missing_in(module, {"frobnicate_the_network"})
