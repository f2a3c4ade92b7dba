"""`PytorchEngineConfig`: LMDeploy's other engine configuration, brought to ours.

The fields are those of v0.4.2 and v0.18. As in `EngineConfig`, none is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmforge.api.config import EngineConfig
from vlmforge.api.parallel import ONE_HOST, ONE_RANK, START_MORE
from vlmforge.field_rules import (
    Choice,
    Flag,
    Int,
    ListOf,
    OrNone,
    Refusal,
    Rule,
    check_fields,
    check_refusals,
    known_fields,
)


@known_fields
@dataclass(slots=True, kw_only=True)
class PytorchEngineConfig(EngineConfig):
    """An `EngineConfig` with the names of LMDeploy's PyTorch engine, which is not what runs.

    Attributes:
        block_size, kernel_block_size, prefill_interval, eviction_type, thread_safe, eager_mode,
            cudagraph_capture_batch_sizes, piecewise_cudagraph_max_tokens, enable_microbatch,
            enable_eplb, mp_engine_backend, prefix_cache_state_budget,
            prefix_cache_decode_state_interval: Accepted: they tune machinery that is not here;
            answers do not depend on them.
        adapters, num_gpu_blocks and the others: Only their defaults; `PYTORCH_REFUSALS` says why,
            and what to do.

    Raises:
        ConfigError: a field of a wrong type, out of range, or not supported.
    """

    block_size: int = 64
    kernel_block_size: int = -1
    prefill_interval: int = 16
    eviction_type: str = "recompute"
    thread_safe: bool = False
    eager_mode: bool = False
    cudagraph_capture_batch_sizes: Sequence[int] | None = None
    piecewise_cudagraph_max_tokens: int | None = None
    enable_microbatch: bool = False
    enable_eplb: bool = False
    mp_engine_backend: str = "mp"
    prefix_cache_state_budget: int = 0
    prefix_cache_decode_state_interval: int = 0
    num_cpu_blocks: int = 0
    num_gpu_blocks: int = 0
    adapters: Mapping[str, str] | None = None
    custom_module_map: Mapping[str, str] | None = None
    device_type: str = "cuda"
    dp_rank: int = 0
    moe_tp_size: int | None = None
    distributed_executor_backend: str | None = None
    enable_mp_engine: bool = False
    logprobs_mode: str | None = None
    enable_return_routed_experts: bool = False
    enable_transfer_obj_ref: bool = False
    dllm_block_length: int | None = None
    dllm_unmasking_strategy: str = "low_confidence_dynamic"
    dllm_denoising_steps: int | None = None
    dllm_confidence_threshold: float = 0.85
    role: object = None
    migration_backend: object = None
    kv_transfer_config: object = None

    def validate(self) -> None:
        """Check all fields (ConfigError: field, value found, values expected)."""
        EngineConfig.validate(self)
        check_fields(self, PYTORCH_RULES)
        check_refusals(self, PYTORCH_REFUSALS)


PYTORCH_RULES: Mapping[str, Rule] = {
    "block_size": Int(1),
    "kernel_block_size": Int(-1),
    "prefill_interval": Int(0),
    "eviction_type": Choice(("recompute", "copy")),
    "thread_safe": Flag(),
    "eager_mode": Flag(),
    "cudagraph_capture_batch_sizes": OrNone(ListOf(Int(1))),
    "piecewise_cudagraph_max_tokens": OrNone(Int(1)),
    "enable_microbatch": Flag(),
    "enable_eplb": Flag(),
    "mp_engine_backend": Choice(("mp", "ray")),
    "prefix_cache_state_budget": Int(0),
    "prefix_cache_decode_state_interval": Int(0),
}

_NO_BLOCKS = Refusal(
    (0,),
    "the cache is a share of the free memory and not a number of blocks",
    "use cache_max_entry_count, session_len and max_batch_size",
)
_NO_DIFFUSION = "engines decode one token after the other"
_LEAVE_OUT = "leave it out"
_WHOLE = Refusal((None,), "an engine does its prefill and its decoding itself", _LEAVE_OUT)

PYTORCH_REFUSALS: Mapping[str, Refusal] = {
    "num_cpu_blocks": _NO_BLOCKS,
    "num_gpu_blocks": _NO_BLOCKS,
    "adapters": Refusal(
        (None, {}),
        "adapters are not supported",
        "merge the adapter into the checkpoint and build an engine of that",
    ),
    "custom_module_map": Refusal(
        (None, {}),
        "the modules of a model are compiled into its engine",
        "build an engine of the changed checkpoint: build-engine",
    ),
    "device_type": Refusal(
        ("cuda",),
        "an engine runs on what it was built for",
        "leave it out, and build for the device: build-engine --target",
    ),
    "dp_rank": Refusal((0,), ONE_HOST, START_MORE),
    "moe_tp_size": ONE_RANK,
    "distributed_executor_backend": Refusal((None, "uni"), ONE_HOST, START_MORE),
    "enable_mp_engine": Refusal((False,), ONE_HOST, START_MORE),
    "logprobs_mode": Refusal(
        (None,),
        "log-probabilities are those of the distribution that is sampled from",
        "leave it out, or use output_logits of GenerationConfig",
    ),
    "enable_return_routed_experts": Refusal(
        (False,), "engines do not report the routing of experts", _LEAVE_OUT
    ),
    "enable_transfer_obj_ref": Refusal((False,), ONE_HOST, _LEAVE_OUT),
    "dllm_block_length": Refusal((None,), _NO_DIFFUSION, _LEAVE_OUT),
    "dllm_unmasking_strategy": Refusal(("low_confidence_dynamic",), _NO_DIFFUSION, _LEAVE_OUT),
    "dllm_denoising_steps": Refusal((None,), _NO_DIFFUSION, _LEAVE_OUT),
    "dllm_confidence_threshold": Refusal((0.85,), _NO_DIFFUSION, _LEAVE_OUT),
    "role": _WHOLE,
    "migration_backend": _WHOLE,
    "kv_transfer_config": _WHOLE,
}
