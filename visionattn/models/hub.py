"""Access to the hub of Hugging Face: without a network, only its cache is used."""

import contextlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def only_cache_without_network() -> Iterator[None]:
    """In this context, the hub's client uses its cache alone if the name of the hub's host is unknown.

    Without a network, the client would otherwise repeat its requests for about a minute.

    Raises:
        ConnectionError: the host's name is unknown, and the cache lacks a file.
    """
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or ""
    if constants.HF_HUB_OFFLINE or _is_known(host):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except OSError as error:  # of the hub's client, for a file that the cache lacks
        raise ConnectionError(f"the host {host} is unknown, and the cache lacks a file") from error
    finally:
        constants.HF_HUB_OFFLINE = False


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

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
