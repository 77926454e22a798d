"""Every error that morphc raises on purpose. `MorphcError` is the base of all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` when a known word is near, followed by the list of what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."


class MorphcError(Exception):
    """Base of every error raised by morphc."""


class ConfigError(MorphcError, ValueError):
    """An option has a value that can't be used. The message names option, value, bound and way out."""


class UnknownNameError(ConfigError):
    """A name that is not registered: blueprint, blend, pass, option, activation."""

    def __init__(self, what: str, word: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {what} {word!r}.{did_you_mean(word, known)}")


class UnsupportedHostError(MorphcError, TypeError):
    """The host can't be compiled in this form; the message names what to pass instead."""


class AlreadyMorphedError(UnsupportedHostError):
    """The host already carries seed sites."""


class NotMorphedError(MorphcError, TypeError):
    """A call that needs a compiled model was given another one."""


class ExampleInputError(MorphcError, ValueError):
    """The example inputs are missing, or the host's forward refuses them."""


class HostForwardError(ExampleInputError):
    """The host's own forward raised; `__cause__` is what it raised and the message where."""


class MorphcWarning(UserWarning):
    """Something that was asked for has no effect. The report says it too."""


class PassError(MorphcError):
    """A pass failed. The message names the pass, the node, the user's source line and where the dump is."""


class PassOrderError(PassError, ConfigError):
    """Passes were named in an order in which they can't run."""


class VerificationError(MorphcError):
    """The compiled model differs from its host."""


class PlanError(MorphcError, ValueError):
    """A plan that doesn't fit the model or this version; the message says which field differs."""


class CheckpointError(MorphcError, ValueError):
    """A checkpoint that is truncated, foreign, or of another model."""


class FoldError(MorphcError):
    """A seed can't be folded as asked."""


class SeedError(MorphcError, ValueError):
    """A command to seeds that can't be carried out: bad index, no free slot, wrong state."""


class UserCodeError(MorphcError):
    """The user's model file raised, or holds no usable module."""


class TemplateError(MorphcError):
    """A kernel template can't be rendered; the message names the template's file and line."""


class KernelError(MorphcError, RuntimeError):
    """A kernel can't be built or launched on this machine; the message says what to do instead."""


class TritonError(KernelError):
    """Triton is missing, too old, or doesn't get along with the driver."""


class UnsupportedKernelError(KernelError, TypeError):
    """There is no kernel for this device or dtype."""


class ResourceError(KernelError):
    """A kernel needs more of the device than it has; the message names the limit."""


class CacheMissError(KernelError):
    """A kernel would have to be compiled, and that was forbidden."""

    def __init__(self, kernel: str, target: str, reasons: Iterable[str]) -> None:
        told = "; ".join(reasons)
        super().__init__(
            f"{kernel} is not in the cache for {target} ({told}): import a bundle that has it (morphc cache import), "
            "or allow compiling"
        )


class RankError(MorphcError, RuntimeError):
    """Ranks that train one model together are not alike, or one of them failed; raised on all of them."""


class CacheError(MorphcError, ValueError):
    """The cache, a bundle, or a key of it can't be used as asked; the message says what would do."""


class BundleError(CacheError):
    """A file that is no bundle, or a bundle that holds what no bundle may; nothing of it was imported."""
