"""Ranks on two hosts: two network namespaces that see each other by one cable, and mpirun."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import HANGS, HF, divided_engine
from vlmforge import GenerationConfig, pipeline

APP = """
import sys
from vlmforge import EngineConfig, GenerationConfig, pipeline
with pipeline(sys.argv[1], EngineConfig(tp=2, communicator="mpi")) as pipe:
    print(pipe("hi", GenerationConfig(max_new_tokens=16, ignore_eos=True)).token_ids)
"""
# What mpirun would start by ssh.
SHELL = """#!/bin/sh
[ "$1" = -x ] && shift
host=$1; shift
[ "$host" = 10.9.0.2 ] && exec nsenter -t "$OTHER" -n -m -i -u sh -c "$*"
exec sh -c "$*"
"""
# The other host has memory, names and devices of its own; what passes between is counted.
HOSTS = """
set -e
mount -t sysfs none /sys
ip link set lo up
unshare -n -m -i -u sh -c '
    mount -t sysfs none /sys; mount -t tmpfs none /dev/shm; hostname other; exec sleep 600
' > /dev/null 2>&1 &
export OTHER=$!
trap "kill $OTHER" EXIT
until [ "$(cat /proc/$OTHER/comm)" = sleep ]; do sleep 0.05; done
ip link add here type veth peer name there
ip link set there netns $OTHER
ip addr add 10.9.0.1/24 dev here
ip link set here up
nsenter -t $OTHER -n sh -c '
    ip addr add 10.9.0.2/24 dev there; ip link set there up; ip link set lo up
'
UCX_TLS=tcp,self "$1" -hosts 10.9.0.1,10.9.0.2 -launcher ssh -launcher-exec "$PWD/shell" \
    -n 2 -ppn 1 "$2" app.py "$3"
cat /sys/class/net/here/statistics/rx_bytes
"""


def _namespaces() -> bool:
    """Whether a user may make some here, and the tools for it are there."""
    tools = all(map(shutil.which, ("unshare", "nsenter", "ip")))
    command = ["unshare", "-Urnm", "mount", "-t", "sysfs", "none", "/sys"]
    return tools and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.nightly
def test_an_engine_answers_across_them(hf_engine: Path, shared: Path, tmp_path: Path) -> None:
    assert _namespaces(), "it needs unshare, nsenter and ip, and namespaces that users may make"
    (tmp_path / "app.py").write_text(APP, "utf-8")
    (tmp_path / "shell").write_text(SHELL, "utf-8")
    (tmp_path / "shell").chmod(0o755)
    mpirun = Path(sys.executable).with_name("mpirun")
    given = [mpirun, sys.executable, divided_engine(shared, HF.name, 2)]
    done = subprocess.run(
        ["unshare", "-Urnm", "sh", "-c", HOSTS, "sh", *map(str, given)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    tokens, received = done.stdout.splitlines()
    with pipeline(hf_engine) as pipe:
        answer = pipe("hi", GenerationConfig(max_new_tokens=16, ignore_eos=True))
    assert tokens == str(answer.token_ids)
    assert int(received) > 16 * 5 * 512  # what one rank gives of each token, at five meetings
