"""The page at `/`: one file, without anything from outside."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re


def read_page() -> tuple[str, str]:
    """The page, and the policy by which a browser runs nothing else and calls nobody else.

    Source: Content Security Policy Level 3, https://www.w3.org/TR/CSP3/
    """
    html = (importlib.resources.files(__name__) / "index.html").read_text("utf-8")
    script, style = (_hash_of(html, tag) for tag in ("script", "style"))
    return html, (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _hash_of(html: str, tag: str) -> str:
    found = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert len(found) == 1, tag
    digest = hashlib.sha256(found[0].encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
