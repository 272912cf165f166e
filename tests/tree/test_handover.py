"""vdiskfs.tree.handover: what a daemon knew of names, its successor knows."""

from __future__ import annotations

import os
from typing import Any, cast

import pytest

from tests.tree.conftest import Kept
from vdiskfs.fdstore import FdStore
from vdiskfs.tree.handover import REQUEST, RESENT, Handover


def successor(kept: Kept, live: list[list[Any]] | None = None) -> Handover:
    handover = Handover(cast("FdStore", kept), kept.copies())
    handover.begin(lambda: live or [])
    return handover


FILE, OTHER = ("source", 1, 2, 0o100000), ("source", 1, 3, 0o100000)


def test_nodes_keep_their_ids_through_any_number_of_successors(kept: Kept) -> None:
    one = successor(kept)
    one.named(16, FILE, (2, "old"))
    one.named(16, FILE, (2, "n\udc80w"))
    one.named(17, OTHER, (2, "other"))
    one.close()
    for _ in range(3):
        two = successor(kept)
        assert two.number_of(FILE) == 16
        known = two.known(16)
        assert known is not None
        assert known.places == [(2, "old"), (2, "n\udc80w")]
        assert two.highest == 17
        assert two.known(18) is None
        two.close()
        assert [name for name in kept.fds if name.startswith("names-")] == [f"names-{two._version}"]


def test_a_record_cut_short_by_a_kill_is_not_one(kept: Kept) -> None:
    one = successor(kept)
    one.named(16, FILE, (2, "a"))
    os.write(one._fd, b'["node",17,["sou')
    one.close()
    two = successor(kept)
    assert (two.highest, two.number_of(FILE)) == (16, 16)
    two.close()


def test_an_act_is_known_to_who_gets_its_request_again_and_to_nobody_else(kept: Kept) -> None:
    one = successor(kept)
    REQUEST.set(5)
    assert one.act("create", 2, b"a", None) is None
    REQUEST.set(6)
    assert one.act("unlink", 2, b"b", FILE) is None
    one.close()
    two = successor(kept)
    REQUEST.set(5 | RESENT)
    earlier = two.act("create", 2, b"a", FILE)
    assert earlier is not None
    assert earlier.before is None
    REQUEST.set(6 | RESENT)
    earlier = two.act("unlink", 2, b"b", None)
    assert earlier is not None
    assert earlier.before == FILE
    # The same number, not sent again; another name; another kind; a number never logged.
    for number, kind, name in (
        (5, "create", b"a"), (5 | RESENT, "create", b"c"), (6 | RESENT, "create", b"b"),
        (7 | RESENT, "create", b"a"),
    ):  # fmt: skip
        REQUEST.set(number)
        assert two.act(kind, 2, name, FILE) is None
    two.close()
    REQUEST.set(0)


def test_a_log_written_anew_keeps_what_counts(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdiskfs.tree.handover._COMPACT", 4096)
    first = successor(kept)
    first.named(16, FILE, (2, "inherited"))
    first.close()
    live = [["node", 17, OTHER, (2, "live")]]
    two = successor(kept, live)
    REQUEST.set(9)
    two.act("rmdir", 2, b"d", FILE)
    for number in range(200):
        two.named(100 + number, ("source", 9, number, 0), (2, "forgotten by the kernel"))
    assert os.fstat(two._fd).st_size < 5000
    assert two._version > 2
    two.close()
    three = successor(kept)
    assert (three.number_of(FILE), three.number_of(OTHER)) == (16, 17)
    assert three.known(100) is None
    REQUEST.set(9 | RESENT)
    assert three.act("rmdir", 2, b"d", None) is not None
    three.close()
    REQUEST.set(0)


def test_a_file_without_a_name_is_kept_until_it_is_dropped(kept: Kept) -> None:
    one = successor(kept)
    fd = os.memfd_create("file")
    os.write(fd, b"bytes")
    one.keep_file(20, fd)
    os.close(fd)
    one.close()
    two = successor(kept)
    assert two.files == [20]
    taken = two.take_file(20)
    assert taken is not None
    assert os.pread(taken, 9, 0) == b"bytes"
    assert two.take_file(20) is None
    os.close(taken)
    assert "node-20" in kept.fds
    two.drop_file(20)
    assert "node-20" not in kept.fds
    two.close()


def test_what_is_no_more_gives_its_id_to_nobody(kept: Kept) -> None:
    one = successor(kept)
    one.named(16, FILE, (2, "a"))
    one.close()
    two = successor(kept)
    two.forget(FILE)
    assert two.number_of(FILE) is None
    assert two.known(16) is None
    two.close()
    three = successor(kept)
    assert three.number_of(FILE) is None
    three.close()


def test_without_a_store_nothing_is_written() -> None:
    handover = Handover()
    handover.begin(list)
    handover.named(16, FILE, (2, "a"))
    assert handover.act("create", 2, b"a", None) is None
    assert not handover.active
    handover.close()
