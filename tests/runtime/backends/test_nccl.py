"""Meetings by NCCL, as far as its bindings tell without a GPU."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from cuda.bindings import driver

from host_gpus import all_ranks
from vlmforge.backends.cuda import nccl
from vlmforge.backends.cuda.device import Tensor
from vlmforge.errors import EngineError

GOOD = driver.CUresult.CUDA_SUCCESS


class Bindings:
    """Calls of NCCL as its bindings have them: their documentation begins with the signature."""

    def __init__(self) -> None:
        from nccl.bindings import nccl as real

        self.real, self.calls = real, []  # type: ignore[var-annotated]
        self.DataType, self.RedOp, self.NCCLError = real.DataType, real.RedOp, real.NCCLError
        self.aborted = threading.Event()
        self.ids = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        words = getattr(self.real, name).__doc__
        parameters = re.match(rf"{name}\((.*?)\)", words)
        assert parameters is not None, words
        count = len([one for one in parameters[1].split(",") if one])

        def called(*arguments: object) -> Any:
            assert len(arguments) == count, f"{words}: {arguments}"
            self.calls.append((name, *arguments))
            if name == "comm_abort":
                time.sleep(0.2)  # who does not wait for it finds it at this
                self.aborted.set()
            return {"get_unique_id": bytes(range(128)), "comm_user_rank": 1}.get(name, name)

        return called


def test_nccl_is_called_as_its_bindings_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []
    monkeypatch.setattr(driver, "cuMemsetD8Async", lambda *a: copies.append(a) or (GOOD,))
    monkeypatch.setattr(driver, "cuMemcpy2DAsync", lambda *a: copies.append(a) or (GOOD,))
    known = [Bindings(), Bindings()]
    found = iter(known)
    lock = threading.Lock()

    def load(name: str) -> Bindings:
        assert name == "nccl.bindings.nccl"
        with lock:
            return next(found)

    monkeypatch.setattr(nccl.importlib, "import_module", load)
    monkeypatch.setattr(nccl, "enter", lambda ordinal: None)
    made = all_ranks(2, nccl.Nccl.made)  # type: ignore[arg-type]
    assert all(isinstance(one, nccl.Nccl) for one in made), made
    starts = sorted(c for b in known for c in b.calls if c[0] == "comm_init_rank_scalable")
    key = bytearray(range(128))
    assert starts == [("comm_init_rank_scalable", 2, rank, 1, key, 0) for rank in range(2)]
    one, bindings = made[0], made[0]._nccl
    given, out = Tensor("a", "bfloat16", (4, 10), 1000), Tensor("b", "bfloat16", (4, 17), 5000)
    one.all_gather(given, out)()
    (_, address, zero, size, _), (copy, _) = ("", *copies[0]), copies[1]
    assert (address, zero, size) == (5000, 0, 2 * 4 * 17)
    assert (copy.srcPitch, copy.dstPitch, copy.WidthInBytes, copy.Height) == (20, 34, 14, 4)
    assert int(copy.dstDevice) == 5000 + 20  # it is rank 1's: what is padded falls away
    kind, total = int(bindings.DataType.Bfloat16), int(bindings.RedOp.Sum)
    reduced = ("all_reduce", 5000, 5000, 68, kind, total, "comm_init_rank_scalable", 0)
    assert bindings.calls[-1] == reduced
    one.broadcast(1000, 5000, 9)()
    whole = int(bindings.DataType.Int64)
    told = ("broadcast", 1000, 5000, 9, whole, 0, "comm_init_rank_scalable", 0)
    assert bindings.calls[-1] == told
    watched = list[Any]()
    monkeypatch.setattr(nccl.lifetime, "watch", watched.append)
    one.give_up()
    one.give_up()
    (leaving,) = watched
    leaving.end()  # as the process has it, when it ends
    assert bindings.aborted.is_set()
    with pytest.raises(EngineError, match="do not meet any more"):
        one.all_reduce(out, out)()
    assert [name for name, *_ in bindings.calls].count("comm_abort") == 1


def test_without_nccl_it_is_said_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(nccl.importlib, "import_module", load)
    reason = "rank 0: No module named 'nccl.bindings.nccl'"
    assert all_ranks(2, nccl.Nccl.made) == [reason] * 2  # type: ignore[arg-type]
