"""Running trainings: the command line's Lightning verbs, checkpoints, and the callbacks that Lightning lacks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
