"""What judges the shop sees what is wrong: a row that is lost, torn, or not sold; a complaint."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.e2e.loopdev import run_tool
from tests.e2e.shop import NOISE, Console, Found, Shop

ROW = "INSERT INTO sale VALUES (?, ?)"


class SoldShop(Shop):
    """A shop whose database was made here."""

    def __init__(self, rows: Sequence[tuple[int, str]]) -> None:
        self._rows = rows

    def fill(self, directory: Path) -> None:
        """See `Shop`."""
        database = sqlite3.connect(directory / "shop.db")
        database.execute("CREATE TABLE sale(number INTEGER PRIMARY KEY, what)")
        database.executemany(ROW, self._rows)
        database.commit()
        database.close()


def sold(*numbers: int) -> list[tuple[int, str]]:
    return [(number, chr(65 + number % 26) * 700) for number in numbers]


def judged(directory: Path, rows: Sequence[tuple[int, str]]) -> Found:
    image = directory / "disk.img"
    SoldShop(rows).make_disk(image)
    return SoldShop(rows).read(image, directory)


def test_all_rows_are_found_and_one_that_is_lost_or_torn_is_missed(tmp_path: Path) -> None:
    whole = judged(tmp_path, sold(*range(1, 41)))
    assert whole.all_up_to(38, 41) == 40
    for low, high in ((41, 50), (1, 39)):
        with pytest.raises(AssertionError):
            whole.all_up_to(low, high)
    for rows in (sold(1, 2, 4), sold(2, 3), [*sold(1, 2), (3, "D" * 699 + "E")]):
        found = judged(tmp_path, rows)
        with pytest.raises(AssertionError):
            found.all_up_to(0, 100)


def test_a_page_that_is_wrong_is_seen(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    shop = SoldShop(sold(*range(1, 41)))
    shop.make_disk(image)
    blocks = run_tool(["debugfs", "-R", "blocks /shop.db", f"{image}?offset={NOISE}"]).split()
    with image.open("r+b") as file:
        file.seek(NOISE + 4096 * int(blocks[-1]))
        file.write(bytes(4096))
    found = shop.read(image, tmp_path)
    assert found.check != "ok"


@pytest.mark.parametrize(
    "line",
    ["FAILED mount", "I/O error, dev vda, sector 8 op 0x0:(READ)", "Aborting journal on vda2-8.",
     "EXT4-fs error (device vda2): ext4_find_entry:1463", "INFO: task sqlite3:61 blocked for more"
     " than 120 seconds.", "EXT4-fs (vda2): Remounting filesystem read-only"],
)  # fmt: skip
def test_what_a_guest_complains_of_is_seen(tmp_path: Path, line: str) -> None:
    console = Console(tmp_path / "serial.log")
    good = "[   8.1] EXT4-fs (vda2): recovery complete\r\n[   9.1] ROW 7\r\n[   9.2] BEGIN 8\r\n"
    console.path.write_text(good)
    console.check_clean()
    assert (console.last("ROW"), console.last("BEGIN"), console.last("CLOSED after")) == (7, 8, 0)
    console.path.write_text(f"{good}[   9.9] {line}\r\n[  10.1] SHOP CLOSED after 8\r\n")
    assert console.last("CLOSED after") == 8
    with pytest.raises(AssertionError):
        console.check_clean()
