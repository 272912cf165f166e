"""Objects by name: a folder or Azure Blob Storage behind one interface, ``Store``.

``object`` says what a store is; ``local``, ``folder`` and ``file`` are the folder vault;
``azure``, ``account``, ``token``, ``body`` and ``answer`` are Azure Blob Storage; ``split`` is two
containers as one; ``retry`` tries again. What objects mean is the matter of ``catalog``. The
libraries of a kind are imported when a URL of that kind is opened.

    url = "file:///srv/vault"  or  "azure://CONTAINER[/PREFIX][?control=CONTAINER]"
    store = open_store(url)
    await store.create("vault.json", b"{}")
    await store.aclose()
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vdiskfs.errors import UsageError
from vdiskfs.store.object import READ_LIMIT, ObjectInfo, Store
from vdiskfs.store.split import DATA_MARK, PROBES, control_of, is_split

__all__ = [
    "DATA_MARK",
    "PROBES",
    "READ_LIMIT",
    "ObjectInfo",
    "Store",
    "control_of",
    "is_split",
    "open_store",
    "same_place",
]

_FORMS = "use file:///FOLDER or azure://CONTAINER[/PREFIX][?control=CONTAINER]"

# The only query there is. What it names has no character of a secret.
_CONTROL = re.compile(r"azure://[^?#@]*\?control=([a-z0-9-]{3,63})")


def open_store(url: str, *, environ: Mapping[str, str] = os.environ) -> Store:
    """Open the store that a vault URL names. Nothing is sent or made yet.

    Args:
        url: ``file:///FOLDER`` or ``azure://CONTAINER[/PREFIX][?control=CONTAINER]``.
        environ: where the Azure account and its secret come from, see vdiskfs(1).

    Raises:
        UsageError: the URL is malformed, the folder is on a network file system, or the
            environment does not name an account.
        RefusedError: the endpoint would carry secrets without TLS.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        hint = f"use file://{url}" if url.startswith("/") and _harmless(url) else _FORMS
        raise UsageError(f"not a vault URL{_shown(url)}", hint=hint)
    if not _harmless(url):
        raise UsageError(
            "a vault URL has no query but ?control=CONTAINER, no fragment, no user "
            f"({scheme[:16]}://...)",
            hint=f"{_FORMS}; secrets come from the environment",
        )
    if scheme == "file":
        return _open_folder(url)
    if scheme == "azure":
        return _open_azure(url, environ)
    raise UsageError(f"not a vault URL{_shown(url)}", hint=_FORMS)


def same_place(url: str, other: str) -> bool:
    """Say whether two vault URLs name one place, however each is written."""
    return _place(url) == _place(other)


def _place(url: str) -> tuple[str, ...]:
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        return scheme, os.path.realpath(unquote(urlsplit(url).path))
    place, _, query = rest.partition("?")
    return scheme, place.strip("/"), query


def _harmless(url: str) -> bool:
    """Tell whether a URL cannot hold a secret that an error would print."""
    return _CONTROL.fullmatch(url) is not None or not any(one in url for one in "?#@")


def _shown(url: str) -> str:
    return f": {url[:200]!r}" if _harmless(url) and url.isprintable() else ""


def _open_folder(url: str) -> Store:
    # Imported here: a program that only prints help pays for neither kind.
    from vdiskfs.store.local import LocalStore  # noqa: PLC0415

    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/") or "\0" in path:
        raise UsageError(
            f"a folder's URL needs an absolute path after file://{_shown(url)}", hint=_FORMS
        )
    return LocalStore(Path(os.path.normpath(path)))


def _open_azure(url: str, environ: Mapping[str, str]) -> Store:
    from vdiskfs.store.account import Account, control_environ  # noqa: PLC0415
    from vdiskfs.store.azure import AzureStore  # noqa: PLC0415
    from vdiskfs.store.retry import RetryingStore  # noqa: PLC0415
    from vdiskfs.store.split import SplitStore  # noqa: PLC0415

    named, _, control = url.removeprefix("azure://").partition("?control=")
    container, _, prefix = named.partition("/")
    data = AzureStore(Account.from_environ(environ), container, prefix)
    if not control:
        return RetryingStore(data)
    if control == container:
        raise UsageError(
            f"control={control}: is the container of the data itself", hint="name another one"
        )
    account = Account.from_environ(control_environ(environ))
    return RetryingStore(SplitStore(data, AzureStore(account, control, prefix)))
