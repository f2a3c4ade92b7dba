"""JSON files of a checkpoint, read with typed errors."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.limits import Span

T = TypeVar("T")

# What an engine's files can hold.
_ANY_INT = range(-(1 << 63), 1 << 63)
_ANY_FLOAT: Span = (-math.inf, math.inf)

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_LFS_POINTER = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Refuse a file that `git clone` left as a Git LFS pointer.

    Raises:
        CheckpointError: the file is one, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise _unreadable(path, error) from error
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself.",
            found=f"{path.stat().st_size} bytes that begin with 'version https://git-lfs'",
            expected="the file that the pointer stands for",
            fix=f"run 'git lfs pull' in {path.parent}",
        )


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        CheckpointError: no such file, not JSON (with line and column), or not an object.
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise _malformed(path, place) from error
    except UnicodeDecodeError as error:
        raise _malformed(path, f"a byte at offset {error.start} that is not UTF-8") from error
    except RecursionError as error:
        raise _malformed(path, "values nested too deeply") from error
    except ValueError as error:  # Python's limit on the digits of a number
        raise _malformed(path, "a number of thousands of digits") from error
    if not isinstance(value, dict):
        raise _malformed(path, f"{_kind(value)} at the top", "a JSON object at the top")
    return value


def read_config(path: Path, *, ignored: frozenset[str] = frozenset()) -> ConfigReader:
    """A reader of the JSON object in a file (errors as `read_json`)."""
    return ConfigReader(read_json(path), path, ignored=ignored)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(
            f"{path} does not exist.",
            found=_contents(path.parent),
            expected=f"a file named {path.name}",
            fix="check the path, or download the checkpoint again",
        )
    return CheckpointError(
        f"{path} cannot be read.",
        found=error.strerror or type(error).__name__,
        expected="a readable file",
        fix="check its kind and its permissions",
    )


def _contents(folder: Path) -> str:
    return f"a folder without it: {folder}" if folder.is_dir() else f"no folder {folder}"


def _malformed(path: Path, found: str, expected: str = "JSON") -> CheckpointError:
    return CheckpointError(
        f"{path} is not a valid configuration file.",
        found=found,
        expected=expected,
        fix=f"download {path.name} again",
    )


def _kind(value: object) -> str:
    """What a JSON value is, shortly, for messages."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return json.dumps(value, ensure_ascii=False)[:80]


def _spelled(within: range) -> str:
    kind = "a whole number" if within.step == 1 else "an even number"
    return f"{kind} from {within[0]} to {within[-1]}"


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Typed access to the values of one JSON object; `place` is its dotted place in `file`.

    `ignored` are the keys that the user wants unknown values of left out (`check_keys`).

    A key whose value is null counts as absent, but for `int` and `float`: no published class means
    anything by a null where it has a default that is a number. The getters raise CheckpointError
    where a key without default is absent, or a value is of another type or out of its range, naming
    file and dotted key.
    """

    values: Mapping[builtins.str, object]
    file: Path
    place: builtins.str = ""
    ignored: frozenset[builtins.str] = frozenset()

    def has(self, key: builtins.str) -> builtins.bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def get(self, key: builtins.str) -> object:
        """The value as it is; None where absent."""
        return self.values.get(key)

    def int(
        self,
        key: builtins.str,
        default: builtins.int | None = None,
        *,
        within: range = _ANY_INT,
    ) -> builtins.int:
        """A whole number in the range; true and 1.0 are not."""
        if key in self.values:
            default = None
        return self._required(key, self.opt_int(key, within=within), default, "a whole number")

    def float(
        self,
        key: builtins.str,
        default: builtins.float | None = None,
        *,
        within: Span = _ANY_FLOAT,
    ) -> builtins.float:
        """A finite number in the range, whole or not."""
        if key in self.values:
            default = None
        return self._required(key, self.opt_float(key, within=within), default, "a number")

    def str(self, key: builtins.str, default: builtins.str | None = None) -> builtins.str:
        """A string."""
        return self._required(key, self.opt_str(key), default, "a string")

    def bool(self, key: builtins.str, default: builtins.bool | None = None) -> builtins.bool:
        """True or false; 0, 1 and strings are not."""
        return self._required(key, self.opt_bool(key), default, "true or false")

    def opt_int(self, key: builtins.str, *, within: range = _ANY_INT) -> builtins.int | None:
        """As `int`; None where absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, value, "a whole number")
        if value not in within:
            raise self._wrong(key, value, _spelled(within))
        return value

    def opt_float(self, key: builtins.str, *, within: Span = _ANY_FLOAT) -> builtins.float | None:
        """As `float`; None where absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong(key, value, "a finite number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        least, most = within
        if not math.isfinite(number):
            raise self._wrong(key, value, "a finite number")
        if not least <= number <= most:
            raise self._wrong(key, value, f"a number from {least:g} to {most:g}")
        return number

    def opt_str(self, key: builtins.str) -> builtins.str | None:
        """As `str`; None where absent."""
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(key, value, "a string")

    def opt_bool(self, key: builtins.str) -> builtins.bool | None:
        """As `bool`; None where absent."""
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(key, value, "true or false")

    def section(self, key: builtins.str) -> ConfigReader:
        """A reader of the object at a key."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return ConfigReader(
            cast("dict[str, object]", value), self.file, self._dotted(key), self.ignored
        )

    def _required(
        self, key: builtins.str, value: T | None, default: T | None, expected: builtins.str
    ) -> T:
        if value is not None:
            return value
        if default is not None:
            return default
        raise self._wrong(key, None, expected)

    def _dotted(self, key: builtins.str) -> builtins.str:
        return f"{self.place}.{key}" if self.place else key

    def _wrong(self, key: builtins.str, value: object, expected: builtins.str) -> CheckpointError:
        problem = "lacks" if value is None else "has a wrong"
        return CheckpointError(
            f"{self.file} {problem} {self._dotted(key)}.",
            found=_kind(value),
            expected=expected,
            fix=f"check {self.file.name} against the published one",
        )
