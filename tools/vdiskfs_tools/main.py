"""The program: its commands, and how it ends."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from vdiskfs_tools import (
    completion,
    discover,
    disk,
    doctor,
    event,
    failover,
    group,
    job,
    machine,
    mount,
    point,
    policy,
    relocate,
    site,
    status,
    umount,
    upgrade,
    vault,
)
from vdiskfs_tools.call import Call, Group
from vdiskfs_tools.failures import end_with


class Program(Group):
    """The outermost group: it makes the call, and ends it with one line and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the line into a new call."""
        ctx.obj = Call()
        return super().parse_args(ctx, args)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **settings: Any
    ) -> NoReturn:
        """Run the program and exit; whatever happens is one line, unless debugging is asked for."""
        settings.pop("standalone_mode", None)
        line = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(line, prog_name or "vdiskfs", standalone_mode=False, **settings)
            sys.stdout.flush()
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 (the edge: nothing is above)
            code = end_with(error, debug="--debug" in line)
        sys.exit(code if isinstance(code, int) else 0)


@click.group("vdiskfs", cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Disks that replicate every second, and a directory for every second of their past.

    Example:
        vdiskfs vault init file:///srv/vault
        vdiskfs mount /srv/images /mnt/vd --vault file:///srv/vault
        vdiskfs status
        vdiskfs point restore web01@-15m /tmp/web01.img
    """


for command in (
    vault.vault,
    mount.mount,
    umount.umount,
    upgrade.upgrade,
    status.status,
    doctor.doctor,
    discover.discover,
    disk.disk,
    machine.machine,
    group.group,
    site.site,
    point.point,
    policy.policy,
    failover.failover,
    relocate.reprotect,
    relocate.failback,
    job.job,
    event.event,
    completion.completion,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the program."""
    # Keys and passphrases are in its memory: none may lie in a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cli.main(prog_name="vdiskfs")
