"""Files of this machine, as far as they may be read: all, none, or those in one folder."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import PurePath

from vlmforge.errors import ImageError
from vlmforge.vl.image_limits import ImageLimits

_SHOWN_LENGTH = 120
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # a pipe must not block
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


def read_file(path: str, *, limits: ImageLimits) -> bytes:
    """The content of a regular file that `limits` let be read.

    With a folder in `limits.local_files` links are followed first, and what they lead to is then
    opened from the folder on, step by step and along no link, so that a link which is laid
    meanwhile leads nowhere.

    Raises:
        ImageError: it may not be read (in the same words whether it exists or not), does not
            exist, cannot be read, or is too large. Nothing of the content is quoted.
    """
    if limits.local_files is False:
        raise _closed(path)
    try:
        descriptor = _open(path, limits.local_files)
        try:
            data, size = _read(descriptor, limits.max_bytes + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise _unreadable(path, "does not exist", "no such file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _unreadable(path, "cannot be read", reason) from error
    if size > limits.max_bytes:
        raise ImageError(
            f"{described(path)} is too large.",
            found=f"{size} bytes",
            expected=f"at most {limits.max_bytes} bytes",
            fix="send a smaller file",
        )
    return data


def described(path: str) -> str:
    """What error messages call the image of a file."""
    return f"The image file {shown(path)}"


def shown(text: str) -> str:
    """`text`, cut to a length that fits a message."""
    if not text:
        return "an empty text"
    return text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "..."


def _open(path: str, allowed: bool | str | os.PathLike[str]) -> int:
    if isinstance(allowed, bool):
        return os.open(path, _READ)
    folder, real = os.path.realpath(allowed), os.path.realpath(path)
    if not PurePath(real).is_relative_to(folder):
        raise _outside(path)
    *steps, name = PurePath(real).relative_to(folder).parts or (".",)
    at = os.open(folder, _STEP)
    try:
        for step in steps:
            above, at = at, os.open(step, _STEP, dir_fd=at)
            os.close(above)
        return os.open(name, _READ | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)


def _read(descriptor: int, most: int) -> tuple[bytes, int]:
    """At most `most` bytes of a file, and its size as far as it is known."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):  # A pipe or a device would block or never end.
        raise OSError(errno.EINVAL, "not a regular file")
    with open(descriptor, "rb", closefd=False) as file:
        data: bytes | None = file.read(most)
    if data is None:  # what calls itself regular in /proc may have nothing to give yet
        raise OSError(errno.EAGAIN, "it gives nothing")
    return data, max(len(data), status.st_size)


def _closed(path: str) -> ImageError:
    return ImageError(
        "Files of this machine are not read here.",
        found=shown(path),
        expected="an http://, https:// or data: URL, or the image itself",
        fix=_prompt_hint(
            path,
            "send the image's bytes, or data:image/...;base64,...; VisionConfig(local_files=...) "
            "of the pipeline can allow a folder",
        ),
    )


def _outside(path: str) -> ImageError:
    return ImageError(
        f"{described(path)} is outside of the folder whose files are read here.",
        found="a path that leads elsewhere",
        expected="a path into the folder that VisionConfig(local_files=...) of the pipeline names",
        fix="move the image there, or send its bytes or data:image/...;base64,...",
    )


def _unreadable(path: str, what: str, found: str) -> ImageError:
    return ImageError(
        f"{described(path)} {what}.",
        found=found,
        expected="the path of a readable image file, or a URL",
        fix=_prompt_hint(path, "check the path and its permissions"),
    )


def _prompt_hint(path: str, fix: str) -> str:
    if any(character.isspace() for character in path):
        fix += "; if this text is a prompt, pass it in the prompt's place, before the images"
    return fix
