"""The command line of vdiskfs: it translates and prints, and decides nothing.

main           the program: its groups of commands
failures       what an error prints, and its exit code; answers: those of a daemon
call           one call of the program: its global options
output         what is printed, where, and in which form
names          DISK@POINT, and names that are safe to print
mounts, client which mount, and its daemon; launch: starting one
vaults         which vault, without a daemon; checks: this host
vault, mount, umount, status, disk, group, point, restore, failover, relocate, event, doctor,
completion, repair (of a vault)
               one file for each group of commands

``vdiskfs --help`` must be quick. What is slow to import (rich, httpx, trio, numpy and
all of vdiskfs that needs them) is therefore imported inside the functions that use it.
"""
