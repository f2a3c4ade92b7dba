"""`install_as_lmdeploy()` and `docs/lmdeploy.md` against the public names of LMDeploy's versions.

`tests/data/lmdeploy_names.json` has the names, read from the published wheels of 0.4.2 and 0.18.0.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

import vlmforge
from conftest import DATA, IMAGES
from vlmforge.api.config import REFUSALS
from vlmforge.api.parallel import parallel_refusals
from vlmforge.api.pytorch_config import PYTORCH_REFUSALS
from vlmforge.compat import install_as_lmdeploy
from vlmforge.errors import ConfigError, ImageError, NotSupportedError, VlmforgeError
from vlmforge.inputs.template_config import REFUSALS as TEMPLATE_REFUSALS
from vlmforge.outputs.generation_config import REFUSALS as GENERATION_REFUSALS

DOCUMENT = (Path(__file__).parents[2] / "docs/lmdeploy.md").read_text("utf-8")
VERSIONS: dict[str, Any] = json.loads((DATA / "lmdeploy_names.json").read_text("utf-8"))
PHOTO = IMAGES / "alpha_97x61.png"


def rows(title: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Of the table below a heading: (module or class, name) to what it is here and what is said."""
    found = {}
    for line in DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines():
        if line.startswith("| `"):
            where, names, here, *said = (cell.strip() for cell in line.strip("|").split(" |"))
            for name in re.findall("`([^`]+)`", names):
                key = (where.strip("`| "), name)
                assert key not in found, f"{key} has two rows"
                found[key] = (here, "".join(said))
    return found


NAMES, METHODS, FIELDS = rows("Names"), rows("Methods"), rows("Fields of the configurations")


@pytest.fixture(autouse=True)
def lmdeploy() -> Iterator[Any]:
    before = dict(sys.modules)
    install_as_lmdeploy()
    yield importlib.import_module("lmdeploy")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmdeploy"]:
        del sys.modules[name]
    assert before.keys() <= sys.modules.keys()


def imported(module: str, name: str) -> Any:
    """As `from module import name` does it."""
    space: dict[str, Any] = {}
    exec(f"from {module} import {name} as it", space)
    return space["it"]


# --- the document is whole -------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_public_name_has_a_row(version: str) -> None:
    published = {
        (module, name) for module, names in VERSIONS[version]["names"].items() for name in names
    }
    assert len(published) > 50
    assert published <= NAMES.keys()
    methods = {(c, name) for c, names in VERSIONS[version]["methods"].items() for name in names}
    assert methods <= METHODS.keys()


def test_no_row_is_made_up() -> None:
    published = {
        (module, name)
        for version in VERSIONS.values()
        for module, names in version["names"].items()
        for name in names
    }
    assert NAMES.keys() == published


@pytest.mark.parametrize("version", VERSIONS)
def test_every_module_works_or_is_listed(version: str) -> None:
    for module in VERSIONS[version]["modules"]:
        full = f"lmdeploy.{module}"
        if any(where == full for where, _ in NAMES):
            importlib.import_module(full)
        elif not module.startswith("_"):
            assert f"`{full}`" in DOCUMENT
            with pytest.raises(ImportError):
                importlib.import_module(full)


# --- what it says is so ----------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), [k for k, v in NAMES.items() if v[0] == "works"])
def test_names_that_work(module: str, name: str) -> None:
    found = imported(module, name)
    if hasattr(vlmforge, name):
        assert found is getattr(vlmforge, name)
    elif callable(found):
        assert found.__module__.startswith(("vlmforge", "collections.abc", "typing"))


@pytest.mark.parametrize(("module", "name"), [k for k, v in NAMES.items() if v[0] == "refused"])
def test_names_that_are_refused_when_they_are_used(module: str, name: str) -> None:
    found = imported(module, name)
    uses = (
        lambda: found("x", key=1),
        lambda: found.method(),
        lambda: found.MEMBER,
        lambda: type("Own", (found,), {}),
    )
    for use in uses:
        with pytest.raises(NotSupportedError) as caught:
            use()
        assert isinstance(caught.value, VlmforgeError)
        assert caught.value.fix == NAMES[module, name][1]
        assert f"{module}.{name} " in str(caught.value)
    # Programs that only mention it go on.
    assert not isinstance("a response", found)
    assert f"{module}.{name}" in repr(found)


@pytest.mark.parametrize(("module", "name"), [k for k, v in NAMES.items() if v[0] == "not there"])
def test_names_that_are_not_there(module: str, name: str) -> None:
    with pytest.raises(ImportError):
        imported(module, name)


def test_methods() -> None:
    for (owner, name), (here, _) in METHODS.items():
        found = getattr(vlmforge, owner)
        fields = {f.name for f in dataclasses.fields(found)} if owner == "Session" else set()
        assert (hasattr(found, name) or name in fields) is (here == "works"), name


@pytest.mark.parametrize("name", ["lmdeploy", "lmdeploy.vl", "lmdeploy.vl.utils"])
def test_programs_see_that_it_is_installed(name: str) -> None:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.name == name


def test_the_modules_are_found_however_they_are_imported(lmdeploy: Any) -> None:
    space: dict[str, Any] = {}
    exec(
        "import lmdeploy.vl.utils as a\nfrom lmdeploy import vl\nfrom lmdeploy.vl import utils",
        space,
    )
    assert space["a"] is space["utils"] is lmdeploy.vl.utils
    # The function and the module of one name, as in the original.
    assert lmdeploy.pipeline is vlmforge.pipeline
    assert importlib.import_module("lmdeploy.pipeline").Pipeline is vlmforge.Pipeline
    assert not hasattr(vlmforge.vl, "load_video")
    assert lmdeploy.__version__ == ".".join(map(str, lmdeploy.version_info))


# --- configurations --------------------------------------------------------------------------

_REFUSALS = {
    "TurbomindEngineConfig": {**REFUSALS, **parallel_refusals(1)},
    "PytorchEngineConfig": {**REFUSALS, **parallel_refusals(1), **PYTORCH_REFUSALS},
    "GenerationConfig": GENERATION_REFUSALS,
    "ChatTemplateConfig": TEMPLATE_REFUSALS,
}
# Their defaults that are no literals, and what a program would write.
_WRITTEN = {"QuantPolicy.NONE": 0, "EngineRole.Hybrid": None, "MigrationBackend.DLSlime": None}
_CASES = [
    (version, name, field, default)
    for version, found in VERSIONS.items()
    for name, fields in found["fields"].items()
    for field, default in fields.items()
    if name != "Response"
]


def made(name: str, **fields: object) -> Any:
    first = {"model_name": "own"} if name == "ChatTemplateConfig" else {}
    return getattr(vlmforge, name)(**{**first, **fields})


@pytest.mark.parametrize(("version", "name", "field", "default"), _CASES)
def test_fields(version: str, name: str, field: str, default: str | None) -> None:
    """Their own default is taken; a refused field says what to do."""
    here, _ = FIELDS[name, field]
    if default is not None:
        value = _WRITTEN[default] if default in _WRITTEN else eval(default)
        assert getattr(made(name, **{field: value}), field) == value
    assert (field in _REFUSALS.get(name, {})) is (here == "refused" or field == "model_format")
    if here == "refused":
        with pytest.raises(ConfigError) as caught:
            made(name, **{field: "something else"})
        assert caught.value.fix
        assert field in str(caught.value)


def test_fields_of_a_response() -> None:
    ours = {field.name for field in dataclasses.fields(vlmforge.Response)}
    for version in VERSIONS.values():
        missing = version["fields"]["Response"].keys() - ours
        assert missing <= {"last_hidden_state", "routed_experts"}


def test_a_pytorch_config_is_an_engine_config() -> None:
    config = vlmforge.PytorchEngineConfig(session_len=100, block_size=32, max_batch_size=3)
    assert isinstance(config, vlmforge.EngineConfig)
    config.block_size = 0
    with pytest.raises(ConfigError, match="block_size must be a positive integer"):
        config.validate()


# --- the functions that are only here ----------------------------------------------------------


def test_images_and_base64(lmdeploy: Any) -> None:
    tools = lmdeploy.vl.utils
    original = Image.open(PHOTO)
    for source in (PHOTO, str(PHOTO), PHOTO.read_bytes(), original):
        back = tools.load_image_from_base64(tools.encode_image_base64(source))
        assert back.mode == original.mode
        assert ImageChops.difference(back, original).getbbox(alpha_only=False) is None
    assert tools.load_image_from_base64(base64.b64encode(PHOTO.read_bytes()).decode()).size == (
        97,
        61,
    )
    jpeg = base64.b64decode(tools.encode_image_base64(PHOTO, format="JPEG"))
    assert jpeg.startswith(b"\xff\xd8")


@pytest.mark.parametrize("junk", ["no base64!", "AAAA", b"\0", None, 3, "é"])
def test_what_is_no_base64(lmdeploy: Any, junk: object) -> None:
    with pytest.raises(ImageError):
        lmdeploy.vl.utils.load_image_from_base64(junk)


@pytest.mark.parametrize(("image", "form"), [("no/such.png", "PNG"), (PHOTO, "GIF"), (3, "PNG")])
def test_what_cannot_be_encoded(lmdeploy: Any, image: object, form: str) -> None:
    with pytest.raises(ImageError):
        lmdeploy.vl.encode_image_base64(image, format=form)
