"""The guest of a journey: a shop that writes each sale to SQLite, and tells when it is durable.

Debian's kernel, busybox, and the sqlite3 of this host's Debian package with its libraries, in an
initramfs. The disk is one ext4: the database, and a ballast with its sums that is read at each
start. The shop says, through the kernel's log, whose every line is out before the next step:

    FOUND ok rows=7 first=1 last=7 wrong=0   the database's own check at this start
    BEGIN 8, ROW 8                           a sale that is tried; that is durable
    PIECE 3, PIECES DONE                     a piece of the ballast that was read, and is right
    SHOP CLOSED after 8                      the power button was pressed; all is unmounted
    FAILED ...                               anything else
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.guest_files import GuestFilesError, initramfs, kernel
from tests.e2e.loopdev import run_tool

MIB = 1 << 20
PIECE = 128 << 10
PIECES = 64
SIZE = 48 * MIB
UP = "SERVICE IS UP"
APPEND = "console=ttyS0 panic=-1 loglevel=5 mitigations=off printk.devkmsg=on"
DRIVERS = ("button", "evdev")
_WRONG = re.compile(
    r"^.*(?:FAILED|I/O error|EXT4-fs (?:\(vda\): )?(?:error|warning)|EXT4-fs error|JBD2.*error|"
    r"Aborting journal|Remounting|blocked for more than|Kernel panic|Call Trace|BUG:).*$",
    re.MULTILINE | re.IGNORECASE,
)

SCRIPT = r"""
say() { echo "<1>$*" >/dev/kmsg; }
fail() { say "FAILED $*"; exit 1; }
for event in /dev/input/event*; do
    (dd if=$event of=/tmp/event bs=24 count=1 2>/dev/null && : >/tmp/stop) &
done
say "MOUNTING"
mount -t ext4 /dev/vda /mnt || fail "mount"
mkfifo /tmp/ask /tmp/answer
sqlite3 -batch -bail /mnt/shop.db </tmp/ask >/tmp/answer 2>&1 &
shop=$!
exec 3>/tmp/ask 4</tmp/answer
ask() { echo "$1" >&3; read -r answer <&4 || fail "the database is closed"; }
# With EXTRA a commit is durable when it returns, the removal of the journal too.
ask "PRAGMA journal_mode=DELETE;"
ask "PRAGMA synchronous=EXTRA; CREATE TABLE IF NOT EXISTS sale(number INTEGER PRIMARY KEY, what);
     SELECT group_concat(integrity_check, '; ') FROM pragma_integrity_check;"
check=$answer
ask "SELECT 'rows=' || count(*) || ' first=' || ifnull(min(number), 0) || ' last='
     || ifnull(max(number), 0) || ' wrong=' || ifnull(sum(what IS NOT @WHAT@), 0) FROM sale;"
say "FOUND $check $answer"
ask "SELECT ifnull(max(number), 0) FROM sale;"
last=$answer
(piece=0; while [ $piece -lt @PIECES@ ] && [ ! -e /tmp/stop ]; do
    sum=$(dd if=/mnt/ballast bs=@PIECE@ skip=$piece count=1 2>/dev/null | md5sum)
    piece=$((piece + 1))
    [ "${sum%% *}" = "$(sed -n ${piece}p /mnt/sums)" ] || fail "piece $piece: $sum"
    say "PIECE $piece"
    usleep 100000
done; say "PIECES DONE") 3>&- 4<&- &
reader=$!
say "SERVICE IS UP"
while [ ! -e /tmp/stop ]; do
    number=$((last + 1))
    say "BEGIN $number"
    ask "INSERT INTO sale SELECT number, @WHAT@ FROM (SELECT $number AS number);
         SELECT max(number) FROM sale;"
    [ "$answer" = $number ] || fail "sale $number: $answer"
    last=$number
    say "ROW $last"
    usleep 200000
done
exec 3>&- 4<&-
wait $shop $reader
umount /mnt || fail "umount"
say "SHOP CLOSED after $last"
""".replace("@WHAT@", "printf('%.*c', 700, char(65 + number % 26))")


@dataclass(frozen=True)
class Found:
    """What a check of the database says, in the guest or here."""

    check: str
    rows: int
    first: int
    last: int
    wrong: int

    def all_up_to(self, low: int, high: int | None = None) -> int:
        """Check that it is sound and has exactly the rows 1 to n; return n, from low to high."""
        n = self.rows
        assert self == Found("ok", n, min(n, 1), n, 0), self
        assert low <= n <= (low if high is None else high), (low, n, high)
        return n


def script() -> str:
    """Return what the guest's init runs."""
    return SCRIPT.replace("@PIECES@", str(PIECES)).replace("@PIECE@", str(PIECE))


def make_boot(directory: Path) -> None:
    """Lay out a boot directory for definitions of machines: vmlinuz, initrd."""
    directory.mkdir(mode=0o755)
    shutil.copyfile(kernel(), directory / "vmlinuz")
    sqlite = shutil.which("sqlite3")
    if sqlite is None:
        raise GuestFilesError("no sqlite3 on this host: apt-get install sqlite3")
    initramfs(
        script(), directory / "initrd", [Path(sqlite)], DRIVERS, libraries=_libraries(sqlite)
    )


def _libraries(program: str) -> list[Path]:
    return [Path(name) for name in re.findall(r"(/\S+) \(0x", run_tool(["ldd", program]))]


def make_disk(image: Path) -> None:
    """Make the shop's ext4, with its ballast; the database makes itself."""
    with tempfile.TemporaryDirectory() as name:
        pieces = [random.randbytes(PIECE) for _ in range(PIECES)]
        (Path(name) / "ballast").write_bytes(b"".join(pieces))
        sums = [hashlib.md5(piece).hexdigest() + "\n" for piece in pieces]
        (Path(name) / "sums").write_text("".join(sums))
        image.unlink(missing_ok=True)
        with image.open("xb") as file:
            file.truncate(SIZE)
        run_tool(["mkfs.ext4", "-q", "-F", "-b", "4096", "-d", name, image])


def read_database(image: Path, directory: Path) -> Found:
    """Judge the database of an image that nobody writes to, on this host.

    The host's kernel is not asked: a copy's journal is replayed by e2fsck, debugfs takes the
    files out, and SQLite rolls back what was not committed.
    """
    with tempfile.TemporaryDirectory(dir=directory) as name:
        work = Path(name)
        copy = work / "copy.img"
        run_tool(["cp", "--sparse=always", image, copy])
        copy.chmod(0o600)
        run_tool(["e2fsck", "-p", "-E", "journal_only", copy])
        run_tool(["e2fsck", "-f", "-n", copy])
        for file in ("shop.db", "shop.db-journal"):
            run_tool(["debugfs", "-R", f"dump /{file} {work / file}", copy])
        journal = work / "shop.db-journal"
        if journal.exists() and not os.path.getsize(journal):
            journal.unlink()
        database = sqlite3.connect(work / "shop.db")
        try:
            check = "; ".join(row[0] for row in database.execute("PRAGMA integrity_check"))
            numbers = dict(database.execute("SELECT number, what FROM sale"))
        finally:
            database.close()
    wrong = sum(what != chr(65 + number % 26) * 700 for number, what in numbers.items())
    ends = (min(numbers, default=0), max(numbers, default=0))
    return Found(check, len(numbers), *ends, wrong)


class Console:
    """What a shop printed so far, in a file, or in two where the first one got long."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def text(self) -> str:
        """All of it."""
        paths = (self.path.with_name(self.path.name + ".1"), self.path)
        return "".join(one.read_text(errors="replace") for one in paths if one.exists())

    def last(self, word: str) -> int:
        """Return the newest number behind ROW, BEGIN, PIECE or "CLOSED after"; 0: none yet."""
        return max((int(n) for n in re.findall(rf"\] (?:SHOP )?{word} (\d+)\r?$", self.text,
                                               re.MULTILINE)), default=0)  # fmt: skip

    def found(self) -> Found:
        """Return what the guest found in its database when it started."""
        [(check, *numbers)] = re.findall(
            r"FOUND (.*) rows=(\d+) first=(\d+) last=(\d+) wrong=(\d+)", self.text
        )
        return Found(check, *map(int, numbers))

    def check_clean(self) -> None:
        """Check that neither the shop nor its kernel has complained."""
        wrong = _WRONG.findall(self.text)
        assert not wrong, wrong
