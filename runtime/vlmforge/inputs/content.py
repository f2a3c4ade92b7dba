"""Whether a chat template takes the content of a message as a list of blocks or as a string.

Templates of text-only models take strings, those of vision-language models lists, and none says
so. It is found by trying, with a list first: only that lets a template place images itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from vlmforge.errors import PromptError
from vlmforge.inputs.template import render_template

_PROBE = "Vlmforge probes."
_LEAK = "vlmforge_probe"
_Message = dict[str, object]


@lru_cache(maxsize=64)
def string_roles(source: str, bos_token: str, eos_token: str) -> frozenset[str]:
    """The roles whose content the template `source` (jinja text) takes as a string only.

    A role that it writes in neither form is as the user's.
    """

    def writes(*messages: _Message) -> bool:
        return _writes(source, messages, bos_token, eos_token)

    strings = set[str]()
    if not writes(_listed("user")) and writes(_plain("user")):
        strings.add("user")
    user = _plain("user") if strings else _listed("user")
    if not writes(_listed("system"), user) and (strings or writes(_plain("system"), user)):
        strings.add("system")
    if not writes(user, _listed("assistant")) and (strings or writes(user, _plain("assistant"))):
        strings.add("assistant")
    return frozenset(strings)


def check_writes_users(source: str, bos_token: str, eos_token: str) -> None:
    """Check that the template `source` writes what a user says.

    Raises:
        PromptError: it fails, or leaves the text out, in either form of content.
    """
    strings = string_roles(source, bos_token, eos_token)
    message = _plain("user") if "user" in strings else _listed("user")
    if not _writes(source, [message], bos_token, eos_token):
        _render(source, [message], bos_token, eos_token)
        raise PromptError(
            "The chat template leaves out what a user says.",
            found="a prompt without the text of the message",
            expected="a template that writes message['content'], a string or a list of blocks",
            fix="choose another template",
        )


def _listed(role: str) -> _Message:
    return {"role": role, "content": [{"type": "text", "text": _text(role), _LEAK: True}]}


def _plain(role: str) -> _Message:
    return {"role": role, "content": _text(role)}


def _text(role: str) -> str:
    return f"{_PROBE} {role}"


def _writes(source: str, messages: Sequence[_Message], bos_token: str, eos_token: str) -> bool:
    """Whether all the texts come out, and not the notation of the blocks that they are in."""
    try:
        text = _render(source, messages, bos_token, eos_token)
    except PromptError:
        return False
    return _LEAK not in text and all(_text(str(message["role"])) in text for message in messages)


def _render(source: str, messages: Sequence[_Message], bos_token: str, eos_token: str) -> str:
    return render_template(
        source,
        messages,
        bos_token=bos_token,
        eos_token=eos_token,
        add_generation_prompt=messages[-1]["role"] == "user",
    )
