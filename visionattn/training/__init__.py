"""Training runs: the Lightning verbs of the command line, checkpoints, exact resume, and callbacks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
