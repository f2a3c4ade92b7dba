"""Where a checkpoint is: a folder, or a model on a hub that speaks Hugging Face's protocol."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmforge.engine.build_cache import HUB_ID
from vlmforge.errors import CheckpointError, VlmforgeError
from vlmforge_builder.checkpoint.altered import MARKERS
from vlmforge_builder.checkpoint.safetensors_outline import write_outline
from vlmforge_builder.hub import (
    GatedRepoError,
    HfHubHTTPError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    constants,
    get_safetensors_metadata,
    snapshot_download,
)

# Not `*.bin`: repositories hold other copies of the weights under other names.
_PICKLES = ("pytorch_model*.bin", "*/pytorch_model*.bin")
_SET_CACHE = "set HF_HOME to a folder that can be written to, then run it again"
_TEXTS = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")
# What tells of the model and of its weights before any of them is fetched.
_TELLING = ("config.json", *MARKERS)
# The same weights again, by the names of the code that trained them.
_NEVER = ("consolidated*.safetensors", "*/consolidated*.safetensors")


def resolve_checkpoint(
    spec: str | Path,
    *,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """The folder of a checkpoint: `spec` itself if it is one, otherwise downloaded by hub id.

    The hub's client reads its own settings from the environment when it is imported: `HF_ENDPOINT`,
    `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`. Only configuration, tokenizer and weight files are
    fetched, never code; `.bin` weights only in folders that have no `.safetensors`.

    Args:
        spec: A folder, or a hub id such as "org/name".
        revision: Branch, tag or commit on the hub ("main" by default).
        progress: Gets a line when a download begins.
        check: Gets the folder when nothing but config.json and the small files that tell of the
            weights have been downloaded. What it raises ends the download.

    Raises:
        CheckpointError: neither, or the hub refused, is out of reach, or the disk is full.
    """
    folder = _local(spec, revision)
    if folder is not None:
        return folder
    hub_id = str(spec)
    if progress is not None:
        progress(f"fetching {hub_id} ({revision or 'main'}) from {constants.ENDPOINT}")
    with _explained(hub_id, revision):
        return _download(hub_id, revision, check)


def fetch_config(spec: str | Path, *, revision: str | None = None) -> Path:
    """A folder with the checkpoint's config.json and `MARKERS`; nothing else is downloaded.

    Raises:
        CheckpointError: as `resolve_checkpoint`.
    """
    folder = _local(spec, revision)
    if folder is not None:
        return folder
    with _explained(str(spec), revision):
        return _download_config(str(spec), revision)


def outline_checkpoint(spec: str | Path, into: Path, *, revision: str | None = None) -> Path:
    """A folder with a checkpoint's texts, and of its weights the headers alone.

    Of a hub id they are files with holes, below `into`; a folder is itself.

    Raises:
        CheckpointError: as `resolve_checkpoint`, or the hub has no safetensors of it.
    """
    folder = _local(spec, revision)
    if folder is not None:
        return folder
    hub_id = str(spec)
    with _explained(hub_id, revision):
        texts = Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=[*_TEXTS, *_TELLING])
        )
        try:
            files = get_safetensors_metadata(hub_id, revision=texts.name).files_metadata
        except NotASafetensorsRepoError:
            raise CheckpointError(
                f"What {hub_id} holds cannot be told without downloading it.",
                found="weights that are not safetensors",
                expected="safetensors, whose headers can be read alone",
                fix=f"download it and give the folder: hf download {hub_id}",
            ) from None
    outline = into / hub_id.replace("/", "--")
    shutil.copytree(texts, outline)
    for name, file in files.items():
        tensors = {n: (t.dtype, t.shape, t.data_offsets) for n, t in file.tensors.items()}
        write_outline(outline / name, tensors)
    return outline


def checkpoint_name(spec: str | Path) -> str:
    """What an engine calls the checkpoint `spec`: a folder's name, but not where that is; a hub id.

    A name that is not text is spelled with escapes.
    """
    path = Path(spec)
    name = path.resolve().name if path.is_dir() else str(spec)
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _local(spec: str | Path, revision: str | None) -> Path | None:
    """`spec` as a folder; None if it is a hub id."""
    path = Path(spec)
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"The revision {revision!r} was asked of the folder {path}.",
                found="a folder, which has one state",
                expected="a hub id such as org/name",
                fix="leave the revision out, or give the hub id",
            )
        return path
    if path.exists() or not HUB_ID.fullmatch(str(spec)):
        raise _no_such(path)
    return None


@contextmanager
def _explained(hub_id: str, revision: str | None) -> Iterator[None]:
    _check_cache(hub_id)
    try:
        yield
    except VlmforgeError:
        raise
    except Exception as error:
        # The client lets the exceptions of its HTTP library through; which one differs by version.
        raise _explain(hub_id, revision, error) from error


def _check_cache(hub_id: str) -> None:
    """The client would make a folder called `~` in the working directory."""
    if constants.HF_HUB_CACHE.startswith("~"):
        raise CheckpointError(
            f"There is no place to download {hub_id} to: this user has no home directory.",
            found=f"the hub's cache directory {constants.HF_HUB_CACHE}",
            expected="a folder that can be written to",
            fix=_SET_CACHE,
        )


def _download_config(hub_id: str, revision: str | None) -> Path:
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_TELLING)))


def _download(hub_id: str, revision: str | None, check: Callable[[Path], object] | None) -> Path:
    folder = _download_config(hub_id, revision)
    if check is not None:
        check(folder)
    patterns = [*_TEXTS, "*.safetensors"]
    # The snapshot's folder is named by its commit, so these calls fetch from the same one.
    snapshot_download(
        hub_id, revision=folder.name, allow_patterns=patterns, ignore_patterns=list(_NEVER)
    )
    snapshot_download(
        hub_id,
        revision=folder.name,
        allow_patterns=[*patterns, *_PICKLES],
        ignore_patterns=[*_NEVER, *_superseded(folder)],
    )
    return folder


def _superseded(folder: Path) -> list[str]:
    """Patterns of the `.bin` weights in folders whose safetensors are read before them."""
    names = ("model.safetensors", "model.safetensors.index.json")
    places = {path.parent.relative_to(folder) for name in names for path in folder.rglob(name)}
    return [str(place / "pytorch_model*.bin") for place in sorted(places)]


def _no_such(path: Path) -> CheckpointError:
    return CheckpointError(
        f"There is no checkpoint at {path}.",
        found=f"a file at {path.absolute()}" if path.exists() else f"no folder {path.absolute()}",
        expected="a folder with config.json and weights, or a hub id that looks like org/name",
        fix="check the spelling and the working directory",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _explain(hub_id: str, revision: str | None, error: Exception) -> CheckpointError:
    """Tell what went wrong from the first link of the chain of causes that says it."""
    summary = f"{hub_id} is neither a folder nor could it be fetched from {constants.ENDPOINT}."
    found, fix = _reason(hub_id, revision, error)
    return CheckpointError(
        summary,
        found=f"no folder {Path(hub_id).absolute()}; {found}",
        expected="a folder, or the id of a model on the hub that you may read",
        fix=fix,
    )


def _reason(hub_id: str, revision: str | None, error: Exception) -> tuple[str, str]:
    """What was found, and the fix."""
    again = f"check the connection and HF_ENDPOINT ({constants.ENDPOINT}), then run it again"
    for link in _chain(error):
        match link:
            case GatedRepoError():
                page = f"{constants.ENDPOINT}/{hub_id}"
                return "the model is gated", f"accept its terms at {page}, then set HF_TOKEN"
            case RevisionNotFoundError():
                return f"no revision {revision or 'main'!r}", "check the revision on the hub"
            case RepositoryNotFoundError():
                fix = "check the spelling (org/name); if it is private, set HF_TOKEN"
                return "no such model, or a private one", fix
            case HfHubHTTPError():
                status = link.response.status_code
                if status in (401, 403):
                    return f"access refused (HTTP {status})", "set HF_TOKEN to a token that may"
                return f"HTTP {status} from the hub", again
            case OfflineModeIsEnabled():
                fix = "unset HF_HUB_OFFLINE, or give a folder"
                return "offline mode is on, and the model is not in the cache", fix
            case OSError(errno=errno.ENOSPC):
                fix = "free space, or set HF_HOME to a larger disk; what was fetched is kept"
                return f"no space left on the disk of {constants.HF_HUB_CACHE}", fix
            case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
                return f"{link.strerror}: {link.filename or constants.HF_HUB_CACHE}", _SET_CACHE
    last = list(_chain(error))[-1]
    text = (str(last).splitlines() or [""])[0]
    return f"{type(last).__name__}: {text}", again
