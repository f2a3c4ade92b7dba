"""What a pipeline is made with: `EngineConfig`, `VisionConfig`.

The fields are those of LMDeploy v0.4.2 and of its present version. A field that this runtime
cannot honour is refused when it is set, with what to do instead; none is ignored in silence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from vlmforge.api.parallel import parallel_refusals
from vlmforge.errors import ConfigError
from vlmforge.field_rules import (
    Choice,
    Flag,
    FlagOrFolder,
    Int,
    ListOf,
    Number,
    OrNone,
    Refusal,
    Rule,
    Text,
    check_fields,
    check_refusals,
    known_fields,
)
from vlmforge.vl.image_limits import DEFAULT_FORMATS, FORMATS, ImageLimits

MAX_GPU_CHUNK, USUAL_GPU_CHUNK = 8192, 2048
MAX_CHUNK = 512  # attention keeps a score for each of them, each head and each token before
MAX_SEQUENCES = 1 << 16  # more would be bookkeeping, for seconds, of what no machine runs at once


@known_fields
@dataclass(slots=True)
class EngineConfig:
    """How an engine is loaded. Checked when it is made, and again by `pipeline`; never changed.

    Attributes:
        model_format: Of a checkpoint: "hf"; None: detect.
        tp: Ranks, each a process with its share of the decoder's weights. An engine that was built
            for several has those, and refuses another number but 1, which is the default; one of a
            single rank for processors is cut into so many, once, and the result kept in the cache
            directory.
        device_num, attn_tp_size, mlp_tp_size: Accepted where they say what `tp` does.
        devices: Numbers of the GPUs, one for each rank; None: the first ones.
        communicator: "nccl" is the fastest way that the backend has; on processors, shared memory.
            "mpi": the program was started by mpirun, once for each rank.
        session_len: Tokens of one conversation, images and answers included; None: the engine's.
            It may be longer than that, as long as memory holds it and nothing is compiled in.
        max_batch_size: Sequences at once, at most 65536; None: the engine's.
        cache_max_entry_count: Share of the free memory that the key/value cache may take. (0, 1]
        enable_prefix_caching: Reuse the cache of prompts that begin alike, images included. The
            answers are the same without; it only costs time.
        max_prefill_token_num: Tokens of prompts in one step, of as many prompts as have room in
            it; on processors these are run one after the other, on GPUs at once. None: 512; on
            GPUs 2048, or half or a quarter of it where they would take more than a tenth of the
            free memory. More than 512 (on GPUs 8192) is as many, with a warning: memory grows with
            it, answers do not change.
        dtype: Of the weights when a checkpoint is built. An engine has its own; another is refused.
        revision: Of a checkpoint on the hub; refused for an engine.
        threads: Of arithmetic; None: one for each physical core that this process may use. More
            than processors is as many as those, with a warning.
        max_queued_requests: Requests that may wait for a place, each with its prompt in memory. One
            more is refused by `generate` (QueueFullError); calls that block wait instead.
        model_name: Accepted for older programs. The template is chosen by `ChatTemplateConfig`.
        cache_block_seq_len: Tokens of a block, by which the cache's memory is counted. When none is
            left, the request that came last makes room and is computed again later.
        cache_chunk_size: Accepted: the cache's memory is touched only where tokens are.
        num_tokens_per_iter, max_prefill_iters: Accepted: `max_prefill_token_num` alone sets the
            rhythm of prefill.
        async_, enable_metrics, cache_checkpoint_interval, cache_prompt_boundary_skip,
            moe_a2a_backend: Accepted: they tune machinery that is not here; answers do not depend
            on them.
        quant_policy, rope_scaling_factor, use_logn_attn and the others: Only their defaults;
            `REFUSALS` says why, and what to do.

    Raises:
        ConfigError: a field of a wrong type, out of range, or not supported.
    """

    model_name: str | None = None
    _: KW_ONLY
    model_format: str | None = None
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    cache_block_seq_len: int = 64
    cache_chunk_size: int = -1
    enable_prefix_caching: bool = True
    quant_policy: int = 0
    rope_scaling_factor: float = 0.0
    use_logn_attn: bool = False
    download_dir: str | None = None
    revision: str | None = None
    max_prefill_token_num: int | None = None
    num_tokens_per_iter: int = 0
    max_prefill_iters: int = 1
    dtype: str = "auto"
    threads: int | None = None
    max_queued_requests: int = 1024
    dp: int = 1
    cp: int = 1
    ep: int = 1
    device_num: int | None = None
    attn_tp_size: int | None = None
    attn_cp_size: int | None = None
    attn_dp_size: int | None = None
    mlp_tp_size: int | None = None
    mlp_dp_size: int | None = None
    outer_dp_size: int | None = None
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    devices: Sequence[int] | None = None
    cache_checkpoint_interval: int = 4096
    cache_prompt: str = "auto"
    cache_prompt_boundary_skip: int = 1
    cache_generation: str = "auto"
    async_: int = 1
    empty_init: bool = False
    language_model_only: bool = False
    communicator: str = "nccl"
    hf_overrides: Mapping[str, object] | None = None
    enable_metrics: bool = True
    gemm_input_dtype: str | None = None
    moe_a2a_backend: str = "auto"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check all fields (ConfigError: field, value found, values expected)."""
        check_fields(self, RULES)
        check_refusals(self, {**REFUSALS, **parallel_refusals(int(self.tp))})


TurbomindEngineConfig = EngineConfig

RULES: Mapping[str, Rule] = {
    "model_name": OrNone(Text()),
    "tp": Int(1),
    "devices": OrNone(ListOf(Int(0))),
    "session_len": OrNone(Int(1)),
    "max_batch_size": OrNone(Int(1, MAX_SEQUENCES)),
    "cache_max_entry_count": Number(0, 1, above=True),
    "cache_block_seq_len": Int(1),
    "cache_chunk_size": Int(-1),
    "enable_prefix_caching": Flag(),
    "revision": OrNone(Text(empty=False, argument=True)),
    "max_prefill_token_num": OrNone(Int(1)),
    "num_tokens_per_iter": Int(0),
    "max_prefill_iters": Int(1),
    "dtype": Choice(("auto", "float32", "float16", "bfloat16")),
    "threads": OrNone(Int(1)),
    "max_queued_requests": Int(1),
    "cache_checkpoint_interval": Int(0),
    "cache_prompt_boundary_skip": Int(0),
    "async_": Int(0, 1),
    "enable_metrics": Flag(),
    "moe_a2a_backend": Text(),
}

_REBUILD = "change config.json of the checkpoint and build the engine again: build-engine"
_CACHE_MODES = "the cache has no such modes"
_CACHE_SWITCH = "use enable_prefix_caching=True or False"

REFUSALS: Mapping[str, Refusal] = {
    "model_format": Refusal(
        (None, "hf"),
        "engines are built from checkpoints in the Hugging Face or the original layout, with "
        "weights that are not quantised",
        "build from the unquantised checkpoint: build-engine CHECKPOINT -o ENGINE",
    ),
    "quant_policy": Refusal(
        (0,),
        "the key/value cache is not quantised",
        "use quant_policy=0, and a smaller session_len or max_batch_size to save memory",
    ),
    "rope_scaling_factor": Refusal(
        (0,), "the rotary embedding is compiled into the engine", _REBUILD
    ),
    "use_logn_attn": Refusal((False,), "attention is compiled into the engine", _REBUILD),
    "hf_overrides": Refusal((None, {}), "the engine has its own configuration", _REBUILD),
    "download_dir": Refusal(
        (None,),
        "the hub's own cache is used",
        "set HF_HOME, or download the checkpoint yourself and give its folder",
    ),
    "gemm_input_dtype": Refusal(
        (None,),
        "the number format of matrix products is compiled into the engine",
        "leave it out; build-engine --dtype and --weights choose how weights are stored",
    ),
    "cache_prompt": Refusal(("auto",), _CACHE_MODES, _CACHE_SWITCH),
    "cache_generation": Refusal(("auto",), _CACHE_MODES, _CACHE_SWITCH),
    "empty_init": Refusal((False,), "an engine is loaded with its weights", "leave it out"),
    "language_model_only": Refusal(
        (False,), "an engine has both parts", "leave it out: prompts without images are fine"
    ),
}


@known_fields
@dataclass(slots=True)
class VisionConfig:
    """How images are encoded.

    Attributes:
        max_batch_size: Views in one run of the vision part, whichever images they are of. An image
            is one view, or several where its policy cuts it into tiles. Where images are in patches
            and of any size, 1024 patches count as a view, and those of one shape run together.
            On a GPU (`cuda`) up to 8 views of pictures that wait are run at once, whatever this is.
        thread_safe: Accepted: the pipeline always is.
        background: Colour (red, green, blue; 0 to 255) on which transparent images are composited.
            None: as the model's own processor does, which leaves transparency out of account or
            has white.
        local_files: Whether images may be named by paths and `file://` URLs. True: all files that
            this process can read. A folder: only files that are in it when links are followed.
            False: none. Prompts from others, such as a server's, need False or a folder.
        image_formats: Those that are read, as the bytes say: of "PNG", "JPEG", "WEBP", "GIF",
            "BMP" (uncompressed), and "TIFF", "AVIF", "PPM", "QOI". The last four are not read
            unless asked for: a small file of theirs can cost much time.
        media_domains: Hosts that images are fetched from, redirects included: "example.org" is
            that host, ".example.org" all below it. None: every public one.
        feature_cache_bytes: Memory for what the vision part made of earlier images (float32, tokens
            x hidden size each), so that they are neither decoded nor encoded again; the least
            recently used go. 0 keeps none. None: 128 MiB, or 5 % of the free memory if that is
            less. Of the GPU's memory where they stay there (`cuda` of one rank, views of one size).
        min_pixels, max_pixels: Where images are in patches and of any size, as `smart_resize` of
            the published processors takes them: smaller and larger ones are resized until they are
            within. Fewer pixels are fewer tokens. None: as the checkpoint says. Engines whose
            images are brought to one size refuse them.

    Raises:
        ConfigError: a field of a wrong type or out of range.
    """

    max_batch_size: int = 1
    thread_safe: bool = False
    background: tuple[int, int, int] | None = None
    _: KW_ONLY
    local_files: bool | str | os.PathLike[str] = True
    image_formats: Sequence[str] = DEFAULT_FORMATS
    media_domains: Sequence[str] | None = None
    feature_cache_bytes: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check all fields (ConfigError: field, value found, values expected)."""
        colour = OrNone(ListOf(Int(0, 255), 3))
        rules: dict[str, Rule] = {
            "max_batch_size": Int(1),
            "thread_safe": Flag(),
            "background": colour,
            "local_files": FlagOrFolder(),
            "image_formats": ListOf(Choice(FORMATS)),
            "media_domains": OrNone(ListOf(Text(empty=False))),
            "feature_cache_bytes": OrNone(Int(0)),
            "min_pixels": OrNone(Int(1)),
            "max_pixels": OrNone(Int(1)),
        }
        check_fields(self, rules)
        for domain in self.media_domains or ():
            if not set(domain).isdisjoint("/@*?# ") or domain.count(":") == 1:
                raise ConfigError(
                    "VisionConfig: media_domains has what is no host's name.",
                    found=repr(domain[:80]),
                    expected="a host such as example.org, or .example.org for all below it",
                    fix="leave out scheme, port and path",
                )

    def image_limits(self) -> ImageLimits:
        """What the images of prompts may be and may cost."""
        files = self.local_files
        folder = files if isinstance(files, bool) else Path(files).absolute()
        domains = self.media_domains
        return ImageLimits(
            formats=tuple(self.image_formats),
            local_files=folder,
            media_domains=None if domains is None else tuple(domains),
        )


VisonConfig = VisionConfig
