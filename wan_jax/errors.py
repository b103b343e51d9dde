"""The one exception for bad input."""


class InputError(ValueError):
    """Something the user gave cannot be used: one line that names the thing and says what to do.

    The command line prints the message and exits with code 2; any other exception is a bug in wan_jax.
    """
