"""Locks and lifelines: what lives exactly as long as a process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from vlmforge.engine.lifeline import end_with_parent
from vlmforge.engine.ownership import HeldError, sole_owner

HANG_S = 600  # no judge of speed: what hangs is to fail, not to hang the run

HOLDER = """
import sys
from pathlib import Path
from vlmforge.engine.ownership import sole_owner
with sole_owner(Path(sys.argv[1]), None):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(lock: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_holder_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holder(lock) as process:
        named = rf"^process {process.pid} on .+, since 2"
        with pytest.raises(HeldError, match=named), sole_owner(lock, None):
            raise AssertionError("two owners")
        process.kill()
    assert lock.exists()  # what is left of it
    with sole_owner(lock, None):
        assert lock.read_text("utf-8").startswith(f"process {os.getpid()} on ")
    assert not lock.exists()


def test_many_wait_and_each_is_alone(tmp_path: Path) -> None:
    """The file comes and goes meanwhile, which must not give two of them a lock each."""
    lock, inside, most = tmp_path / "lock", [], []

    def work() -> None:
        with sole_owner(lock, lambda _: None):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert most == [1] * 8
    assert list(tmp_path.iterdir()) == []


def test_who_waits_is_told_for_whom(tmp_path: Path) -> None:
    lock, told = tmp_path / "lock", threading.Event()
    holders: list[str] = []

    def wait(name: str) -> None:
        holders.append(name)
        told.set()

    def work() -> None:
        with sole_owner(lock, wait):
            holders.append("in")

    thread = threading.Thread(target=work)
    with sole_owner(lock, None):
        thread.start()
        assert told.wait(HANG_S)
        assert len(holders) == 1
    thread.join(HANG_S)
    assert holders[0].startswith(f"process {os.getpid()} on ")
    assert holders[1:] == ["in"]


# --- the lifeline ------------------------------------------------------------------------------

# A child that holds a lock, and spins in C code that no signal's handler in Python interrupts.
CHILD = """
import signal, sys
from filelock import FileLock
from vlmforge.engine.lifeline import end_with_parent
signal.alarm(600)  # if nothing else ends it
lock = FileLock(sys.argv[1])
lock.acquire()
end_with_parent(signal.Signals[sys.argv[2]])
print("held", flush=True)
sum(iter(int, 1))
"""
# Its parent: a thread starts it and ends at once, which must not end the child.
PARENT = f"""
import subprocess, sys, threading, time
started = []
def start():
    command = [sys.executable, "-c", {CHILD!r}, *sys.argv[1:]]
    started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
thread = threading.Thread(target=start)
thread.start()
thread.join()
started[0].stdout.readline()
print("alive", started[0].poll(), flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("death", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_child_ends_with_its_parent(tmp_path: Path, death: signal.Signals, sent: str) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(lock), sent],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "alive None\n"
        parent.send_signal(death)
    with FileLock(lock).acquire(timeout=HANG_S):
        pass


def test_a_parent_that_is_gone_already() -> None:
    program = (
        "import signal; from vlmforge.engine.lifeline import end_with_parent\n"
        "end_with_parent(signal.SIGTERM); signal.pause()"
    )
    done = subprocess.run([sys.executable, "-c", program], input="", text=True, check=False)
    assert done.returncode == -signal.SIGTERM


def test_no_standard_input() -> None:
    program = "import os; os.close(0)\n" + "from vlmforge.engine.lifeline import end_with_parent\n"
    program += "import signal\ntry: end_with_parent(signal.SIGTERM)\nexcept OSError: print('told')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "told\n"
    assert end_with_parent.__doc__
