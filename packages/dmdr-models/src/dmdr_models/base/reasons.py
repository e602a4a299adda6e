"""Why something failed, as a part of an error's line."""


def reason(error: Exception) -> str:
    """One line that names the kind of error where its text alone is no sentence, as that of `KeyError("name")`."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        return f"there is no entry {text}"
    if not text or isinstance(error, IndexError | AttributeError | TypeError | ArithmeticError):
        return f"{type(error).__name__}: {text}".rstrip(": ")
    return text
