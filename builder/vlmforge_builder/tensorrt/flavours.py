"""TensorRT and TensorRT-RTX: one interface, two libraries. What differs between them is data."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from vlmforge.errors import BuildError, ConfigError


@dataclass(frozen=True, slots=True)
class Flavour:
    """A library.

    Attributes:
        name: Of the target and of the backend.
        module: What is imported.
        requirement: What pip installs it by.
        libraries: The package whose folder holds its shared libraries.
        linked: A library that its parser opens by a name that the package does not have. The file
            is there with a version behind the name.
        capabilities: What `--compute-capability` may name, and the library's word for it. Empty:
            plans are for the GPU that they are built on.
        meets: Whether ranks meet inside its plans, by an op of the library's own.
    """

    name: str
    module: str
    requirement: str
    libraries: str
    linked: str | None
    capabilities: tuple[tuple[str, str], ...]
    meets: bool = False


TENSORRT = Flavour("tensorrt", "tensorrt", "tensorrt>=11", "tensorrt_libs", None, (), meets=True)
TENSORRT_RTX = Flavour(
    "tensorrt_rtx",
    "tensorrt_rtx",
    "tensorrt-rtx>=1.7",
    "tensorrt_rtx_libs",
    "libtensorrt_rtx.so",
    (
        ("7.5", "SM75"),
        ("8.0", "SM80"),
        ("8.6", "SM86"),
        ("8.9", "SM89"),
        ("12.0", "SM120"),
        ("12.1", "SM121"),
    ),
)
FLAVOURS = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}


def check_installed(flavour: Flavour) -> None:
    """Raise BuildError where the library is not there."""
    if importlib.util.find_spec(flavour.module) is None:
        extra = flavour.name.replace("_", "-")
        raise BuildError(
            f"The library of the target {flavour.name} is not installed.",
            found=f"no module {flavour.module}",
            expected=flavour.requirement,
            fix=f"pip install 'vlmforge[build,{extra}]'",
        )


def capability_name(flavour: Flavour, wanted: str | None) -> str | None:
    """The library's word for a compute capability such as "8.9"; None: its default.

    Raises:
        ConfigError: one that the library does not compile for, or it takes none.
    """
    if wanted is None:
        return None
    known = dict(flavour.capabilities)
    if wanted not in known:
        expected = ", ".join(known) or "none: plans are for the GPU that they are built on"
        raise ConfigError(
            f"The target {flavour.name} does not compile for this compute capability.",
            found=repr(wanted),
            expected=expected,
            fix="leave --compute-capability out" if not known else "--compute-capability 8.9",
        )
    return known[wanted]


@contextmanager
def library_path(flavour: Flavour, scratch: Path) -> Iterator[Path | None]:
    """A folder for LD_LIBRARY_PATH that gives the library the name its parser opens it by.

    It is made in `scratch`.

    Without it TensorRT-RTX 1.7 ends the process as soon as a graph has a plugin.
    """
    spec = importlib.util.find_spec(flavour.libraries)
    places = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    files = [f for place in places for f in sorted(place.glob(f"{flavour.linked}.*"))]
    if flavour.linked is None or not files:
        yield None
        return
    with TemporaryDirectory(prefix="libraries-", dir=scratch) as folder:
        (Path(folder) / flavour.linked).symlink_to(files[0])
        yield Path(folder)
