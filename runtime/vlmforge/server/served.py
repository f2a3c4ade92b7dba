"""The engines of a server, by the names that clients use."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping

from msgspec import Struct, field

from vlmforge.api.pipeline import Pipeline
from vlmforge.inputs.render import RenderedPrompt
from vlmforge.outputs.response import Response
from vlmforge.server.api_errors import refused
from vlmforge.server.fields import Asked


class Served(Struct, frozen=True):
    """An engine that is served under a name."""

    name: str
    pipe: Pipeline
    created: int = field(default_factory=lambda: int(time.time()))

    def pieces(self, asked: Asked, seconds: float | None) -> AsyncGenerator[Response, None]:
        """The answers' pieces as they come; closing it cancels the request."""
        return self.pipe.astream(
            asked.prompt,
            asked.config,
            do_preprocess=asked.templated,
            salt=asked.salt or "",
            timeout=seconds,
        )

    def render(self, prompt: object, *, templated: bool) -> RenderedPrompt:
        """The prompt as it would be run; nothing is."""
        return self.pipe.render(prompt, do_preprocess=templated)

    def card(self) -> dict[str, object]:
        """What `/v1/models` says of it."""
        manifest = self.pipe.manifest
        images: dict[str, object] = {"tokens": manifest.decode.tokens_per_image}
        if manifest.image.sized:
            images = {"most_tokens": manifest.decode.tokens_per_image, "depends_on": "size"}
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "vlmforge",
            "modalities": {"input": ["text", "image"], "output": ["text"]},
            "max_model_len": self.pipe.session_len,
            "image": images,
            "grounding": manifest.prompt.box_format is not None,
        }


def chosen(engines: Mapping[str, Served], name: str | None) -> Served:
    """The engine that a request names; without a name, the only one.

    Raises:
        ApiError: 404 for a name that is not served, or none where there are several.
    """
    if name is None and len(engines) == 1:
        return next(iter(engines.values()))
    if name is None or name not in engines:
        raise refused(
            404,
            "The model is not served here.",
            found="no name" if name is None else repr(name[:200]),
            expected=" or ".join(map(repr, engines)),
            fix="ask GET /v1/models, or start the server with --served-model-name",
            param="model",
        )
    return engines[name]
