"""The time that chat templates are told: the start of one day, so that all rows have the same.

transformers gives templates a function that reads the clock, and its release decides how. So the
clock is exchanged where that function finds it, and tried out before it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from transformers.utils import chat_template_utils

TEMPLATES: Any = chat_template_utils  # untyped, as its clock is exchanged


def today() -> str:
    """The day, as YYYY-MM-DD, that a chat template would be told now."""
    return _clock_shows("%Y-%m-%d")


def _clock_shows(form: str) -> str:
    template = "{{ strftime_now('" + form + "') }}"
    rendered, _ = TEMPLATES.render_jinja_template(
        conversations=[[{"role": "user", "content": ""}]], chat_template=template
    )
    return rendered[0]


class Clock:
    """A clock that stands at the start of a day, in place of the one that templates are given."""

    def __init__(self, date: str) -> None:
        """Stand at `date`, YYYY-MM-DD."""
        self.date, self.moment, self.asked = date, datetime.fromisoformat(date), False
        with self.ticking():
            shown = _clock_shows("%Y-%m-%d %H:%M:%S")
        if shown != f"{date} 00:00:00" or not self.asked:
            raise RuntimeError("this release of transformers gives chat templates another clock")
        self.asked = False

    def now(self, tz: object = None) -> datetime:
        """The moment, as `datetime.now` gives it."""
        self.asked = True
        return self.moment

    @contextlib.contextmanager
    def ticking(self) -> Iterator[None]:
        """Inside, templates are told this clock's moment."""
        own = TEMPLATES.datetime
        TEMPLATES.datetime = self
        try:
            yield
        finally:
            TEMPLATES.datetime = own
