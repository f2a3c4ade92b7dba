"""The rules of the house that no linter knows, checked over every file of the repository."""

from __future__ import annotations

import ast
import gc
import importlib
import os
import pkgutil
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import vlmforge_recipes
from conftest import HANGS, LONGEST

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "runtime": "vlmforge",
    "builder": "vlmforge_builder",
    "plugins_cuda": "vlmforge_plugins",
    "recipes": "vlmforge_recipes",
}
FAMILY_FREE = ("runtime", "builder", "plugins_cuda")
# "clip" is a verb as well: only its capitals, or what follows it, make it a model's name.
FAMILY_NAME = re.compile(
    r"(?i:llava|qwen|vicuna|llama|mistral|mixtral|lmsys|liuhaotian|siglip|internv|smolvlm|idefics|got.?ocr|deepseek|01-ai"
    r"|(?<![a-z])yi[-_ ]?(?:vl|\d+b)|(?<![a-z])clip[-_/ ]?(?:vit|vision|tower|text|model|large))"
    r"|(?<![A-Z])CLIP"
)


@cache
def tracked() -> tuple[Path, ...]:
    """Files under version control or about to be; without git, all that are not generated."""
    git = shutil.which("git")
    if git is not None:
        command = [git, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        names = set(done.stdout.split("\0")) - {""}
        if done.returncode == 0 and names:
            return tuple(path for name in sorted(names) if (path := ROOT / name).is_file())
    return tuple(sorted(_walk(ROOT)))


def _walk(folder: Path) -> Iterator[Path]:
    generated = {".git", ".venv", ".hypothesis", "out", "build", "dist", "__pycache__"}
    for path in folder.iterdir():
        if path.name in generated or path.name.endswith(("_cache", ".egg-info")):
            continue
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def python_files(*tops: str) -> list[Path]:
    """Python files below these folders of the repository (below all, if none is given)."""
    files = [path for path in tracked() if path.suffix == ".py"]
    return [path for path in files if not tops or path.relative_to(ROOT).parts[0] in tops]


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file, parsed and walked once for all rules."""
    gc.disable()  # all of it stays: to look for garbage takes as long as to parse
    try:
        return tuple(ast.walk(ast.parse(path.read_text("utf-8"), str(path))))
    finally:
        gc.enable()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lengths in lines of a file's functions."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name_of(path)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1  # type: ignore[operator]


def test_the_walk_sees_the_repository() -> None:
    names = {name_of(path) for path in tracked()}
    assert {"pyproject.toml", "Makefile", "runtime/vlmforge/engine/manifest.py"} <= names
    assert name_of(Path(__file__)) in names
    assert not any("__pycache__" in name or name.startswith((".venv", "out/")) for name in names)
    for top, package in PACKAGES.items():
        assert f"{top}/{package}/__init__.py" in names


def test_files_have_at_most_400_lines() -> None:
    lengths = {name_of(p): len(p.read_text("utf-8").splitlines()) for p in python_files()}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_functions_have_at_most_60_lines() -> None:
    found = [f for path in python_files() for f in functions(path)]
    assert len(found) > 500
    assert [f for f in found if f[1] > 60] == []


@pytest.mark.parametrize("top", ["runtime", "builder", "recipes"])
def test_the_median_function_has_at_most_12_lines(top: str) -> None:
    assert statistics.median(n for path in python_files(top) for _, n in functions(path)) <= 12


@pytest.mark.parametrize(
    "text",
    [
        *("LlavaConfig", "llama_decoder", "Qwen-VL", "vicuna_v1", "Yi-VL", "yi_vl", "Mistral"),
        *("a CLIP tower", "CLIPVisionModel", "clip-vit-large", "clip_tower", "lmsys/x"),
    ],
)
def test_the_pattern_knows_families(text: str) -> None:
    assert FAMILY_NAME.search(text)


@pytest.mark.parametrize(
    "text",
    [
        *("np.clip(x, 0, 1)", "clipped", "op.Clip", "clip=True", "eclipse", "clip to 8 bits"),
        *("install_as_lmdeploy", "LMDeploy", "from LMDeploy's pipeline", "yields", "yi"),
    ],
)
def test_the_pattern_leaves_words_alone(text: str) -> None:
    assert not FAMILY_NAME.search(text)


def test_no_model_family_is_named_outside_the_recipes() -> None:
    found = []
    for path in tracked():
        if path.relative_to(ROOT).parts[0] not in FAMILY_FREE:
            continue
        text = path.read_bytes().decode("utf-8", "replace")
        lines = [name_of(path), *text.splitlines()]
        found += [
            f"{lines[0]}:{i} {s.strip()}" for i, s in enumerate(lines) if FAMILY_NAME.search(s)
        ]
    assert found == []


def test_every_family_exposes_its_recipe() -> None:
    families = [m.name for m in pkgutil.iter_modules(vlmforge_recipes.__path__) if m.ispkg]
    assert families
    for family in families:
        recipe = importlib.import_module(f"vlmforge_recipes.{family}").RECIPE
        assert recipe.name
        assert callable(recipe.matches)
        assert callable(recipe.load)


def test_no_module_is_named_for_nothing() -> None:
    vague = re.compile(r"^(utils?|common|helpers?|managers?|misc)$|_(utils?|helpers?|managers?)$")
    parts = {name_of(p): p.relative_to(ROOT).with_suffix("").parts for p in python_files()}
    assert [name for name, words in parts.items() if any(map(vague.search, words))] == []


def test_no_import_is_relative() -> None:
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in python_files()
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert found == []


def _swallows(node: ast.AST) -> bool:
    """`except Exception: pass` and its kin; `suppress(Exception)`."""
    if isinstance(node, ast.ExceptHandler):
        idle = all(
            isinstance(step, ast.Pass | ast.Continue)
            or (isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant))
            for step in node.body
        )
        return idle and (node.type is None or _is_any_error(node.type))
    if isinstance(node, ast.Call) and _last_name(node.func).endswith("suppress"):
        return any(_is_any_error(argument) for argument in node.args)
    return False


def _last_name(node: ast.expr) -> str:
    """`c` of `a.b.c`: no more of a call's name is asked for, and writing it all takes long."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _is_any_error(node: ast.expr) -> bool:
    kinds = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("try: f()\nexcept Exception: pass", True),
        ("try: f()\nexcept (ValueError, BaseException): ...", True),
        ("try: f()\nexcept: pass", True),
        ("with contextlib.suppress(Exception): f()", True),
        ("try: f()\nexcept Exception: g()", False),
        ("try: f()\nexcept ValueError: pass", False),
        ("with suppress(OSError): f()", False),
    ],
)
def test_what_counts_as_swallowing(code: str, expected: bool) -> None:
    assert any(map(_swallows, ast.walk(ast.parse(code)))) is expected


def test_no_error_is_swallowed_unseen() -> None:
    found = [
        f"{name_of(path)}:{node.lineno}"  # type: ignore[attr-defined]
        for path in python_files()
        for node in nodes(path)
        if _swallows(node)
    ]
    assert found == []


def test_the_environment_is_read_in_one_place() -> None:
    found = {
        name_of(path)
        for path in python_files(*PACKAGES)
        for node in nodes(path)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"))
        or (isinstance(node, ast.alias) and node.name in ("environ", "getenv", "environb"))
    }
    assert found == {"runtime/vlmforge/env.py"}


# In code and in the text of programs that code starts; words about the library are fine.
_IMPORTS_ORT = re.compile(
    r"^\s*(?:import|from)\s+onnxruntime\b|^\s*import .*,\s*onnxruntime\b"
    r"|(?:import_module|__import__|find_spec)\(\s*['\"]onnxruntime\b",
    re.MULTILINE,
)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        *(("import onnxruntime as ort", True), ("import os, onnxruntime", True)),
        *(("    from onnxruntime.capi import x", True), ("import_module('onnxruntime')", True)),
        *(("from vlmforge.ort import ort", False), ("# onnxruntime is imported later", False)),
        ("from vlmforge.backends.onnxruntime import BACKEND", False),
    ],
)
def test_what_counts_as_importing_onnx_runtime(code: str, found: bool) -> None:
    assert bool(_IMPORTS_ORT.search(code)) is found


def test_onnx_runtime_is_imported_in_one_place_which_switches_its_telemetry_off() -> None:
    about_it = {name_of(Path(__file__)), "tests/runtime/test_telemetry.py"}
    found = {name_of(path) for path in python_files() if _IMPORTS_ORT.search(path.read_text())}
    assert found - about_it == {"runtime/vlmforge/ort.py"}


def test_the_hubs_client_is_imported_in_one_place_which_switches_its_telemetry_off() -> None:
    importing = re.compile(r"^\s*(import|from) huggingface_hub\b", re.MULTILINE)
    tops = ("runtime", "builder", "recipes")
    files = [path for top in tops for path in python_files(top)]
    found = {name_of(path) for path in files if importing.search(path.read_text())}
    assert found == {"builder/vlmforge_builder/hub.py"}


def test_no_test_is_skipped_or_expected_to_fail() -> None:
    quiet = ("skip", "skipif", "xfail", "importorskip", "skipTest", "SkipTest")
    found = [
        f"{name_of(path)}:{node.lineno} {node.attr}"
        for path in python_files("tests")
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr in quiet
    ]
    assert found == []


CLOCKS = ("perf_counter", "monotonic", "process_time", "thread_time", "perf_counter_ns")
# Measures, and compares only what must hold on any machine: parts with their sum.
MEASURES = {"tests/conftest.py", "tests/e2e/test_pipeline.py"}


def judges_time(node: ast.AST) -> str | None:
    """What of this node hangs on the machine's speed."""
    if isinstance(node, ast.Attribute):
        return node.attr if node.attr in CLOCKS and ast.unparse(node.value) == "time" else None
    if not isinstance(node, ast.Call):
        return None
    name = _last_name(node.func)
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg == "deadline" and value is not None:
            return f"deadline={value}"
        if keyword.arg == "timeout" and isinstance(value, int | float) and value < HANGS:
            return f"{name}(timeout={value})"
    if name == "join" and any(isinstance(a, ast.Constant) for a in node.args):
        value = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
        return f"join({value})" if isinstance(value, int | float) else None
    return None


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("assert time.perf_counter() - start < 1", "perf_counter"),
        ("settings(deadline=200)", "deadline=200"),
        ("child.communicate(timeout=5)", "communicate(timeout=5)"),
        ("thread.join(2.5)", "join(2.5)"),
        ("settings(deadline=None)", None),
        ("child.communicate(timeout=HANGS)", None),
        ("', '.join('ab')", None),
        ("thread.join()", None),
    ],
)
def test_what_counts_as_judging_time(code: str, found: str | None) -> None:
    assert next(filter(None, map(judges_time, ast.walk(ast.parse(code)))), None) == found


def test_no_test_judges_time() -> None:
    found = [
        f"{name_of(path)}:{getattr(node, 'lineno', 0)} {why}"
        for path in python_files("tests")
        if name_of(path) not in MEASURES
        for node in nodes(path)
        if (why := judges_time(node))
    ]
    assert found == []


def test_no_property_has_a_time_limit() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check


def test_files_of_tests_have_names_of_their_own() -> None:
    names = [path.name for path in python_files("tests")]
    assert len(names) == len(set(names))


def test_the_longest_files_of_tests_are_there() -> None:
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []


def test_the_import_rules_are_kept() -> None:
    program = "from importlinter.cli import lint_imports_command as run; run()"
    command = [sys.executable, "-c", program, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 3 kept, 0 broken." in done.stdout


def test_the_repository_is_small() -> None:
    sizes = {name_of(path): path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) < 30_000_000, sorted(sizes.items(), key=lambda s: -s[1])[:10]


def make(*arguments: str) -> str:
    # Under `make test` this would be a sub-make, which prints more.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    command = ["make", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bare_make_lists_every_command_with_its_help() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    helps = dict(re.findall(r"^([a-z-]+):.*?## (.+)$", text, re.MULTILINE))
    assert set(phony.split()) == set(helps) >= {"demo", "test", "check", "bench"}
    lines = make().splitlines()
    assert [line.split(maxsplit=2) for line in lines] == [["make", *h] for h in helps.items()]


def test_ci_runs_commands_that_exist() -> None:
    script = (ROOT / ".ci/run").read_text("utf-8")
    (targets,) = re.findall(r"^exec make (.*)$", script, re.MULTILINE)
    assert {"check", "test"} <= set(targets.split())
    assert make("--dry-run", *targets.split())
