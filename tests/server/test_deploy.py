"""The files of `deploy/` speak of what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from stand_in import stand_in
from vlmforge.cli import parser
from vlmforge.server.admission import Admission
from vlmforge.server.metrics import Metrics
from vlmforge.server.served import Served
from vlmforge.server.settings import ServerSettings

DEPLOY = ROOT / "deploy"


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    with stand_in() as pipe:
        pipe("hello")
        metrics = Metrics({"x": Served("x", pipe)}, Admission(ServerSettings()))
        metrics.count("/health", 200, 0.1)
        text, _ = metrics.text()
    shown = set(re.findall(r"\bvlmforge_\w+", (DEPLOY / "grafana/vlmforge.json").read_text()))
    there = set(re.findall(r"^(vlmforge_\w+)", text, re.MULTILINE))
    assert len(shown) > 10
    assert shown <= there, shown - there


@pytest.mark.nightly
def test_manifests_are_what_their_schemas_say() -> None:
    """Of Kubernetes, of Compose, and of systemd where it is there."""
    binaries = Path(sys.executable).parent
    subprocess.run([binaries / "kubernetes-validate", DEPLOY / "kubernetes.yaml"], check=True)
    schema = ("--builtin-schema", "vendor.compose-spec")
    subprocess.run([binaries / "check-jsonschema", *schema, DEPLOY / "compose.yaml"], check=True)
    if analyse := shutil.which("systemd-analyze"):
        unit = DEPLOY / "vlmforge.service"
        done = subprocess.run([analyse, "verify", unit], capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if "is not executable" not in line]
        assert not [line for line in lines if "vlmforge.service" in line]


def test_what_compose_mounts_is_there() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    mounted = re.findall(r"- \./([\w./]+):", text)
    assert len(mounted) == 4
    assert all((DEPLOY / name).is_file() for name in mounted)


def test_commands_are_those_of_the_command_line() -> None:
    options = {action for one in ("serve",) for action in parser_options(one)}
    for name in ("Containerfile", "compose.yaml", "vlmforge.service", "kubernetes.yaml"):
        text = (DEPLOY / name).read_text()
        commands = [line for line in text.splitlines() if "args:" in line or "command:" in line]
        commands += [line for line in text.splitlines() if "vlmforge serve" in line]
        given = {option for line in commands for option in re.findall(r"--[a-z-]+", line)}
        assert given <= options, (name, given - options)


def parser_options(command: str) -> set[str]:
    (actions,) = (action for action in parser()._actions if action.dest == "command")
    assert actions.choices is not None
    return set(actions.choices[command]._option_string_actions)  # type: ignore[index]
