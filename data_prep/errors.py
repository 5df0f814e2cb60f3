"""The exceptions for input that cannot be converted."""


class InputError(ValueError):
    """A flag, folder, archive or image that cannot work.

    The message is one line that names the thing, where it was found, and the fix.
    """


class BadImageError(ValueError):
    """An image that cannot be stored; the message says why, without the file's name."""
