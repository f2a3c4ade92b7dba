"""What a chat template may cost. Each hostile one here ends after a count of operations; without,
most would run for longer than a test run lasts, or take all memory."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmforge.errors import PromptError
from vlmforge.inputs import budget
from vlmforge.inputs.sandbox import compile_template
from vlmforge.inputs.template import render_template

TEXT = {"type": "text", "text": "hello"}
MESSAGES: list[dict[str, object]] = [{"role": "user", "content": [TEXT]}]


def render(source: str, messages: list[dict[str, object]] = MESSAGES) -> str:
    return render_template(
        source, messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
    )


def refusal(source: str) -> PromptError:
    with pytest.raises(PromptError) as caught:
        render(source)
    assert len(str(caught.value)) < 1500
    return caught.value


def limit(source: str) -> str:
    """What was found, of a template that is refused for its work."""
    error = refusal(source)
    assert error.summary == "The chat template does more than a template may do."
    assert "ChatTemplateConfig(model_name=...)" in error.fix
    return error.found.removeprefix("TemplateLimitError: ")


R = "range(99999)"
GROWING = "{% set x = namespace(v='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}"
NESTED = "{% set x = namespace(v=(1,), w=(1,)) %}{% for i in range(60) %}{% set x.v = (x.v, x.v) %}"
NESTED += "{% set x.w = (x.w, x.w) %}{% endfor %}"

LOOPS = [
    "{% for a in R %}{% for b in R %}{% for c in R %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in R %}{% for b in R if b < 0 %}{% endfor %}{% endfor %}",
    "{% for a in R %}{% for b in R %}" + "a" * 50000 + "{% endfor %}{% endfor %}",
    "{% for a in R %}{{ 'a' * 100000 }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "{% macro f() %}{% endmacro %}{% for a in R %}{% for b in R %}{{ f() }}"
    "{% endfor %}{% endfor %}",
    "{% for a in R %}{{ R | map(attribute='real') | list | length }}{% endfor %}",
    "{% for a in R %}{{ R | map('string') | list | length }}{% endfor %}",
    "{% for a in R %}{{ R | select('equalto', -1) | list }}{% endfor %}",
    "{% for a in R %}{{ R | list | sort | first }}{% endfor %}",
    "{% for a in R %}{{ R | sum }}{% endfor %}",
    "{% for a in R %}{{ 'zz' in R }}{% endfor %}",
    "{% for a in R %}{{ (R | list)[1:] | length }}{% endfor %}",
    "{% for a in R %}{{ (R | list) == (R | list) }}{% endfor %}",
    "{{ ([[1] * 1000] * 1000) | sum(start=[]) }}",
    "{% for a in R %}{{ ('b' * 99999).find('a') }}{% endfor %}",
    "{% set x = namespace(v='0.') %}{% for i in range(17) %}{% set x.v = x.v + x.v %}{% endfor %}"
    "{{ (['a'] * 9999) | map(attribute=x.v + '0') | list }}",
]


@pytest.mark.parametrize("source", LOOPS)
def test_turns_and_calls_are_counted(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MOST_WORK", 100_000)  # what is counted ends at any limit
    found = limit(source.replace("R", R))
    assert "takes too much work (more than 100000 operations)" in found


def test_the_limit_is_two_million_operations() -> None:
    found = limit(LOOPS[0].replace("R", R))
    assert found == (
        "what is repeated at line 1 takes too much work (more than 2000000 operations)"
    )


HUGE = [
    ("{{ 9 ** 999999999 }}", "9 ** 999999999"),
    (
        "{% set n = namespace(v=3) %}{% for i in range(60) %}{% set n.v = n.v * n.v %}{% endfor %}",
        "*",
    ),
    ("{{ ('1' * 1000000) | int(base=2) * 3 }}", "a number of 1000000 bits"),
    ("{{ '%99999999d' | format(1) }}", "a format with a width"),
    ("{{ '%99999999d' % 1 }}", "a format with a width"),
    ("{{ '%.99999999f' % 1.0 }}", "a format with a width"),
    ("{{ '%*d' % (999999999, 1) }}", "a format with a width"),
    ("{{ '{:99999999}'.format(1) }}", "a format with a width"),
    ("{{ '{:{w}}'.format(1, w=999999999) }}", "a format with a width"),
    ("{{ '{:٩٩٩٩٩٩٩٩}'.format(1) }}", "a format with a width"),
    ("{{ '{:99999999}'['format'](1) }}", "a format with a width"),
    ("{{ ('{:99999999}' | attr('format'))(1) }}", "a format with a width"),
    ("{{ ('{:99999999}' | safe).format(1) }}", "a format with a width"),
    ("{{ 'a' * 10 ** 9 }}", "a text of 1000000000 characters"),
    ("{{ 10 ** 9 * 'a' }}", "a text of 1000000000 characters"),
    ("{{ [0] * 10 ** 9 }}", "the operator *"),
    ("{{ 'a' | center(10 ** 9) }}", "a text of 1000000000 characters"),
    ("{% filter center(10 ** 9) %}a{% endfilter %}", "a text of 1000000000 characters"),
    ("{{ 'a'.center(10 ** 9) }}", "a text of 1000000000 characters"),
    ("{{ 'a'.zfill(10 ** 9) }}", "a text of 1000000000 characters"),
    ("{{ 'a\nb' | indent(10 ** 9) }}", "a text of 2000000003 characters"),
    ("{{ ('a' * 99999) | replace('', 'b' * 9999) }}", "characters"),
    ("{{ ('a' * 99999).replace('a', 'b' * 9999) }}", "characters"),
    ("{{ [1] | batch(10 ** 9, 'x') | list }}", "the filter batch"),
    ("{{ [1] | slice(10 ** 9) | list }}", "the filter slice"),
    ("{{ [1] | tojson(indent=10 ** 9) }}", "tojson with a long indent"),
    (
        "{{ [1, 2] | tojson(separators=('a' * 99999, ':')) }}",
        "tojson with a long indent or long separators",
    ),
    ("{{ 1.5 | round(10 ** 9, 'ceil') }}", "round to 1000000000 places"),
    ("{{ range(99999) | join('a' * 99999) }}", "characters"),
    ("{{ ('a' * 99999).join('b' * 99999) }}", "characters"),
    ("{{ ('a' * 99).strip('b' * 99999) }}", "99999 characters to strip"),
    ("{{ strftime_now('%c' * 999) }}", "strftime_now with a layout"),
    ("{{ '" + "x" * 200000 + "' }}", "a template of 200008 characters"),
]


@pytest.mark.parametrize(("source", "words"), HUGE, ids=[source[:70] for source, _ in HUGE])
def test_huge_values_are_refused_before_they_are_made(source: str, words: str) -> None:
    assert words in limit(source)


@pytest.mark.parametrize(
    "doubled",
    [
        *("x.v ~ x.v", "x.v + x.v", "x.v.replace('a', x.v)", "x.v | replace('a', x.v)"),
        *("x.v.join([x.v, x.v])", "[x.v, x.v] | join(x.v)", "'%s%s' % (x.v, x.v)"),
        *(
            "'{0}{0}'.format(x.v)",
            "x.v * 2",
            "x.v | indent(x.v, true)",
            "x.v | center(x.v | length * 2)",
        ),
    ],
)
def test_texts_that_double_come_to_an_end(doubled: str) -> None:
    found = limit(GROWING + "{% set x.v = DOUBLED %}{% endfor %}".replace("DOUBLED", doubled))
    assert "a text of" in found or "too much work" in found
    block = GROWING + "{% set x.v %}{{ x.v }}{{ x.v }}{% endset %}{% endfor %}"
    assert "the output takes too much work" in limit(block)


USES = [
    *(
        "x.v",
        "x.v | string",
        "x.v ~ ''",
        "x.v == x.w",
        "x.v < x.w",
        "x.v in [1, x.w]",
        "x.v is eq(x.w)",
    ),
    *("x.v | tojson", "[x.v] | join", "'%s' % (x.v,)", "'{}'.format(x.v)", "{}[x.v]", "{x.v: 1}"),
    *("{}.get(x.v)", "[x.v, x.w] | unique | list", "[x.v, x.w] | sort", "[x.v, x.w] | max"),
    *(
        "[x.w].index(x.v)",
        "raise_exception(x.v)",
        "dict([(x.v, 1)])",
        "x.v is upper",
        "x.v | upper",
    ),
]


@pytest.mark.parametrize("use", USES)
def test_what_is_shared_counts_wherever_it_is_written(
    use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 pairs of pairs: 2 ** 60 items for whoever writes, hashes or compares them."""
    if use != USES[0]:  # one of them counts as far as it counts in use
        monkeypatch.setattr(budget, "_MOST_ITEMS", 5000)
    most = budget._MOST_ITEMS
    assert f"a value of more than {most} items" in limit(NESTED + "{{ " + use + " }}")


def test_so_many_items_are_allowed() -> None:
    assert budget._MOST_ITEMS == 500_000


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{{ cycler() }}", "RuntimeError"),
        ("{{ lipsum(n=100000) }}", "UndefinedError"),
        ("{{ 'a' | urlize }}", "TemplateAssertionError"),
        ("{{ 'a' | pprint }}", "TemplateAssertionError"),
        ("{{ 'a'.translate({97: 'b'}) }}", "SecurityError"),
        ("{{ 'a'.expandtabs(10 ** 9) }}", "SecurityError"),
        ("{{ (1).to_bytes(10 ** 9) }}", "SecurityError"),
        ("{{ {}.fromkeys([1]) }}", "SecurityError"),
        ("{{ ''.maketrans({}) }}", "SecurityError"),
        ("{{ 'a'.encode() % 1 }}", "SecurityError"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
        ("{{ " + "[" * 3000 + "]" * 3000 + " }}", "RecursionError"),
        ("{{ " + "-" * 9000 + "1 }}", "RecursionError"),
        ("{{ ('1' * 1000000) | int(base=2) }}", "ValueError"),
        ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "RecursionError"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "RecursionError"),
        ("{% include messages %}", "TypeError"),
    ],
)
def test_what_a_template_cannot_do_is_a_typed_error(source: str, found: str) -> None:
    assert refusal(source).found.startswith(found)


@pytest.mark.parametrize("mark", ["' step', 1", "' weighed', -999999999"])
def test_marks_of_the_count_cannot_be_called_to_undo_it(mark: str) -> None:
    refund = "{{ [-999999999] | map(MARK) | list }}".replace("MARK", mark)
    assert "operations" in limit(refund + LOOPS[0].replace("R", R))


def test_a_namespace_that_holds_itself_is_written_shortly() -> None:
    assert render("{% set x = namespace() %}{% set x.x = [x, x] %}{{ x.x }}") == (
        "[<namespace>, <namespace>]"
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a' ~ 1 ~ none ~ x }}", "a1None"),
        ("{{ [1, 2, 3] | sum }}{{ [] | sum }}", "60"),
        ("{{ [{'a': 2}, {'a': 3}] | sum(attribute='a', start=1) }}", "6"),
        ("{{ [1, 'b'] | join('-') }}{{ [{'a': 2}] | join('-', attribute='a') }}", "1-b2"),
        (
            "{% for a in [1, 2, 3] if a != 2 %}{{ loop.index }}{{ a }}{% else %}x{% endfor %}",
            "1123",
        ),
        ("{% for a in [] if a %}{% else %}x{% endfor %}", "x"),
        ("{{ 'abc'[1:] }}{{ [1, 2][0] }}{{ {'a': 3}['a'] }}{{ 1 < 2 < 3 }}", "bc13True"),
        ("{{ 'a' in {'a': 1} }}{{ 'a' not in 'abc' }}{{ 2 in [1] }}", "TrueFalseFalse"),
        ("{{ cycler(1, 2).next() }}{{ 'x'.join(['a', 'b']) }}{{ '{:>3}'.format(1) }}", "1axb  1"),
        ("{{ '%s-%03d' % ('a', 7) }}{{ '%s' | format(3) }}", "a-0073"),
        ("{{ {'b': 1, 'a': 2} | dictsort | map('first') | join }}", "ab"),
        (
            "{% macro f(a) %}<{{ a }}{{ caller() }}>{% endmacro %}{% call f(1) %}!{% endcall %}",
            "<1!>",
        ),
        (
            "{% for a in [1] recursive %}{{ a }}{% if a < 3 %}{{ loop([a + 1]) }}{% endif %}"
            "{% endfor %}",
            "123",
        ),
        ("{{ {'b': 2}.b }}{{ {}.b }}{{ {'items': 1}.items is callable }}", "2True"),
        ("{{ namespace(a=1).a }}{{ dict(a=2).a }}{{ range(3) | list }}", "12[0, 1, 2]"),
    ],
)
def test_counting_changes_nothing_else(source: str, text: str) -> None:
    assert render(source) == text


def test_a_long_conversation_is_no_abuse() -> None:
    """A million characters in a thousand turns, by a template that looks back at each."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' and not loop.first "
        "and messages[loop.index0 - 1].role != 'assistant' %}{{ raise_exception('order') }}"
        "{% endif %}{% for b in m.content %}{% if b.type == 'text' %}{{ b.text | trim }}{% endif %}"
        "{% endfor %}{{ '</s>' if m.role == 'assistant' else ' ' }}"
        "{{ '!' if loop.index0 == messages | length - 1 }}{% endfor %}"
    )
    turns: list[dict[str, object]] = [
        {"role": role, "content": [{"type": "text", "text": "a" * 1000}]}
        for role in ("user", "assistant") * 500
    ]
    assert len(render(source, turns)) > 1_000_000


def test_more_to_write_allows_for_more_work_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MOST_WORK", 1000)
    once = "{% for m in messages %}{{ m.content }}{% endfor %}"
    turns: list[dict[str, object]] = [{"role": "user", "content": "a" * 40}] * 100
    assert render(once, turns) == "a" * 4000
    assert compile_template(once)
    with pytest.raises(PromptError, match="more than a template may do"):
        render("{% for x in range(999) %}" + once + "{% endfor %}", turns)


def test_work_is_counted_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []

    def spend(work: int, what: str) -> None:
        left.append(work)

    compile_template.cache_clear()
    monkeypatch.setattr("vlmforge.inputs.sandbox.spend", spend)
    monkeypatch.setattr("vlmforge.inputs.operations.spend", spend)
    render("{% for a in range(7) %}{{ a + 1 }}{% endfor %}")
    once, left[:] = list(left), []
    render("{% for a in range(7) %}{{ a + 1 }}{% endfor %}")
    assert left == once
    assert sum(once) < 100 * 7


# Expressions and statements put together at random.
ATOMS = ["1", "99999", "'ab'", "messages", "x", "[1, 'a']", "{'a': 1}", "none", "R", "1.5", "(1,)"]
OPERATORS = ["+", "-", "*", "**", "/", "//", "%", "~", "==", "<", "in", "and", "is", "if x else"]
FILTERS = ["upper", "list", "join('ab')", "map('string')", "center(999)", "tojson", "sum", "sort"]
FILTERS += [
    "replace('a', 'bb')",
    "length",
    "indent(99)",
    "batch(9, 1)",
    "format(1)",
    "string",
    "int",
]
EXPRESSIONS = st.recursive(
    st.sampled_from(ATOMS),
    lambda e: st.one_of(
        st.tuples(e, st.sampled_from(OPERATORS), e).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(e, st.sampled_from(FILTERS)).map(lambda t: f"({t[0]} | {t[1]})"),
        st.tuples(e, e).map(lambda t: f"({t[0]})[{t[1]}:]"),
        st.tuples(e, e).map(lambda t: f"[{t[0]}, {t[1]}]"),
    ),
    max_leaves=8,
)
STATEMENTS = st.recursive(
    EXPRESSIONS.map(lambda e: f"{{{{ {e} }}}}"),
    lambda body: st.one_of(
        st.tuples(EXPRESSIONS, body).map(lambda t: f"{{% for x in {t[0]} %}}{t[1]}{{% endfor %}}"),
        st.tuples(EXPRESSIONS, body).map(lambda t: f"{{% set x = {t[0]} %}}{t[1]}"),
        st.tuples(body, body).map("".join),
    ),
    max_leaves=4,
)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@given(STATEMENTS | st.text(string.printable, max_size=20).map(lambda text: "{{ " + text + " }}"))
def test_any_template_ends_with_a_text_or_a_typed_error(source: str) -> None:
    try:
        text = render(source.replace("R", "range(999)"))
    except PromptError as error:
        assert error.found
    else:
        assert len(text) <= budget._CHARACTERS_PER_UNIT * (budget.MOST_WORK + 10_000)
