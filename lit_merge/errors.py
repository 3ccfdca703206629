"""The one error that a user's input can raise, and the kind of it that a full disk is.

Anything that is wrong with files, tensors or settings that a person gave is an :class:`InputError`;
the command line prints its message without a traceback. Everything else is a bug in lit-merge.
"""


class InputError(ValueError):
    """An input that cannot be used.

    The message has the form ``<file or parameter>: <what must hold>; got <value>. <fix>``.
    """


class NoRoomError(InputError):
    """An output for which its disk has no room; the same command may work on another disk."""
