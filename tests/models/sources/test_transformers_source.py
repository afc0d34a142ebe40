"""Where a model of transformers lies: a folder, or a name on the hub."""

import pytest
import transformers

from visionattn.errors import UsageError
from visionattn.models.sources.transformers_source import loading_options, quiet, source_of


def test_a_folder_is_read_without_the_hub(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert source_of(f"hf:{tmp_path}") == str(tmp_path)
    assert loading_options(str(tmp_path)) == {"local_files_only": True, "trust_remote_code": False}
    assert loading_options("owner/name") == {"local_files_only": False, "trust_remote_code": False}


@pytest.mark.parametrize("name", ["hf:name", "hf:./here", "hf:a/b/c", "hf:../x", "hf:https://x/y"])
def test_a_name_of_neither_is_refused(name):
    with pytest.raises(UsageError, match="is neither a folder nor a model on the hub"):
        source_of(name)


def test_quiet_restores_the_messages():
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet(transformers):
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
