"""Consistency groups on a real mount: one instant, live join and leave, faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.chain import PAGES, Chain, check_instants, count_shared, value_of
from tests.e2e.gauges import write_at
from tests.e2e.mounted import MountedSite
from vdiskfs.units import PAGE_SIZE

pytestmark = [pytest.mark.e2e, pytest.mark.root]

FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
SLOW = "epoch_interval_s = 3600\nheartbeat_s = 1\n"
MIB = 1 << 20


def names_of(count: int) -> list[str]:
    return [f"disk{number}" for number in range(count)]


def mounted(site: MountedSite, count: int) -> list[str]:
    """Mount with so many disks, all replicated once."""
    names = names_of(count)
    for name in names:
        site.add_image(name, MIB)
    site.init().mount()
    for name in names:
        site.wait_shipped(name)
    return names


def group(site: MountedSite, *words: str, code: int = 0) -> str:
    return site.run("-m", site.mountpoint, "group", *words, code=code).stderr


def wait_points(site: MountedSite, names: list[str], more: int, timeout_s: float = 120) -> int:
    """Wait until the vault has so many group points more than now; return how many it has."""
    count = count_shared(site.vault, names)
    wanted = count() + more
    site.wait(f"{wanted} group points", lambda: count() >= wanted, timeout_s)
    return count()


def last_steps(site: MountedSite, names: list[str]) -> list[int]:
    return [
        value_of((site.source / f"{name}.img").read_bytes()[: PAGES * PAGE_SIZE]) for name in names
    ]


@pytest.mark.slow
def test_in_every_group_point_no_disk_is_ahead_of_one_that_is_written_before_it(
    tmp_path: Path,
) -> None:
    """Eight disks; the end of the mount makes one more point, which is the end of the chain."""
    with MountedSite(tmp_path, options=FAST) as site:
        names = mounted(site, 8)
        group(site, "create", "shop", *names)
        with Chain([site.image(name) for name in names]):
            wait_points(site, names, 60)
        # Together they are an instant; of seals by themselves that would be luck.
        site.umount("--drain")
        found = check_instants(site.vault, names)
        assert len(found.points) >= 60
        assert found.cut_inside > 10, "few points fell inside of a step: little was shown"
        assert list(found.steps[-1]) == last_steps(site, names)


@pytest.mark.slow
def test_disks_join_and_leave_while_they_are_written_to(tmp_path: Path) -> None:
    """No point is lost, no daemon restarted, no epoch given up."""
    with MountedSite(tmp_path, options=FAST) as site:
        names = mounted(site, 4)
        pid = site.pid
        group(site, "create", "shop", *names[:3])
        with Chain([site.image(name) for name in names]):
            wait_points(site, names[:3], 5)
            before = {name: site.points(name) for name in names}
            assert count_shared(site.vault, names)() == 0
            group(site, "add", "shop", names[3])
            assert site.disk(names[3])["group"] == "shop"
            wait_points(site, names, 10)
            group(site, "remove", "shop", names[0])
            assert site.disk(names[0])["group"] is None
            rest = wait_points(site, names[1:], 10)
            alone = len(site.points(names[0]))
            site.wait("a point of the one that left",
                      lambda: len(site.points(names[0])) > alone + 2)  # fmt: skip
        for name in names:
            site.wait_shipped(name)
        assert check_instants(site.vault, names[:3]).points
        assert check_instants(site.vault, names).cut_inside
        assert len(check_instants(site.vault, names[1:], strict=False).points) >= rest
        # Those that left are in no later point of the others.
        together = check_instants(site.vault, names).points[-1][0].time_ns
        assert check_instants(site.vault, names[1:]).points[-1][0].time_ns > together
        for name in names:
            points = site.points(name)
            assert points[: len(before[name])] == before[name]
            epochs = [point["epoch"] for point in points]
            assert epochs == list(range(1, len(epochs) + 1)), "an epoch was given up"
            assert site.point(name).read_bytes() == (site.source / f"{name}.img").read_bytes()
        assert site.json("status")["pid"] == pid
        assert "Traceback" not in (site.state / "daemon.log").read_text()


@pytest.mark.slow
def test_a_group_outlives_the_daemon(tmp_path: Path) -> None:
    """Killed under load, twice: membership stays, and so does what a group point is."""
    with MountedSite(tmp_path, options=FAST) as site:
        names = mounted(site, 4)
        group(site, "create", "shop", *names)
        with Chain([site.image(name) for name in names]) as chain:
            for _ in range(2):
                wait_points(site, names, 5)
                site.kill_daemon()
                assert {site.disk(name)["group"] for name in names} == {"shop"}
            steps = chain.steps
            wait_points(site, names, 5)
        for name in names:
            site.wait_shipped(name)
        found = check_instants(site.vault, names)
        assert found.steps[-1][0] > steps
        assert found.cut_inside
        site.umount()
        site.mount()
        assert {site.disk(name)["group"] for name in names} == {"shop"}


def test_a_disk_that_is_paused_keeps_no_other_from_its_points(tmp_path: Path) -> None:
    """What the others get meanwhile is no group point; it is again when the disk goes on."""
    with MountedSite(tmp_path, options=FAST) as site:
        names = mounted(site, 3)
        group(site, "create", "shop", *names)
        with Chain([site.image(name) for name in names]):
            wait_points(site, names, 3)
            site.json("disk", "pause", names[1])
            shown = site.json("group", "show", "shop")
            assert [row["ready"] for row in shown["disks"]] == [True, False, True]
            others = [names[0], names[2]]
            wait_points(site, others, 5)
            all_of_them = count_shared(site.vault, names)()
            wait_points(site, others, 5)
            assert count_shared(site.vault, names)() == all_of_them
            site.json("disk", "resume", names[1])
            wait_points(site, names, 3)
        for name in names:
            site.wait_shipped(name)
        assert check_instants(site.vault, names).points
        assert check_instants(site.vault, others).cut_inside
        assert site.point(names[1]).read_bytes() == site.image(names[1]).read_bytes()


def test_a_vault_that_is_away_leaves_a_group_as_it_was(tmp_path: Path) -> None:
    """Points of one instant go on in the spool; what needs the vault is exit 5."""
    with MountedSite(tmp_path, options=FAST) as site:
        names = mounted(site, 3)
        group(site, "create", "shop", *names)
        vault, aside = tmp_path / "vault", tmp_path / "aside"
        with Chain([site.image(name) for name in names]):
            before = wait_points(site, names, 3)
            vault.rename(aside)
            waiting = "points wait in the spool"
            site.wait(waiting, lambda: site.disk(names[0])["points_waiting"] > 10)
            listed = site.json("group", "list")
            assert [row["name"] for row in listed["groups"]] == ["shop"]
            assert listed["vault_error"]
            shown = site.json("group", "show", "shop")
            assert (shown["points"], len(shown["disks"])) == (None, 3)
            said = group(site, "delete", "shop", code=3)
            assert "the vault is gone" in said
            vault.mkdir()  # an empty folder has no group either, and is not the vault
            assert site.json("group", "list")["groups"] == listed["groups"]
            assert site.disk(names[0])["group"] == "shop"
            shutil.rmtree(vault)
            aside.rename(vault)
        for name in names:
            site.json("disk", "retry", name)
        for name in names:
            site.wait_shipped(name)
        found = check_instants(site.vault, names)
        assert len(found.points) > before + 10


def test_what_another_mount_changes_counts_from_the_next_heartbeat(tmp_path: Path) -> None:
    with (
        MountedSite(tmp_path, options=FAST) as site,
        MountedSite(tmp_path, vault=f"file://{tmp_path}/vault", name="other", options=FAST) as far,
    ):
        names = mounted(site, 3)
        far.mount(recovery=True)
        said = group(far, "create", "shop", *names)
        assert "not protected in this mount" in said
        site.wait("the group is known", lambda: site.disk(names[0])["group"] == "shop")
        with Chain([site.image(name) for name in names]):
            wait_points(site, names, 3)
            group(far, "delete", "shop")
            site.wait("the group is gone", lambda: site.disk(names[0])["group"] is None)
        assert check_instants(site.vault, names).points
        assert far.json("group", "list")["groups"] == []


def test_a_group_is_failed_over_at_one_instant(tmp_path: Path) -> None:
    """A test failover of the group, and of one disk; a point by hand, listed and named."""
    with MountedSite(tmp_path, options=FAST) as site:
        names = mounted(site, 3)
        group(site, "create", "shop", *names)
        with Chain([site.image(name) for name in names]):
            wait_points(site, names, 3)
            made = site.json("point", "create", "shop", "--label", "by hand", "--wait")["points"]
            assert len({row["time"] for row in made}) == 1
            assert sorted(row["disk"] for row in made) == names
            document = site.json("failover", "test", "shop", "--name", "t1")
            again = site.json("failover", "test", "shop", "--point", made[0]["time"])
        assert [row["disk"] for row in document["disks"]] == names
        steps = [value_of(Path(row["path"]).read_bytes()[: PAGES * PAGE_SIZE])
                 for row in document["disks"]]  # fmt: skip
        assert steps == sorted(steps, reverse=True)
        assert steps[0] - steps[-1] <= 1
        assert {row["point_time"] for row in again["disks"]} == {made[0]["time"]}
        listed = site.json("point", "list", "shop", "--since", made[0]["time"])["points"]
        assert (listed[0]["label"], listed[0]["time"]) == ("by hand", made[0]["time"])
        epochs = {row["disk"]: row["epoch"] for row in made}
        assert {row["disk"]: row["epoch"] for row in listed[0]["disks"]} == epochs
        one = site.json("failover", "test", names[0])
        assert [row["disk"] for row in one["disks"]] == names[:1]
        offline = json.loads(site.run("--json", "--vault", site.vault, "point", "list", "shop",
                                      "--limit", "2").stdout)  # fmt: skip
        assert [len(row["disks"]) for row in offline["points"]] == [3, 3]
        for row in (document, again, one):
            site.json("failover", "cleanup", row["name"])
        # One disk by its name, with the others of its machine: they share an instant, too.
        definition = tmp_path / "shop.toml"
        disks = "".join(f'[[disks]]\ndisk = "{name}"\n' for name in names[:2])
        definition.write_text(f'memory = "64MiB"\n{disks}')
        site.json("machine", "set", "shop", "--file", str(definition))
        site.json("disk", "pause", names[1])
        write_at(site.image(names[0]), 0, b"by itself")
        [newer] = site.json("point", "create", names[0], "--wait")["points"]
        members = site.json("failover", "test", names[0], "--dry-run")["members"]
        assert [row["disk"] for row in members] == names[:2]
        [instant] = {row["point_time"] for row in members}
        assert instant < newer["time"]
        site.json("disk", "resume", names[1])


def test_images_of_one_name_are_told_apart_in_a_failover(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        for directory in ("a", "b"):
            (site.source / directory).mkdir()
            (site.source / directory / "same.img").write_bytes(directory.encode() * MIB)
        site.init().mount()
        names = [row["name"] for row in site.json("disk", "list")["disks"]]
        assert len(names) == 2
        for name in names:
            site.wait_shipped(name)
        group(site, "create", "shop", *names)
        site.json("point", "create", "shop", "--wait")
        rows = site.json("failover", "test", "shop", "--name", "t1")["disks"]
        contents = {Path(row["path"]).read_bytes()[:1] for row in rows}
        assert contents == {b"a", b"b"}
        assert len(list((site.mountpoint / "failovers" / "t1").iterdir())) >= 2
        site.json("failover", "cleanup", "t1")


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=SLOW) as site:
        names = mounted(site, 3)
        group(site, "create", "shop", *names[:2])
        cases = [
            (("create", "other", names[2], names[1]), 4, f"disk {names[1]} is in group shop"),
            (("create", "shop", names[2]), 4, "there is a group shop already"),
            (("create", names[2], names[2]), 4, "there is a disk of that name"),
            (("create", "other", "absent"), 3, "no disk 'absent'"),
            (("create", "a/b", names[2]), 2, "not a name for a group"),
            (("add", "shop", names[0]), 4, f"disk {names[0]} is in group shop already"),
            (("add", "absent", names[2]), 3, "no group 'absent'"),
            (("remove", "shop", names[2]), 3, f"disk {names[2]} is not in group shop"),
            (("remove", "shop", *names[:2]), 4, "vdiskfs group delete shop"),
            (("show", "absent"), 3, "no group absent"),
            (("delete", "absent"), 3, "no group 'absent'"),
        ]
        for words, code, message in cases:
            said = group(site, *words, code=code)
            assert message in said, words
            assert said.count("\n") == 1, said
        for words, code, message in [
            (("failover", "test", "shop"), 3, "that all of them share"),
            (("failover", "test", "shop", "--point", "#1"), 2, "an epoch of one disk"),
            (("failover", "test", "absent"), 3, "no disk absent"),
            (("point", "list", "absent"), 3, "no disk absent"),
        ]:  # fmt: skip
            said = site.run("-m", site.mountpoint, *words, code=code).stderr
            assert message in said, said
            assert said.count("\n") == 1, said
        for words in (("create", "new", names[2]), ("add", "shop", names[2]),
                      ("remove", "shop", names[0]), ("delete", "shop")):  # fmt: skip
            assert site.json("group", *words, "--dry-run")["dry_run"] is True
        (row,) = site.json("group", "list")["groups"]
        assert [disk["disk"] for disk in row["disks"]] == names[:2]


@pytest.mark.parametrize("step", ["group.written", "groups.noted", "group.deleted"])
def test_a_daemon_killed_in_the_middle_of_a_change_leaves_it_whole(
    tmp_path: Path, step: str
) -> None:
    """The command says that it was not answered; what the vault says counts with the successor."""
    with MountedSite(
        tmp_path, options=FAST, environ={"VDISKFS_CRASH": f"{step}:1"}
    ) as site:  # fmt: skip
        names = mounted(site, 2)
        disks, before = set(names), site.pid
        deleted = step == "group.deleted"
        if deleted:
            group(site, "create", "shop", *names)
        words = ("delete", "shop") if deleted else ("create", "shop", *names)
        assert "does not answer" in group(site, *words, code=1)
        site.wait_successor(before, disks)
        wanted = {None} if deleted else {"shop"}
        site.wait("the change counts", lambda: {site.disk(n)["group"] for n in names} == wanted)
        again = group(site, *words, code=3 if deleted else 4)
        assert "group" in again
        if not deleted:
            with Chain([site.image(name) for name in names]):
                wait_points(site, names, 2)
            assert check_instants(site.vault, names).points
