"""Check in one line that a call raises an error."""

import pytest


def refuses(error, message, call, /, *arguments, **options):
    """Check that the call raises the error, and that the error's message matches the pattern."""
    with pytest.raises(error, match=message):
        call(*arguments, **options)
