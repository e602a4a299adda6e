"""The tree of this package's errors. Each message is one line that names what is wrong and how to fix it."""


class ModelsError(ValueError):
    """The base of all errors that this package defines."""


class UsageError(ModelsError):
    """A mistake on the command line of `dmdr-generate`: the message names the option, its value and the fix."""


class ConversionError(ModelsError):
    """A checkpoint cannot be converted."""


class SizeError(ModelsError):
    """A model cannot draw pictures of the size that it is asked for."""


class LengthError(ModelsError):
    """A model cannot read texts of the length, `max_tokens`, that it is asked for."""
