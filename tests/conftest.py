"""What tests share: engines built once for a run, their environment, and what a test costs."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

# Before a test imports numpy: one thread for each worker, see `_few_threads`.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

# No test judges time: a busy machine would fail it. Hypothesis does so in two places. At night the
# properties that do not say how many examples they need are given ten times as many, and each night
# others; before, a change is judged by the same ones each time: what it did not do fails nobody.
for _profile, _examples in (("house", 50), ("thorough", 500)):
    settings.register_profile(
        _profile,
        max_examples=_examples,
        derandomize=_profile == "house",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("house")


def examples(many: int) -> int:
    """Of a property that needs more than others: so many at night, and half of them before."""
    return many if settings.default.max_examples >= 500 else many // 2


# Seconds after which something hangs, on however slow a machine.
HANGS = 600.0


def wait_until(holds: Callable[[], bool]) -> None:
    """Returns as soon as `holds`: what comes late is no failure, only what never comes."""
    end = time.monotonic() + HANGS
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def resident() -> int:
    """Bytes of this process in memory, to the page; `statm` is rough where processors are many."""
    rows = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    return int(next(row for row in rows if row.startswith("Rss:")).split()[1]) << 10


ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data"
IMAGES = DATA / "images"
HF = DATA / "llava_1_5_hf"
ORIGINAL = DATA / "llava_v1_5_liuhaotian"

Builder = Callable[..., Path]


def pytest_configure() -> None:
    """A shell has what it starts in the background ignore interrupts, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take longest, by `--costs`: the longest first, down to what the last of two workers may
# be alone with, so that no core is idle while another comes to the end of one of them.
LONGEST = (
    "plugins_cuda/test_kernels.py",
    "builder/test_tensorrt_builds.py",
    "e2e/test_live_parity.py",
    "plugins_cuda/test_attention_compile.py",
    "builder/test_build_inputs.py",
    "e2e/test_cuda_engines.py",
    "e2e/test_parity_qwen.py",
    "e2e/test_seed_snippets.py",
    "e2e/test_demo_model.py",
    "recipes/test_checkpoint_keys.py",
    "builder/test_build_ends.py",
    "e2e/test_parity.py",
    "builder/test_build.py",
    "recipes/test_numbers_of_configs.py",
    "e2e/test_parity_tagged.py",
    "e2e/test_ranks.py",
    "builder/test_cuda_weights.py",
    "builder/test_assign_precision.py",
    "builder/test_layers.py",
    "builder/test_checkpoint_source.py",
    "recipes/test_tower_choice.py",
    "recipes/test_demo_training.py",
    "e2e/test_interleavings.py",
    "builder/test_checkpoint_store.py",
    "builder/test_command_ends.py",
    "e2e/test_nothing_is_executed.py",
    "e2e/test_pipeline.py",
    "recipes/test_qwen_vl.py",
    "e2e/test_build_child.py",
    "runtime/test_lifetime.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others as they come."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share, and no other run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(autouse=True, scope="session")
def _private_cache(shared: Path) -> Iterator[None]:
    """Nothing that tests build or remember goes to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMFORGE_CACHE", str(shared / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")  # of child processes, see `_few_threads`
        yield


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> Iterator[None]:
    """One thread for each worker: they share the cores already, and threads that wait spin.

    Unless a test asks for more by `EngineConfig(threads=...)`; builds that are processes of their
    own choose as users' do.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    # pytest adds handlers to loggers that do not propagate; torch makes these records, which are
    # for tools of its own, only if there are any.
    logging.getLogger("torch.__trace").propagate = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlmforge.limits.physical_cores", lambda: 1)
        yield


@pytest.fixture(autouse=True, scope="session")
def _recipes_found_once() -> Iterator[None]:
    """Looking through all that is installed takes longer than most of what is tested of recipes."""
    with pytest.MonkeyPatch.context() as patch:
        if "vlmforge_builder.recipe" in sys.modules:
            module = sys.modules["vlmforge_builder.recipe"]
            patch.setattr(module, "installed_recipes", cache(module.installed_recipes))
        yield


@pytest.fixture(autouse=True, scope="session")
def _http_clients() -> Iterator[None]:
    """They read all certificates once, not each anew; and none judges time, as by default."""
    with pytest.MonkeyPatch.context() as patch:
        made, kept = ssl.create_default_context, dict[object, ssl.SSLContext]()

        def shared_context(*args: Any, **options: Any) -> ssl.SSLContext:
            key = (os.environ.get("SSL_CERT_FILE"), args, *sorted(options.items()))
            return kept.get(key) or kept.setdefault(key, made(*args, **options))

        patch.setattr(ssl, "create_default_context", shared_context)
        if "httpx" in sys.modules:
            patience = sys.modules["httpx"]._config.DEFAULT_TIMEOUT_CONFIG
            for name in ("connect", "read", "write", "pool"):
                patch.setattr(patience, name, HANGS)
        yield


@pytest.fixture(autouse=True, scope="session")
def _kept_traces(shared: Path) -> None:
    """Builds in this process trace equal parts, and prove equal tokenizers, once for the run."""
    if "vlmforge_builder.build" in sys.modules:
        _keep_traces(shared)


def _keep_traces(shared: Path) -> None:
    from kept_tokenizers import remember_tokenizers
    from traces import remember_traces

    remember_traces(shared / "traces")
    remember_tokenizers()


@pytest.fixture
def traces_for_children(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds in child processes too; for tests whose point is not the export itself."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/keeping"), prepend=os.pathsep)
    monkeypatch.setenv("KEPT_TRACES", str(shared / "traces"))


@pytest.fixture
def builds_that_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds in child processes never go on once their first part is traced."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/keeping"), prepend=os.pathsep)
    monkeypatch.setenv("HELD_TRACES", "1")


def run_build(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`build-engine` in a process of its own."""
    command = [sys.executable, "-m", "vlmforge_builder", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def build_once(engine: Path, *arguments: object) -> Path:
    """What `build-engine` would build, in this process, unless another worker of this run did."""
    from vlmforge_builder.build import BuildOptions, build_engine
    from vlmforge_builder.command import parser
    from vlmforge_builder.progress import Progress

    _keep_traces(Path(os.environ["VLMFORGE_CACHE"]).parent)
    values = vars(parser().parse_args([*map(str, arguments), "-o", str(engine)]))
    del values["json_events"], values["until_eof"], values["describe"]
    with FileLock(f"{engine}.lock"):
        if not engine.exists():
            with Progress(text=io.StringIO()) as progress:
                build_engine(BuildOptions(**values), progress)
    return engine


# Engines of golden checkpoints whose window is not what the model was trained for.
_GOLDEN_OPTIONS: Mapping[str, tuple[object, ...]] = {HF.name: ("--session-len", 1024)}


def golden_engine(shared: Path, name: str) -> Path:
    """The float32 engine of the golden checkpoint `name` of `tests/data`, built once for a run."""
    options = _GOLDEN_OPTIONS.get(name, ())
    return build_once(shared / f"{name}.engine", DATA / name / "checkpoint", *options)


def divided_engine(shared: Path, name: str, ranks: int) -> Path:
    """The engine of a golden checkpoint for so many ranks, made once of that of one rank."""
    from vlmforge_builder.divide_engine import divide_engine
    from vlmforge_builder.progress import Progress

    engine, divided = golden_engine(shared, name), shared / f"{name}.{ranks}.engine"
    with FileLock(f"{divided}.lock"), Progress(text=io.StringIO()) as progress:
        return divide_engine(engine, divided, ranks, progress, force=False, wait=True)


def cuda_engine(shared: Path, name: str, *more: str) -> Path:
    """The float16 engine of the target cuda of a golden checkpoint, built once for a run.

    That of `HF` carries goldens; the others, and those with `more` options, do not.
    """
    options = ("--target", "cuda", "--dtype", "float16", *_GOLDEN_OPTIONS.get(name, ()), *more)
    if name != HF.name or more:
        options = (*options, "--skip-goldens")
    kind = ".".join(["cuda", *(option for option in more if not option.startswith("--"))])
    with kernels_for_one_gpu():
        return build_once(shared / f"{name}.{kind}.engine", DATA / name / "checkpoint", *options)


@pytest.fixture(scope="module")
def patient_ranks() -> Iterator[None]:
    """For modules in which no rank hangs: on a busy machine one may give no sign for a while."""
    from vlmforge.backends.ranks import guard, processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "SILENT_S", HANGS)
        patch.setattr(processes, "_START_S", HANGS)
        patch.setattr(guard, "SILENT_S", HANGS)
        yield


@contextmanager
def kernels_for_one_gpu() -> Iterator[None]:
    """Builds in this process compile kernels for one GPU; those of others say what they are."""
    from named_kernels import OneGpu
    from vlmforge.env import writable_cache
    from vlmforge_builder import kernel_files

    real = kernel_files.compiler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_files, "compiler", lambda: OneGpu(real(), writable_cache("kernels")))
        yield


@pytest.fixture(scope="session")
def hf_engine(shared: Path) -> Path:
    """The engine of the golden checkpoint in the layout of transformers."""
    return golden_engine(shared, HF.name)


@pytest.fixture(scope="session")
def original_engine(shared: Path) -> Path:
    """The engine of the golden checkpoint in the original layout."""
    return golden_engine(shared, ORIGINAL.name)


# --- what a test costs --------------------------------------------------------------------------

_SHOWN = 15
_spent = [0.0]


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended; a busy machine does not change them."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--costs",
        type=Path,
        help="a file to write the seconds of CPU time of all tests and files to",
    )


def pytest_runtest_logstart() -> None:
    _spent[0] = _cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    now = _cpu_seconds()
    report.user_properties = [*report.user_properties, ("cpu_seconds", now - _spent[0])]
    _spent[0] = now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tests that cost most, with what was set up for them, in seconds of CPU time."""
    costs: Counter[str] = Counter()
    for report in (report for kind in terminalreporter.stats.values() for report in kind):
        for name, value in getattr(report, "user_properties", ()):
            if name == "cpu_seconds":
                costs[report.nodeid] += value
    if not costs:
        return
    terminalreporter.section(f"the {_SHOWN} of {len(costs)} tests that cost most")
    for name, seconds in costs.most_common(_SHOWN):
        terminalreporter.line(f"{seconds:7.1f} s  {name}")
    terminalreporter.line(f"{costs.total():7.1f} s of CPU time in all, without imports")
    if listing := terminalreporter.config.getoption("--costs"):
        files: Counter[str] = Counter()
        for name, seconds in costs.items():
            files[name.partition("::")[0]] += seconds
        rows = [*files.most_common(), *costs.most_common()]
        listing.write_text("".join(f"{seconds:8.2f} {name}\n" for name, seconds in rows))
