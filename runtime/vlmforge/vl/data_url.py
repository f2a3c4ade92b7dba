"""`data:` URLs, and base64 that lost the head of one."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

from vlmforge.errors import ImageError
from vlmforge.vl.local_files import shown

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_BASE64_STARTS = {  # of the signatures of PNG, JPEG, WebP, GIF and BMP
    "iVBORw0KGgo": "png",
    "/9j/": "jpeg",
    "UklGR": "webp",
    "R0lGOD": "gif",
    "Qk": "bmp",
}
_LEAST_BASE64 = 40


def data_url_bytes(url: str) -> bytes:
    """Payload of a `data:` URL (RFC 2397), base64 or percent-encoded.

    The media type is not looked at, nor need there be one: the bytes say what they are. Base64 is
    taken as browsers take it (WHATWG Infra, forgiving-base64 decode: white space anywhere, padding
    may be missing), and in the URL-safe alphabet too.

    Raises:
        ImageError: no comma, or damaged base64.
    """
    header, comma, payload = url[len("data:") :].partition(",")
    if not comma:
        raise ImageError(
            "A data: URL has no data.",
            found=shown(f"data:{header}") + " without a comma",
            expected="data:image/...;base64,...",
            fix="put a comma between the header and the data",
        )
    data = unquote_to_bytes(payload.encode("utf-8", "replace"))
    if header.rpartition(";")[2].strip().lower() != "base64":
        return data
    return decoded_base64(data)


def decoded_base64(text: bytes) -> bytes:
    """The bytes of base64 as `data_url_bytes` takes it (ImageError otherwise)."""
    digits = b"".join(text.split()).translate(_URL_SAFE)
    if len(digits) % 4 == 0:
        digits = digits.removesuffix(b"=").removesuffix(b"=")
    try:
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(
            "The base64 of an image is damaged.",
            found=f"{error}, in {len(text)} characters",
            expected="letters, digits, + and / (or - and _), at the end at most two =",
            fix="encode the whole file with base64.b64encode; check that nothing cut it",
        ) from error


def without_prefix(text: str) -> ImageError | None:
    """The error for base64 of an image that lacks its `data:` head; None: it is not such text."""
    begins = next((kind for kind in _BASE64_STARTS if text.startswith(kind)), None)
    digits = text[:4096].replace("\n", "").replace("\r", "")
    if begins is None or len(text) < _LEAST_BASE64 or not _is_base64(digits):
        return None
    return ImageError(
        "The base64 of an image lacks its prefix.",
        found=f"{text[:16]}..., {len(text)} characters",
        expected="data:image/...;base64,... or the path or URL of an image",
        fix=f"put data:image/{_BASE64_STARTS[begins]};base64, in front of it",
    )


def _is_base64(digits: str) -> bool:
    return digits.isascii() and digits.rstrip("=").translate(_NO_MARKS).isalnum()


_NO_MARKS = str.maketrans("", "", "+/-_")
