"""``python -m vdiskfs_tools`` is ``vdiskfs``."""

from vdiskfs_tools.main import main

main()
