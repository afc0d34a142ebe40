"""What must be refused, in a line."""

import pytest


def refuses(error, message, call, /, *arguments, **options):
    """Such a call raises the error, and what the error says holds the pattern."""
    with pytest.raises(error, match=message):
        call(*arguments, **options)
