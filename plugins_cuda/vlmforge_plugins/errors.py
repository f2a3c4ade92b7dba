"""What this package raises on purpose.

    PluginError
    |-- UnsupportedError   (ValueError)   a configuration or a shape that no kernel is made for
    |-- CompileError                      a compiler is missing, or refused our sources
    `-- LaunchError                       the driver refused a kernel

The words have the form of the other packages' errors; this package imports none of them.
"""

from __future__ import annotations


class PluginError(Exception):
    """Base of the errors of this package.

    Args:
        summary: One sentence: what went wrong.
        found: What was there.
        expected: What should have been there.
        fix: What to do next.
    """

    def __init__(self, summary: str, *, found: str = "", expected: str = "", fix: str = "") -> None:
        self.summary = summary
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(summary)

    def __str__(self) -> str:
        rows = (("found", self.found), ("expected", self.expected), ("fix", self.fix))
        return "\n".join(
            [self.summary, *(f"  {name + ':':<10}{text}" for name, text in rows if text)]
        )


class UnsupportedError(PluginError, ValueError):
    """No kernel is made for this configuration or shape."""


class CompileError(PluginError):
    """A compiler is missing, or refused the kernels' sources."""


class LaunchError(PluginError):
    """The driver refused to load or to launch a kernel."""
