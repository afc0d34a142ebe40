"""Watch any model attend: where its layers attend, and to what, while it runs as it always does."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
