"""Without a network, models of the hub come from the cache or are refused at once."""

import socket
import time
import urllib.request

import pytest
from huggingface_hub import constants

from tests.refusals import refuses
from visionattn.errors import DataError
from visionattn.models import load_model
from visionattn.models.hub import offline, only_cache_without_network


@pytest.fixture
def lookups(tmp_path, monkeypatch):
    """Return the host names that are looked up; none is known."""
    names = []

    def unknown(host, *others, **options):
        names.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    def wait(seconds):
        raise AssertionError("the client waits, and tries again")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return names


@pytest.mark.parametrize("name", ["test_vit", "hf-hub:owner/name", "hf:owner/name"])
def test_a_model_of_the_hub_is_refused_at_once_without_a_network(name, lookups):
    message = r"could not be loaded.*\(the host huggingface.co is unknown, and the cache lacks a file\)"
    refuses(DataError, message, load_model, name)
    assert lookups == ["huggingface.co"]
    assert not constants.HF_HUB_OFFLINE


def test_nothing_is_looked_up_for_a_folder(lookups, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (f"local-dir:{tmp_path}", f"hf:{tmp_path}"):
        refuses(DataError, str(tmp_path), load_model, name)
    assert not lookups


def test_with_a_proxy_or_a_known_host_the_client_decides(lookups, monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    with only_cache_without_network():
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [])
    with only_cache_without_network():
        assert not constants.HF_HUB_OFFLINE


def test_other_errors_of_files_keep_their_message(lookups):
    with pytest.raises(OSError, match="No space left"), only_cache_without_network():
        raise OSError(28, "No space left on device")
    assert not constants.HF_HUB_OFFLINE


def test_the_last_of_several_threads_restores_the_setting(lookups):
    first, second = offline(), only_cache_without_network()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE
    second.__exit__(None, None, None)
    assert not constants.HF_HUB_OFFLINE
