"""On how many ranks an engine runs and how they talk: what those fields of `EngineConfig` may hold.

Ranks of one host are started by the pipeline. Hosts are told by a launcher, as in `mpirun --host
A,B -n 2 python app.py`, and by none of these fields.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge.field_rules import Refusal

ONE_HOST = "an engine and its ranks are one pipeline on one host, unless a launcher says otherwise"
START_MORE = (
    "start one pipeline for each host or device and share the prompts among them; ranks on several "
    "hosts: mpirun --host A,B -n 2 python app.py, with EngineConfig(tp=2)"
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
    first = Refusal(
        (None, list(range(tp)), tuple(range(tp))),
        "the ranks of an engine take the first devices, one each",
        "leave it out; for others set CUDA_VISIBLE_DEVICES, or start one pipeline for each",
    )
    by_tp = {"device_num": alike, "attn_tp_size": alike, "mlp_tp_size": alike, "devices": first}
    return {**_ALWAYS, **by_tp}
