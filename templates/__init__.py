if not __name__.startswith("morphc."):
    raise ImportError(
        f"import morphc.{__name__}, not {__name__}: this folder is a room of the morphc package"
    )
