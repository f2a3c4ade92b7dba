"""A report as one HTML page: pictures, questions and replies, wrong ones first."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from vlmforge.evaluation.evaluate import Answer, Report, Score

_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em}
table{border-collapse:collapse;margin-bottom:2em}td,th{padding:.25em .8em;text-align:right}
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f4f4}
.cases{display:flex;flex-wrap:wrap;gap:1em}
.case{border:2px solid #3a3;border-radius:6px;padding:.6em;width:21em}
.wrong{border-color:#c33}img{max-height:130px;margin-right:.4em}
.kind{color:#777;float:right}.expected{color:#777}p{margin:.3em 0}
"""


def html_sheet(report: Report, title: str, *, limit: int) -> str:
    """The page, self-contained, with at most `limit` wrong and `limit` right replies."""
    wrong = [answer for answer in report.answers if not answer.right][:limit]
    right = [answer for answer in report.answers if answer.right][:limit]
    rows = "".join(_row(score) for score in (*report.scores, report.overall))
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        "<table><tr><th>kind</th><th>asked</th><th>right</th><th>95 % interval</th>"
        f"<th>word for word</th></tr>{rows}</table>"
        f"{_cases('Wrong', wrong)}{_cases('Right', right)}"
    )


def _row(score: Score) -> str:
    low, high = score.interval
    return (
        f"<tr><td>{score.kind}</td><td>{score.count}</td><td>{score.accuracy:.1%}</td>"
        f"<td>{low:.1%} to {high:.1%}</td><td>{score.exact / score.count:.1%}</td></tr>"
    )


def _cases(heading: str, answers: list[Answer]) -> str:
    items = "".join(_case(answer) for answer in answers)
    return f"<h2>{heading}</h2><div class='cases'>{items or 'none'}</div>"


def _case(answer: Answer) -> str:
    case = answer.case
    pictures = "".join(f"<img src='{_data_uri(picture)}'>" for picture in case.pictures)
    turns = "".join(
        f"<p><b>{html.escape(turn.question)}</b></p><p>{html.escape(reply)}</p>"
        for turn, reply in zip(case.turns, answer.replies, strict=True)
    )
    expected = html.escape(case.turns[-1].answer)
    return (
        f"<div class='case{'' if answer.right else ' wrong'}'>"
        f"<span class='kind'>{case.kind}</span>{pictures}{turns}"
        f"<p class='expected'>expected: {expected}</p></div>"
    )


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
