"""On how many ranks an engine runs and how they talk: what those fields of `EngineConfig` may hold.

Ranks of one host are started by the pipeline. Hosts are told by a launcher, as in `mpirun --host
A,B -n 2 python app.py`, and by none of these fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmforge.errors import ConfigError
from vlmforge.field_rules import Refusal, shown

ONE_HOST = "an engine and its ranks are one pipeline on one host, unless a launcher says otherwise"
START_MORE = (
    "start one pipeline for each host or device and share the prompts among them; ranks on several "
    "hosts: mpirun --host A,B -n 2 python app.py, with EngineConfig(tp=2, communicator='mpi')"
)
NO_OTHER_CUT = "of the ways to cut a model there is tp: a shard of the decoder for each rank"
_USE_TP = "use tp=N, which wants no other number beside it"
ONE_RANK = Refusal((None, 1), NO_OTHER_CUT, _USE_TP)
ONE_REPLICA = Refusal((None, 1), ONE_HOST, START_MORE)

_ALWAYS: Mapping[str, Refusal] = {
    "cp": Refusal((1,), NO_OTHER_CUT, _USE_TP),
    "ep": Refusal((1,), NO_OTHER_CUT, _USE_TP),
    "attn_cp_size": ONE_RANK,
    "dp": ONE_REPLICA,
    "attn_dp_size": ONE_REPLICA,
    "mlp_dp_size": ONE_REPLICA,
    "outer_dp_size": ONE_REPLICA,
    "nnodes": ONE_REPLICA,
    "node_rank": Refusal((0,), ONE_HOST, START_MORE),
    "dist_init_addr": Refusal((None,), ONE_HOST, START_MORE),
    "communicator": Refusal(
        ("nccl", "mpi"),
        "ranks talk by the fastest way that their backend has, or by MPI under its launcher",
        "leave it out, or use 'mpi' in a program that mpirun has started",
    ),
}


def parallel_refusals(tp: int) -> Mapping[str, Refusal]:
    """Of all fields that have to do with ranks, for a configuration of so many."""
    alike = Refusal((None, tp), NO_OTHER_CUT, _USE_TP)
    return {**_ALWAYS, "device_num": alike, "attn_tp_size": alike, "mlp_tp_size": alike}


def devices_of(asked: Sequence[int] | None, ranks: int) -> tuple[int, ...]:
    """The numbers of the ranks' devices, one each (ConfigError: not as many, or one twice)."""
    if asked is None:
        return tuple(range(ranks))
    if len(asked) != ranks or len(set(asked)) != ranks:
        raise ConfigError(
            "EngineConfig: devices names no device for each rank of the engine.",
            found=f"devices={shown(list(asked))}",
            expected=f"{ranks} different numbers",
            fix=f"devices={list(range(ranks))}, or leave it out: it means the first devices",
        )
    return tuple(int(number) for number in asked)


def check_processors(devices: Sequence[int]) -> None:
    """ConfigError: other devices than the first ones, for an engine that runs on processors."""
    if list(devices) != list(range(len(devices))):
        raise ConfigError(
            "EngineConfig: an engine for processors takes the first devices.",
            found=f"devices={shown(list(devices))}",
            expected="no devices",
            fix="leave it out; taskset, or a container, says which processors a program may use",
        )
