"""The one exception for what a user can mend: a path, an option, a file. The command line prints it as a line."""


class InputError(ValueError):
    """Something given to hdc is wrong; the message says what, and what to do."""


def reason(error: Exception) -> str:
    """Why a file cannot be read or written, as the end of a message: "permission denied"."""
    return (getattr(error, "strerror", None) or str(error)).lower()
