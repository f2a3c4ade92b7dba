"""The hub's client with its telemetry off: this is how all of the builder import it."""

from vlmforge import env

env.refuse_telemetry()

from huggingface_hub import (  # noqa: E402 (reads the switch)
    constants,
    get_safetensors_metadata,
    snapshot_download,
)
from huggingface_hub.errors import (  # noqa: E402
    GatedRepoError,
    HfHubHTTPError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = [
    "constants",
    "get_safetensors_metadata",
    "snapshot_download",
    "GatedRepoError",
    "HfHubHTTPError",
    "NotASafetensorsRepoError",
    "OfflineModeIsEnabled",
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
]
