"""Access to the hub of Hugging Face: without a network, only its cache is used."""

import contextlib
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator

_changing = threading.Lock()
_before: list[bool] = []
"""The hub's setting before each open context of `offline`; several threads may be in one."""


@contextlib.contextmanager
def only_cache_without_network() -> Iterator[None]:
    """In this context, the hub's client uses its cache alone if the name of the hub's host is unknown.

    Without a network, the client would otherwise repeat its requests for about a minute.

    Raises:
        ConnectionError: the host's name is unknown, and the cache lacks a file.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or ""
    if (constants.HF_HUB_OFFLINE and not _before) or _is_known(host):  # the user's own setting stays
        yield
        return
    with offline():
        try:
            yield
        except OSError as error:
            causes: list[BaseException] = [error]
            while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
                causes.append(cause)
            if not any(isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)) for cause in causes):
                raise
            raise ConnectionError(f"the host {host} is unknown, and the cache lacks a file") from error


def _is_known(host: str) -> bool:
    if urllib.request.getproxies():  # the proxy looks up the name
        return True
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """In this context, the hub's client opens no connection; a request raises an error."""
    from huggingface_hub import constants

    with _changing:
        _before.append(constants.HF_HUB_OFFLINE)
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _changing:
            before = _before.pop()
            if not _before:  # the last thread in such a context restores what the first one found
                constants.HF_HUB_OFFLINE = before
