"""The hub's client with its telemetry off: this is how all of the builder import it."""

from vlmforge import env

env.refuse_telemetry()

from huggingface_hub import constants, snapshot_download  # noqa: E402 (reads the switch)
from huggingface_hub.errors import (  # noqa: E402
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = [
    "constants",
    "snapshot_download",
    "GatedRepoError",
    "HfHubHTTPError",
    "OfflineModeIsEnabled",
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
]
