"""Write the table of `vlmforge models` into README.md, between its markers.

python scripts/models_table.py
"""

from __future__ import annotations

from pathlib import Path

from vlmforge.engine.families import models_table

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- models: written by scripts/models_table.py -->\n"
END = "<!-- end of models -->\n"


def with_table(document: str) -> str:
    """The document with the table in place of what is between the markers."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"no {BEGIN.strip()} ... {END.strip()}"
    return f"{before}{BEGIN}{models_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text("utf-8")), "utf-8")
