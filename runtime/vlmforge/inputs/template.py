"""Chat templates: from their parts to jinja, and from jinja and messages to text.

A template is untrusted data that came with a checkpoint: it runs in jinja2's sandbox, with the
names that published templates use and no others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlmforge.engine.prompts import TemplateParts
from vlmforge.errors import PromptError

_BODY = """\
{%- macro body(message) -%}
{{ content_begin }}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for block in message.content if block.type == 'image' -%}
{{ LINE | replace('{n}', loop.index | string) | replace('{image}', IMAGE) }}{%- endfor -%}
{%- for block in message.content if block.type == 'text' -%}{{ block.text }}{%- endfor -%}
{%- endif -%}
{{ content_end }}
{%- endmacro -%}
{%- if SYSTEM is not none and (not messages or messages[0].role != 'system') -%}
{{ SYS }}{{ content_begin }}{{ SYSTEM }}{{ content_end }}{{ EOSYS }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ SYS + body(message) + EOSYS }}
{%- elif message.role == 'user' -%}{{ USER + body(message) + EOH }}
{%- else -%}{{ ASSISTANT + body(message) }}
{%- if not loop.last or add_generation_prompt -%}{{ EOA + SEPARATOR }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ GENERATION }}{%- endif -%}
"""


def jinja_from_parts(
    parts: TemplateParts, image_placeholder: str, image_line: str = "{image}\n"
) -> str:
    """The jinja text of a template given by its parts; each image goes on a line before the text.

    In `image_line`, `{image}` is the placeholder and `{n}` the image's number in its message.

    The layout is that of LMDeploy's `BaseChatTemplate`. A conversation whose last message is the
    assistant's (rendered without `add_generation_prompt`) is left open for completion.
    """
    generation = parts.assistant.rstrip() if parts.strip_end else parts.assistant
    values = {
        "IMAGE": image_placeholder,
        "LINE": image_line,
        "SYSTEM": parts.meta_instruction,
        "SYS": parts.system,
        "EOSYS": parts.eosys,
        "USER": parts.user,
        "EOH": parts.eoh,
        "ASSISTANT": parts.assistant,
        "EOA": parts.eoa,
        "SEPARATOR": parts.separator,
        "GENERATION": generation,
    }
    lines = [f"{{%- set {name} = {_literal(value)} -%}}" for name, value in values.items()]
    return "\n".join(lines) + "\n" + _BODY


def _literal(value: str | None) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def render_template(
    source: str,
    messages: Sequence[dict[str, object]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool,
    content_marks: tuple[str, str] = ("", ""),
) -> str:
    """Render messages to the prompt's text.

    A message has a `role` and a `content`: a list of `{'type': ...}`, or a string where that is
    what the template takes (`prompt.content`).

    Templates made by `jinja_from_parts` write `content_marks` around every content.

    Raises:
        PromptError: the template does not compile, refuses the messages, breaks the sandbox, or
            does more work than a template may do.
    """
    # Imported here: jinja2 is a good part of the time that `import vlmforge` would take.
    from vlmforge.inputs.budget import TemplateLimitError
    from vlmforge.inputs.sandbox import describe_fault, render_bounded

    values = {
        "messages": messages,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
        "tools": None,  # templates ask `is not none`, which an undefined name is not
        "documents": None,
        "content_begin": content_marks[0],
        "content_end": content_marks[1],
    }
    try:
        return render_bounded(source, values)
    except TemplateLimitError as error:
        raise PromptError(
            "The chat template does more than a template may do.",
            found=describe_fault(error),
            expected="a template that writes the messages, and ends",
            fix="choose another template: ChatTemplateConfig(model_name=...); if messages are very "
            "long, send shorter ones",
        ) from error
    except Exception as error:  # a template is a program of a stranger: it can raise anything
        raise PromptError(
            "The chat template cannot render these messages.",
            found=describe_fault(error),
            expected="contents that the template can write, and "
            "roles in an order that the template allows (usually user, assistant, ...)",
            fix="change the messages, or choose a template: ChatTemplateConfig(model_name=...)",
        ) from error
