"""What stays on the event loop: cut off where it takes long, and templates of chats only where they cannot."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from prerope.server.api.chat.template import render_chat
from prerope.server.api.chat.trial import is_tame
from prerope.server.api.fairness import TooLong, cut_off

from tests.server.tasks import tokenizer_with


@pytest.mark.parametrize("endless", [lambda: [None for _ in itertools.count()], lambda: render_endlessly()])
def test_what_takes_long_on_the_loop_is_cut_off(endless: Callable[[], object]) -> None:
    """On the main thread, where the loop is, and also where it catches every Exception that it meets."""
    before, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(TooLong):
        cut_off(endless, 0.05)
    assert time.monotonic() - began < 5
    assert cut_off(lambda: 7) == 7
    assert (signal.getitimer(signal.ITIMER_REAL)[0], signal.getsignal(signal.SIGALRM)) == (0, before)


def test_a_timer_that_runs_out_as_the_work_ends_is_not_armed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Armed with the handler from before it would end the process a quarter of a second later."""
    set_timer, handlers = signal.setitimer, list[Any]()
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)  # others have the core

    def late(which: signal.ITIMER, seconds: float) -> None:
        handlers.append(signal.getsignal(signal.SIGALRM))
        set_timer(which, seconds)
        if not seconds:
            handlers[-1](signal.SIGALRM, None)  # it ran out before, and Python comes to it now

    monkeypatch.setattr(signal, "setitimer", late)
    assert cut_off(lambda: 7, 60) == 7
    assert len(handlers) == 2
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def render_endlessly() -> str:
    loops = "".join(f"{{% for {name} in range(9999) %}}" for name in "abcd")
    return render_chat(tokenizer_with(loops + "{% endfor %}" * 4), [{"role": "user", "content": "Hello"}])


NS = "{% set ns = namespace(s='x', n=0, found=false) %}"
EACH = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("template", "tame"),
    [
        # as people have them
        (EACH + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}", True),
        (NS + EACH + "{% if loop.index0 % 2 == 0 %}{% set ns.found = true %}{% endif %}{% endfor %}", True),
        (
            "{{ 'Cutting Knowledge Date: December 2023' }}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}",
            True,
        ),
        (NS + EACH + "{%- set ns.n = ns.n + 1 %}{%- set said = m.content -%}{{ said }}{% endfor %}{{ ns.n }}", True),
        (NS + EACH + "{% set ns.s = ns.s ~ m.content ~ '\n' %}{% endfor %}{{ ns.s }}", True),
        (
            "{% set all = messages | map(attribute='content') | join('\n') %}{{ all.split('</think>')[-1].strip() }}",
            True,
        ),
        (EACH + "{% if loop.last %}{{ tools | tojson }}{% endif %}{{ m.content }}{% endfor %}", True),
        ("{% macro one(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}" + EACH + "{{ one(m) }}{% endfor %}", True),
        (EACH + "{% for c in m.tool_calls %}{% for k, v in c.arguments|items %}{{ k ~ v }}" + "{% endfor %}" * 3, True),
        (EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", True),
        ("{{ messages[0].content|replace('<', '&lt;') }}{{ strftime_now('%d %b %Y') }}{{ bos_token }}", True),
        ("{% for m in messages[::-1] %}{{ m.content[:(m.content|length) // 2] }}{% endfor %}", True),
        # in one step or a few
        ("{{ m.content|replace('a', m.content)|replace('a', m.content)|length }}", False),
        ("{{ m.content.replace('', m.content) }}", False),
        ("{{ m.content.replace('', 'x') }}", False),
        ("{{ m.content" + "|replace('a', 'aaaaaaaaaa')" * 9 + " }}", False),
        ("{{ 'x'|center(9999)|list|join('y'|center(9999)) }}", False),
        ("{{ '%9999s' % m.content }}", False),
        ("{{ m.content % 3 }}", False),
        ("{% set f = 'a%' ~ 20 ~ '0000' ~ '0000d' %}{{ f % 1 }}", False),
        ("{{ '{:99999999}'.format(1) }}", False),
        ("{{ 'x' * 9 }}", False),
        ("{{ 9 * m.content }}", False),
        ("{{ [1] * (m.content|length) }}", False),
        ("{{ m.content ** 9 }}", False),
        ("{{ lipsum(9999) }}", False),
        ("{{ range(99999)|list|string }}{% for i in range(99999) %}{{ m }}{% endfor %}", False),
        ("{{ strftime_now('%99999999d') }}", False),
        ("{{ m|tojson(indent=m.content|length) }}", False),
        ("{{ m.content|indent(99999999) }}", False),
        ("{{ [[1]]|sum(start=m.content) }}", False),
        ("{{ (m|int(m.content)) * (m.content|length) }}", False),
        ("{{ loop.index * loop.length }}", False),
        ("{% macro f() %}{{ loop.index * loop.length }}{% endmacro %}" + EACH + "{{ f() }}{% endfor %}", False),
        ("{% set loop = m %}" + EACH + "{{ loop.index }}{% endfor %}", False),
        ("{{ strftime_now() }}{{ " + "9" * 5000 + " }}", False),
        # by steps that each make it twice as long
        (NS + "{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", False),
        (NS + "{% for i in range(40) %}{%- set ns.s=ns.s~ns.s -%}{% endfor %}", False),
        (NS + "{% for i in range(40) %}{% set both = ns.s ~ ns.s %}{% set ns.s = both %}{% endfor %}", False),
        (NS + EACH + "{% set ns.a = ns.b ~ m %}{% set ns.b = ns.a ~ ns.a %}{% endfor %}", False),
        (NS + EACH + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}", False),
        (NS + EACH + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}", False),
        (NS + EACH + "{% set ns.s, ns.n = ns.s ~ ns.s, 1 %}{% endfor %}", False),
        (NS + EACH + "{% set other = ns %}{% set other.s = other.s ~ other.s %}{% endfor %}", False),
        (NS + EACH + "{% set ns.s = '}' ~ ns.s ~ ns.s %}{% endfor %}", False),
        ("{% set s = m.content %}" + "{% set s = s ~ s %}" * 30 + "{{ s|length }}", False),
        ("{% set s = m.content %}{% if m.x %}" + "{% set s -%}{{ s }}{{ s }}{% endset %}" * 30 + "{% endif %}", False),
        ("{% macro f(n, s) %}{{ f(n - 1, s ~ s) }}{% endmacro %}{{ f(9, 'x') }}", False),
        ("{% macro a(s) %}{{ s * 9 }}{% endmacro %}{{ a('x') }}", False),
        (
            "".join(f"{{% macro f{i}(s) %}}{{{{ f{i - 1}(s ~ s) }}}}{{% endmacro %}}" for i in range(40))
            + "{{ f39('x') }}",
            False,
        ),
        ("{% for a in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}", False),
        # by loops that have nothing to do with each other
        ("{% for a in m.content %}{% for b in m.content %}{{ m.content }}{% endfor %}{% endfor %}", False),
        (
            "{% set l = [] %}{% for a in m.content %}{% for b in m.content %}{% for c in m.content %}{{ a }}"
            + "{% endfor %}" * 3,
            False,
        ),
        # not known
        ("{% include 'x' %}", False),
        ("{% call f() %}{% endcall %}", False),
        ("{% for", False),
    ],
)
def test_a_template_that_may_multiply_texts_is_not_run_on_the_loop(template: str, tame: bool) -> None:
    assert is_tame(tokenizer_with(template)) is tame
