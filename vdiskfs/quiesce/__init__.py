"""Bringing a disk to rest for an instant: guests and mounted file systems frozen, and thawed.

holder     the process that freezes, and thaws whatever becomes of the daemon
guest      a guest, through its agent         agentline   what it is asked through
hostfs     file systems mounted on this host  hookcommand  this host's own programs, before, after
session    the daemon's side of one holder    note         what is frozen, durably
undoing    what others that died have left

Freezing is done by a process of its own, which ends it when the daemon says so, when the limit
is over, when the daemon is gone (its socket ends) or when it is told to end. Should that
process die, too, the daemon starts another one that thaws what the note says; if both die, the
next daemon does. The holder imports next to nothing: it must be up in no time, and never need
a file of a disk that is frozen.
"""
