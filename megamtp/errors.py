"""The one exception that means "the input is wrong", and how a command turns it into exit code 2."""

import functools
import os
import sys


class UserError(Exception):
    """Something that the user gave is wrong. The message is one line: what, where, what to do."""


def exits_cleanly(main):
    """Decorate a command's ``main``: a ``UserError`` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            rank = os.environ.get("RANK", "0")
            print(f"error: {error}" if rank == "0" else f"rank {rank}: error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapper
