"""A guest as something that is frozen, by its agent: all of its file systems."""

from __future__ import annotations

import contextlib
import time

from vdiskfs.quiesce.agentline import GoneError, Line, QuiesceError

_PREPARE_S = 5.0
_INSIST_S = 10.0
_LONGEST_S = 30.0


class Guest:
    """One guest. Each method is called by one thread at a time."""

    def __init__(self, line: Line) -> None:
        """Take the line to its agent."""
        self.name = line.name
        self._line = line

    def prepare(self) -> None:
        """Find out that the agent answers.

        Raises:
            QuiesceError: it does not; nothing is frozen.
        """
        self._line.open(time.monotonic() + _PREPARE_S)

    def freeze(self, deadline: float) -> None:
        """Freeze all its file systems.

        Raises:
            QuiesceError: it did not, or did not say so in time, and may yet.
        """
        count = self._line.ask("guest-fsfreeze-freeze", deadline)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise QuiesceError(f"{self.name}: the guest has no file system that it can freeze")
        if self._line.ask("guest-fsfreeze-status", deadline) != "frozen":
            raise QuiesceError(f"{self.name}: the guest froze, and is not frozen")

    def thaw(self, deadline: float) -> bool:
        """Thaw a guest that said it is frozen; False: it had been thawed before.

        Raises:
            QuiesceError: it did not say so in time.
        """
        held: bool = self._line.ask("guest-fsfreeze-status", deadline) == "frozen"
        self._line.ask("guest-fsfreeze-thaw", deadline)
        if self._line.ask("guest-fsfreeze-status", deadline) != "thawed":
            raise QuiesceError(f"{self.name}: the guest stays frozen")
        return held

    def insist(self, until: float) -> None:
        """Have it thawed whatever was asked before; it may still be freezing.

        The agent does one thing after the other: asked now, it thaws as soon as it is done
        with what it was asked before. Returns when it said so, or when there is no guest.

        Raises:
            QuiesceError: it never answered.
        """
        pause_s = 0.5
        with contextlib.suppress(QuiesceError):
            self._line.send("guest-fsfreeze-thaw")
        while True:
            deadline = min(until, time.monotonic() + _INSIST_S)
            try:
                self._line.open(deadline)
                self.thaw(deadline)
                return
            except GoneError:
                return
            except QuiesceError:
                if time.monotonic() >= until:
                    raise
                # A new line: what the agent was sent on this one it has, or never will.
                self._line.close()
                time.sleep(min(pause_s, max(0.0, until - time.monotonic())))
                pause_s = min(_LONGEST_S, 2 * pause_s)

    def close(self) -> None:
        """Let go of the line."""
        self._line.close()
