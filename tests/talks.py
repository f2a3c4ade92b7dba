"""Conversations that tests of sessions begin with."""

from __future__ import annotations

import PIL.Image

from stand_in import plain, png
from vlmforge import Pipeline, Response, Session


def turn(pipe: Pipeline, prompt: object, session: Session, count: int = 5) -> Response:
    pipe.chat(prompt, session, plain(count))
    assert session.response is not None
    return session.response


def talk(pipe: Pipeline) -> Session:
    """Two turns about two pictures: one encoded, one of pixels."""
    session = pipe.session()
    turn(pipe, ("look", [png(1), PIL.Image.new("RGB", (8, 8), "red")]), session)
    turn(pipe, "and", session)
    return session
