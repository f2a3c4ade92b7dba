"""`vlmforge inspect`: what an engine is, from its manifest and texts; nothing is loaded."""

from __future__ import annotations

from pathlib import Path

from vlmforge.engine.bundle import Bundle
from vlmforge.engine.chain import PartChain
from vlmforge.engine.layer_report import read_layers
from vlmforge.engine.manifest import Manifest, Part, decoder_name, load_manifest
from vlmforge.errors import ConfigError
from vlmforge.inputs.messages import parse_prompt
from vlmforge.inputs.render import marked_tokenizer_json, render_prompt
from vlmforge.inputs.template_choice import choose_template
from vlmforge.inputs.tokenizer import TextTokenizer

_QUESTION = "What is shown in this picture?"
_PHOTO = (640, 480)


def describe(folder: Path, *, batch: int = 1, context: int | None = None) -> str:
    """The description of an engine directory as text.

    Args:
        folder: The engine.
        batch: Sequences at once, for the estimate of memory.
        context: Tokens of each sequence; None: the engine's window.

    Raises:
        EngineError: not an engine directory of this version.
        ConfigError: `batch` or `context` is not positive.
    """
    bundle = Bundle(folder, load_manifest(folder))
    manifest = bundle.manifest
    context = manifest.decode.session_len if context is None else context
    if batch < 1 or context < 1:
        raise ConfigError(
            "The batch and the context must be positive.",
            found=f"--batch {batch} --context {context}",
            expected="positive integers",
            fix="vlmforge inspect ENGINE --batch 1 --context 2048",
        )
    sections = (
        _head(bundle),
        _parts(bundle),
        _policies(manifest),
        _example(bundle),
        _memory(manifest, batch, context),
        _files(manifest),
    )
    return "\n\n".join(sections)


def _head(bundle: Bundle) -> str:
    manifest, provenance = bundle.manifest, bundle.manifest.provenance
    rows = {
        "engine": str(bundle.folder),
        "model": f"{provenance.architecture} (recipe {provenance.recipe})",
        "source": provenance.source,
        "built": provenance.built_at
        + ", "
        + ", ".join(f"{name} {version}" for name, version in provenance.versions.items()),
        "backend": f"{manifest.backend}, weights stored as {_stored(manifest)}, arithmetic in "
        f"{manifest.compute_dtype}, tp {manifest.parallel.tp}",
        "window": f"{manifest.decode.session_len} tokens a sequence, at most "
        f"{manifest.decode.max_batch_size} sequences at once",
    }
    return _table(rows)


def _stored(manifest: Manifest) -> str:
    if manifest.quantisation is None:
        return manifest.dtype
    return f"{manifest.quantisation} (the decoder's matrices) and {manifest.dtype}"


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows.items())


def _parts(bundle: Bundle) -> str:
    return "\n".join(_part(bundle.folder, part) for part in bundle.manifest.parts)


def _part(folder: Path, part: Part) -> str:
    lines = [f"part {part.name}: {part.file}, {_size(part.weight_bytes)} of weights"]
    for arrow, specs in (("in ", part.inputs), ("out", part.outputs)):
        shown = [spec for spec in specs if "." not in spec.name]
        if caches := len(specs) - len(shown):
            lines.append(f"  {arrow} {caches} key/value caches")
        for spec in shown:
            dims = ", ".join(map(str, spec.shape))
            lines.append(f"  {arrow} {spec.name}: {spec.dtype} [{dims}]")
    for profile in part.profiles:
        ranges = (f"{name} {dim.least}..{dim.most}" for name, dim in profile.dims.items())
        lines.append(f"  profile {profile.name}: {', '.join(ranges)}")
    if part.chain is not None:
        lines.append(f"  chain {_chain(part.chain)}")
    if part.layers is not None:
        histogram = read_layers(folder / part.layers).histogram
        counts = ", ".join(f"{count} {kind}" for kind, count in histogram.items())
        lines.append(f"  layers {sum(histogram.values())}: {counts}")
    return "\n".join(lines)


def _chain(chain: PartChain) -> str:
    normed = sum(call.norm is not None for call in chain.collectives)
    behind = f" ({normed} with the norm behind it)" if normed else ""
    between = {
        f"{len(chain.attention)} launches of attention": chain.attention,
        f"{len(chain.gates)} gated activations": chain.gates,
        f"{len(chain.collectives)} meetings of the ranks{behind}": chain.collectives,
    }
    words = " and ".join(text for text, there in between.items() if there)
    kernels = f"; kernels for {', '.join(sorted(chain.kernels))}" if chain.kernels else ""
    graphs = f" of {len(chain.kinds)} graphs" if len(chain.kinds) < len(chain.segments) else ""
    return f"{len(chain.segments)} segments{graphs}, {words} between them{kernels}"


def _policies(manifest: Manifest) -> str:
    image, prompt, decode = manifest.image, manifest.prompt, manifest.decode
    others = [name for name in prompt.templates if name != prompt.template_name]
    rows = {
        "image": f"{image}; {_image_tokens(manifest)}",
        "prompt": f"template {prompt.template_name!r}, images at {prompt.image_placeholder!r} "
        f"({prompt.splice.name}); also: {', '.join(others) or 'none'}",
        "stops": f"ids {', '.join(map(str, decode.eos_ids))}"
        + (f", words {', '.join(map(repr, prompt.stop_words))}" if prompt.stop_words else ""),
    }
    return _table(rows)


def _image_tokens(manifest: Manifest) -> str:
    most = manifest.decode.tokens_per_image
    if not manifest.image.sized:
        return f"{most} tokens an image"
    return f"at most {most} tokens an image, {_example_tokens(manifest)} one of {_photo()}"


def _example_tokens(manifest: Manifest) -> int:
    rows = manifest.image.rows(_PHOTO)
    return manifest.decode.tokens_per_image if rows is None else len(rows)


def _photo() -> str:
    return f"{_PHOTO[0]}x{_PHOTO[1]} pixels"


def _example(bundle: Bundle) -> str:
    manifest = bundle.manifest
    policy = manifest.prompt
    template = choose_template(policy, bundle.text(policy.template_file), None)
    text = marked_tokenizer_json(bundle.text(manifest.tokenizer_file), policy)
    conversation = parse_prompt((_QUESTION, "photo.jpg"))
    rendered = render_prompt(
        conversation,
        policy=policy,
        template=template,
        encoder=TextTokenizer(text),
        layouts=[manifest.image.layout(_PHOTO, _example_tokens(manifest))],
    )
    return (
        f"({_QUESTION!r}, photo of {_photo()}) becomes {len(rendered.token_ids)} tokens "
        f"({rendered.text_tokens} text + {rendered.image_tokens} image):\n  {rendered.text!r}"
    )


def _memory(manifest: Manifest, batch: int, context: int) -> str:
    """Of one rank where there are several, which may lie on devices of their own."""
    tp, kv = manifest.parallel.tp, manifest.rank_kv
    vision = manifest.part("vision").loaded_bytes
    weights = max(manifest.part(decoder_name(rank)).loaded_bytes for rank in range(tp))
    weights += vision if tp == 1 else 0
    cache = batch * context * kv.bytes_per_token
    whose = "" if tp == 1 else f" of each of {tp} ranks"
    first = "" if tp == 1 else f"; the first has the vision part too, {_size(vision)}"
    return (
        f"memory{whose} at batch {batch} and context {context}: about {_size(weights + cache)} "
        f"({_size(weights)} weights + {_size(cache)} key/value cache, "
        f"{_size(kv.bytes_per_token)} a token), and activations{first}"
    )


def _files(manifest: Manifest) -> str:
    rows = [f"  {_size(entry.size):>10}  {entry.path}" for entry in manifest.files]
    total = sum(entry.size for entry in manifest.files)
    return "\n".join([f"{len(rows)} files beside engine.json, {_size(total)}:", *rows])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
