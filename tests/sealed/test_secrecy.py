"""Without the key: names made of ids, sizes, times. With it: everything, as in a plain vault."""

from __future__ import annotations

import math
import re
from collections import Counter

from tests.sealed.rig import LABEL, NAMES, PAGE_TEXT, target

ZSTD = b"\x28\xb5\x2f\xfd"
WORDS = (
    *(name.encode() for name in NAMES), LABEL.encode(), PAGE_TEXT, ZSTD, b"VDFDELTA", b"VDFSEGMT",
    b'"disk"', b'"generation"', b"web01.img", b"now",
)  # fmt: skip

# In a million random bytes three certain ones stand in one run of twenty, five in one of a million.
SURE = tuple(word for word in WORDS if len(word) >= 5)


def in_metadata(text: str) -> list[bytes]:
    import base64

    return [text.encode(), base64.b64decode(text)]


async def test_nothing_that_was_written_is_found_in_the_vault() -> None:
    """No name, label, page, magic number or key of a document, in any object but vault.json."""
    async with target() as one:
        for name, (data, metadata, _) in one.raw.objects.items():
            if name == "vault.json":
                assert not any(name.encode() in data for name in NAMES if name.encode() in SURE)
                continue
            for word in (*SURE, bytes.fromhex(one.disk)):
                assert word not in data, (name, word)
            assert set(metadata) <= {"sealed"}
            for part in (part for text in metadata.values() for part in in_metadata(text)):
                for word in SURE:
                    assert word not in part, (name, word)


async def test_the_plain_vault_has_all_of_that() -> None:
    """The search finds what is to be found: the same things in what is opened with the key."""
    async with target() as one:
        found: set[bytes] = set()
        async for info in one.sealed.list(""):
            data, _ = await one.sealed.read(info.name)
            text = data + info.name.encode() + repr(info.metadata).encode()
            found |= {word for word in WORDS if word in text}
        assert found >= set(WORDS) - {PAGE_TEXT}


async def test_names_are_ids_and_numbers_or_tell_nothing() -> None:
    shape = re.compile(
        r"vault\.json"
        r"|disks/[0-9a-f]{32}/(disk\.json|g[0-9a-f]{8}(\.[0-9])?/[0-9a-f]{16}(-[0-9a-f]{16}\.0)?)"
        r"|segments/[0-9a-f]{32}/[0-9a-f]{32}|boot/[0-9a-f]{32}\.json"
        r"|(names|groups|sites)/[0-9a-f]{32}"
    )
    async with target() as one:
        for name in one.raw.objects:
            assert shape.fullmatch(name), name
        assert {name.partition("/")[0] for name in one.raw.objects} == {
            "vault.json", "disks", "segments", "boot", "names", "groups", "sites",
        }  # fmt: skip


async def test_no_two_objects_look_alike() -> None:
    """The same bytes twice are two objects that have nothing in common but their sizes."""
    async with target(epochs=2) as one:
        for number in range(2):
            await one.sealed.create(f"segments/{one.disk}/{number:032x}", bytes(100_000))
        a, b = (one.raw.objects[f"segments/{one.disk}/{n:032x}"][0] for n in range(2))
        body = slice(24, None)
        assert len(a) == len(b)
        same = sum(x == y for x, y in zip(a[body], b[body], strict=True))
        assert same < len(a) // 64  # a 256th by chance, and the heads of the blocks
        counts = Counter(a[56:30_000])
        entropy = -sum(n / 29_944 * math.log2(n / 29_944) for n in counts.values())
        assert entropy > 7.98
