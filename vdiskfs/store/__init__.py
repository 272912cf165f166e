"""Objects by name: a folder or Azure Blob Storage behind one interface, ``Store``.

``object`` says what a store is; ``local``, ``folder`` and ``file`` are the folder vault;
``azure``, ``account``, ``body`` and ``answer`` are Azure Blob Storage; ``retry`` tries
again. What objects mean is the matter of ``catalog``. The libraries of a kind are imported
when a URL of that kind is opened.

    url = "file:///srv/vault"  or  "azure://CONTAINER[/PREFIX]"
    store = open_store(url)
    await store.create("vault.json", b"{}")
    await store.aclose()
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vdiskfs.errors import UsageError
from vdiskfs.store.object import READ_LIMIT, ObjectInfo, Store

__all__ = ["READ_LIMIT", "ObjectInfo", "Store", "open_store"]

_FORMS = "use file:///FOLDER or azure://CONTAINER[/PREFIX]"


def open_store(url: str, *, environ: Mapping[str, str] = os.environ) -> Store:
    """Open the store that a vault URL names. Nothing is sent or made yet.

    Args:
        url: ``file:///FOLDER`` or ``azure://CONTAINER[/PREFIX]``.
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
            f"a vault URL has no query, no fragment, no user ({scheme[:16]}://...)",
            hint=f"{_FORMS}; secrets come from the environment",
        )
    if scheme == "file":
        return _open_folder(url)
    if scheme == "azure":
        return _open_azure(url, environ)
    raise UsageError(f"not a vault URL{_shown(url)}", hint=_FORMS)


def _harmless(url: str) -> bool:
    """Tell whether a URL cannot hold a secret that an error would print."""
    return not any(character in url for character in "?#@")


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
    from vdiskfs.store.account import Account  # noqa: PLC0415
    from vdiskfs.store.azure import AzureStore  # noqa: PLC0415
    from vdiskfs.store.retry import RetryingStore  # noqa: PLC0415

    container, _, prefix = url.removeprefix("azure://").partition("/")
    return RetryingStore(AzureStore(Account.from_environ(environ), container, prefix))
