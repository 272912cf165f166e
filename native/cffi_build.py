"""Write the C source of ``vdiskfs._native`` from the public header.

The header, with those of its own directory that it includes, is the declaration: what is
left of it without the preprocessor's lines and the comments is what cffi gets. Run by CMake:
``cffi_build.py HEADER OUTPUT``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cffi import FFI

MODULE = "vdiskfs._native"

_INCLUDE = re.compile(r'^#include "([a-z_]+\.h)"$', re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*$", re.MULTILINE)


def declarations(header: str) -> str:
    """Return the plain declarations of a header that cffi's parser takes."""
    return _DIRECTIVE.sub("", _COMMENT.sub(" ", header))


def whole(header: Path) -> str:
    """Return a header's text with what it includes from its own directory in place."""
    text = header.read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: whole(header.with_name(found[1])), text)


def main(header: Path, output: Path) -> None:
    """Write the extension's C source; the file is left alone where nothing changed."""
    ffi = FFI()
    ffi.cdef(declarations(whole(header)))
    ffi.set_source(MODULE, f'#include "{header.name}"')
    ffi.emit_c_code(str(output))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
