if not __name__.startswith("morphc."):
    import sys as _sys

    # In a checkout whose root is on the path, this folder answers to the name of somebody else's package.
    # Libraries that look for that one (transformers does) load it by `importlib.import_module` and ask for its
    # version: they find a package without one, and nothing in it. Everybody else is told what they meant.
    _frame, _probed = _sys._getframe(1), False
    while _frame.f_back is not None and _frame.f_globals.get("__name__", "").startswith(
        ("importlib", "_frozen_importlib")
    ):
        _probed = _probed or _frame.f_code.co_name == "import_module"
        _frame = _frame.f_back
    _message = "import morphc.kernels, not kernels: this folder is a room of the morphc package"
    if not _probed:
        raise ImportError(_message)
    __path__ = []

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(_message)
