"""An engine directory, opened: its manifest and the assurance that its files are the ones built."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec import Struct

from vlmforge import env
from vlmforge.engine.manifest import FileEntry, Manifest, load_manifest
from vlmforge.engine.regular_file import read_regular, regular_size
from vlmforge.errors import ConfigError, EngineFormatError, EngineIntegrityError

_MOST_TEXT = 1 << 28
_AGAIN = "copy the engine again, or rebuild it: build-engine CHECKPOINT -o ENGINE --force"


class Bundle(Struct, frozen=True):
    """An engine directory and its manifest."""

    folder: Path
    manifest: Manifest

    def text(self, name: str) -> str:
        """The text of a file of the engine (EngineIntegrityError: it has none)."""
        path = self.folder / name
        try:
            return read_regular(path, _MOST_TEXT).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EngineIntegrityError(
                f"{path} cannot be read.",
                found=getattr(error, "strerror", None) or str(error),
                expected="a text file that build-engine wrote",
                fix=_AGAIN,
            ) from None


def open_bundle(folder: Path) -> Bundle:
    """Open an engine directory, checking that every file has its size and its sha256.

    Hashing gigabytes takes seconds, so a success is remembered for as long as sizes, times of
    change and inodes stay what they are.

    Raises:
        EngineFormatError: not an engine, of another schema version, or using files outside itself
            or that it does not list.
        EngineIntegrityError: a file is missing, short or altered; names it.
    """
    bundle = Bundle(folder, load_manifest(folder))
    _check_listed(bundle.manifest)
    check_sizes(bundle)
    stamp = _stamp_path(bundle)
    if stamp is not None and _is_remembered(stamp):
        return bundle
    check_hashes(bundle)
    if stamp is not None:
        _remember(stamp)
    return bundle


def check_sizes(bundle: Bundle, only: Collection[str] | None = None) -> None:
    """Compare the size of every file, or of those named, with the manifest; costs next to nothing.

    Raises:
        EngineIntegrityError: a file is missing, no regular file, or of another size; names it.
    """
    for entry in bundle.manifest.files:
        if only is not None and entry.path not in only:
            continue
        path = bundle.folder / entry.path
        try:
            size = regular_size(path)
        except OSError as error:
            raise _altered(path, str(error.strerror), entry) from None
        if size != entry.size:
            raise _altered(path, f"{size} bytes", entry)


def check_hashes(bundle: Bundle) -> None:
    """Compare the size and sha256 of every file with the manifest (EngineIntegrityError)."""
    check_sizes(bundle)
    files = bundle.manifest.files
    with ThreadPoolExecutor(max_workers=4) as pool:
        hashes = pool.map(lambda entry: _sha256(bundle.folder / entry.path, entry), files)
        for entry, found in zip(files, hashes, strict=True):
            if found != entry.sha256:
                raise _altered(bundle.folder / entry.path, f"sha256 {found}", entry)


def _check_listed(manifest: Manifest) -> None:
    """Only a listed file is checked, so no other may be used."""
    listed = {entry.path for entry in manifest.files}
    used = [manifest.tokenizer_file, manifest.prompt.template_file]
    used += [name for part in manifest.parts for name in (part.file, *part.data)]
    if unlisted := [name for name in used if name not in listed]:
        raise EngineFormatError(
            "The manifest uses a file that it does not list.",
            found=repr(unlisted[0]),
            expected="an entry in `files` with its size and sha256",
            fix="do not use this engine; rebuild it with build-engine",
        )


def _altered(path: Path, found: str, entry: FileEntry) -> EngineIntegrityError:
    return EngineIntegrityError(
        f"{path} is not the file that was built.",
        found=found,
        expected=f"{entry.size} bytes, sha256 {entry.sha256}",
        fix=_AGAIN,
    )


def _sha256(path: Path, entry: FileEntry) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _altered(path, str(error.strerror), entry) from None


def _stamp_path(bundle: Bundle) -> Path | None:
    """Where the success of a check is remembered; None without a usable cache directory."""
    digest = hashlib.sha256(os.fsencode(bundle.folder.resolve()))
    for entry in bundle.manifest.files:
        path = bundle.folder / entry.path
        try:
            stat = path.stat()
        except OSError as error:  # it was there a moment ago
            raise _altered(path, str(error.strerror), entry) from None
        digest.update(f"{entry}{stat.st_ino}{stat.st_mtime_ns}{stat.st_ctime_ns}".encode())
    try:
        return env.cache_dir() / "verified" / digest.hexdigest()
    except ConfigError:  # no home directory
        return None


def _is_remembered(stamp: Path) -> bool:
    try:
        return stamp.exists()
    except OSError:  # a home that is not ours to look into
        return False


def _remember(stamp: Path) -> None:
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:
        return  # a read-only home only costs the hashing next time
