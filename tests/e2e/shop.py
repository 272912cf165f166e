"""The guest of a journey: a shop that writes each sale to SQLite, and tells when it is durable.

Debian's kernel, busybox, and the sqlite3 of this host's Debian package with its libraries, in an
initramfs. The disk has two partitions: noise, and an ext4 with the database, and with a ballast
and its sums that is read at each start. The shop says, through the kernel's log, whose every line is out before the next step:

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
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.guest_files import GuestFilesError, initramfs, kernel
from tests.e2e.loopdev import run_tool

MIB = 1 << 20
PIECE = 128 << 10
PIECES = 64
# What is brought in the background comes by offset: the noise first, while the guest boots.
NOISE = 4 * MIB
UP = "SERVICE IS UP"
APPEND = "console=ttyS0 panic=-1 loglevel=5 mitigations=off printk.devkmsg=on"
DRIVERS = ("button", "evdev")
_WRONG = re.compile(
    r"^.*(?:FAILED|I/O error|EXT4-fs (?:\S+ )?(?:error|warning)|JBD2.*[Ee]rror|Aborting journal|"
    r"Remounting filesystem|blocked for more than|Kernel panic|Call Trace|BUG:).*$",
    re.MULTILINE,
)

SAY = """
say() { echo "<1>$*" >/dev/kmsg; }
fail() { say "FAILED $*"; exit 1; }
"""
# The power button is an input device: its first event is 24 bytes.
OPEN = """
for event in /dev/input/event*; do
    (dd if=$event of=/tmp/event bs=24 count=1 2>/dev/null && : >$run/stop) &
done
say "MOUNTING"
mount -t ext4 /dev/vda2 /mnt || fail "mount"
"""
CLOSE = """
umount /mnt || fail "umount"
say "SHOP CLOSED after $last"
"""
# $home is where the database lies, $run is for what is gone at the next start.
SELL = r"""
mkfifo $run/ask $run/answer
sqlite3 -batch -bail $home/shop.db <$run/ask >$run/answer 2>&1 &
shop=$!
exec 3>$run/ask 4<$run/answer
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
(piece=0; while [ $piece -lt @PIECES@ ] && [ ! -e $run/stop ]; do
    sum=$(dd if=$home/ballast bs=@PIECE@ skip=$piece count=1 2>/dev/null | md5sum)
    piece=$((piece + 1))
    [ "${sum%% *}" = "$(sed -n ${piece}p $home/sums)" ] || fail "piece $piece: $sum"
    say "PIECE $piece"
    sleep 0.1
done; say "PIECES DONE") 3>&- 4<&- &
reader=$!
say "SERVICE IS UP"
while [ ! -e $run/stop ]; do
    number=$((last + 1))
    say "BEGIN $number"
    ask "INSERT INTO sale SELECT number, @WHAT@ FROM (SELECT $number AS number);
         SELECT max(number) FROM sale;"
    [ "$answer" = $number ] || fail "sale $number: $answer"
    last=$number
    say "ROW $last"
    sleep 0.2
done
exec 3>&- 4<&-
wait $shop $reader
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


class Shop:
    """How the guest is made: here the small one, all of it in an initramfs but what it sells."""

    database = "/shop.db"
    memory = 256 << 20
    size = 48 * MIB
    limit_s = 150.0
    """Seconds to come up: software emulation on a busy machine; some 10 s on an idle one."""

    def make_boot(self, directory: Path) -> None:
        """Lay out a boot directory for definitions of machines: vmlinuz, initrd."""
        directory.mkdir(mode=0o755)
        shutil.copyfile(kernel(), directory / "vmlinuz")
        sqlite = shutil.which("sqlite3")
        if sqlite is None:
            raise GuestFilesError("no sqlite3 on this host: apt-get install sqlite3")
        script = SAY + "home=/mnt run=/tmp\n" + OPEN + sell() + CLOSE
        libraries = re.findall(r"(/\S+) \(0x", run_tool(["ldd", sqlite]))
        initramfs(script, directory / "initrd", [Path(sqlite)], DRIVERS,
                  libraries=[Path(name) for name in libraries])  # fmt: skip

    def fill(self, directory: Path) -> None:
        """Lay out what is on the disk's file system at first."""
        make_ballast(directory)

    def make_disk(self, image: Path) -> None:
        """Make the disk; the database makes itself."""
        with tempfile.TemporaryDirectory() as name:
            self.fill(Path(name))
            table = _table((4096, NOISE), (NOISE, self.size))
            image.write_bytes(table + random.randbytes(NOISE - len(table)))
            os.truncate(image, self.size)
            words = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-d", name, "-E", f"offset={NOISE}"]
            run_tool([*words, image, f"{(self.size - NOISE) >> 10}k"])

    def read(self, image: Path, directory: Path) -> Found:
        """Judge the database of an image that nobody writes to, on this host.

        The host's kernel is not asked: a copy's journal is replayed by e2fsck, debugfs takes the
        files out, and SQLite rolls back what was not committed. ``directory`` is for the copy.
        """
        with tempfile.TemporaryDirectory(dir=directory) as name:
            work = Path(name)
            copy = work / "copy.img"
            run_tool(["dd", f"if={image}", f"of={copy}", f"bs={NOISE}", "skip=1", "conv=sparse"])
            run_tool(["e2fsck", "-p", "-E", "journal_only", copy])
            run_tool(["e2fsck", "-f", "-n", copy])
            for file in (self.database, f"{self.database}-journal"):
                target = work / Path(file).name
                run_tool(["debugfs", "-R", f"dump {file} {target}", copy])
            return _judge(work / Path(self.database).name)


def sell() -> str:
    """Return the part of the script that every shop has."""
    return SELL.replace("@PIECES@", str(PIECES)).replace("@PIECE@", str(PIECE))


def make_ballast(directory: Path) -> None:
    """Write the ballast, and the sums of its pieces."""
    pieces = [random.randbytes(PIECE) for _ in range(PIECES)]
    (directory / "ballast").write_bytes(b"".join(pieces))
    sums = [hashlib.md5(piece).hexdigest() + "\n" for piece in pieces]
    (directory / "sums").write_text("".join(sums))


def _judge(path: Path) -> Found:
    journal = path.with_name(f"{path.name}-journal")
    if journal.exists() and not journal.stat().st_size:
        journal.unlink()  # debugfs makes a file of what is not there
    database = sqlite3.connect(path)
    try:
        check = "; ".join(row[0] for row in database.execute("PRAGMA integrity_check"))
        numbers = dict(database.execute("SELECT number, what FROM sale"))
    except sqlite3.DatabaseError as error:
        return Found(str(error), 0, 0, 0, 0)
    finally:
        database.close()
    wrong = sum(what != chr(65 + number % 26) * 700 for number, what in numbers.items())
    ends = (min(numbers, default=0), max(numbers, default=0))
    return Found(check, len(numbers), *ends, wrong)


def _table(*partitions: tuple[int, int]) -> bytes:
    """Return a master boot record with partitions from an offset to another."""
    rows = b"".join(
        struct.pack("<B3xB3xII", 0, 0x83, start // 512, (end - start) // 512)
        for start, end in partitions
    )
    return bytes(446) + rows.ljust(64, b"\0") + b"\x55\xaa"


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
