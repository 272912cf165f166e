"""A window of the day: when what may wait is done. Local time, as people mean it. No state."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

DAY_S = 86400

_TEXT = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Window:
    """From ``start_s`` to ``end_s`` after midnight, each day; over midnight if the end is less."""

    start_s: int
    end_s: int

    @staticmethod
    def parse(text: str) -> Window | None:
        """Return the window that ``22:00-06:00`` means; None for "": always.

        Raises:
            ValueError: it is no window, or an empty one.
        """
        if not text:
            return None
        match = _TEXT.fullmatch(text)
        if match is None or match[1] + match[2] == match[3] + match[4]:
            raise ValueError(f'must be a window such as "22:00-06:00", not {text!r}')
        hour, minute, end_hour, end_minute = (int(part) for part in match.groups())
        return Window(hour * 3600 + minute * 60, end_hour * 3600 + end_minute * 60)

    def opens_in_s(self, now: datetime) -> float:
        """Return the seconds until it opens: 0 inside it."""
        at_s = _since_midnight(now)
        if (at_s - self.start_s) % DAY_S < (self.end_s - self.start_s) % DAY_S:
            return 0.0
        return (self.start_s - at_s) % DAY_S

    def closes_in_s(self, now: datetime) -> float:
        """Return the seconds until it closes the next time."""
        return (self.end_s - _since_midnight(now)) % DAY_S or DAY_S


def _since_midnight(now: datetime) -> float:
    return now.hour * 3600 + now.minute * 60 + now.second + now.microsecond / 1e6
