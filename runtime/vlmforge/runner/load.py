"""The parts of an engine directory, loaded: what the stages run on."""

from __future__ import annotations

from contextlib import ExitStack

from vlmforge.backends import (
    Backend,
    ClosableDecoder,
    DecoderSession,
    LoadOptions,
    VisionSession,
    WholeBackend,
    load_backend,
)
from vlmforge.engine.bundle import Bundle, check_sizes
from vlmforge.inputs import image_marks as marks
from vlmforge.inputs.render import marked_tokenizer_json
from vlmforge.inputs.template_choice import ActiveTemplate
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.runner.stages import Engine


def load_engine(bundle: Bundle, template: ActiveTemplate, options: LoadOptions) -> Engine:
    """Load the parts of an engine directory (EngineError otherwise).

    Parts may be mapped, so that a file which is cut later ends the process: sizes are compared once
    more when all are loaded, and when one cannot be.
    """
    manifest = bundle.manifest
    backend = load_backend(manifest.backend)
    text = marked_tokenizer_json(bundle.text(manifest.tokenizer_file), manifest.prompt)
    tokenizer = TextTokenizer(text, {marks.IMAGE: manifest.prompt.image_placeholder})
    with ExitStack() as started:
        try:
            vision, decoder = _parts(backend, bundle, options)
            if isinstance(decoder, ClosableDecoder):
                started.callback(decoder.close)
        finally:
            # It names the file, where a backend would say that it cannot load a part.
            files = [name for part in manifest.parts for name in (part.file, *part.data)]
            check_sizes(bundle, files)
        started.pop_all()
    return Engine(
        manifest=manifest,
        tokenizer=tokenizer,
        template=template,
        vision=vision,
        decoder=decoder,
        options=options,
    )


def _parts(
    backend: Backend, bundle: Bundle, options: LoadOptions
) -> tuple[VisionSession, DecoderSession]:
    folder, manifest = bundle.folder, bundle.manifest
    if manifest.parallel.tp == 1 and isinstance(backend, WholeBackend):
        return backend.load_parts(folder, manifest, options)
    vision = backend.load_vision(folder, manifest, options)
    return vision, _decoder(backend, bundle, options)


def _decoder(backend: Backend, bundle: Bundle, options: LoadOptions) -> DecoderSession:
    folder, manifest = bundle.folder, bundle.manifest
    if manifest.parallel.tp == 1:
        return backend.load_decoder(folder, manifest, options)
    from vlmforge.backends.ranks.load import load_ranked  # not before it is known which backend

    return load_ranked(backend, folder, manifest, options)
