"""The one exception that means "the input is wrong", and how a command turns it into exit code 2."""

import functools
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
            print(f"{_rank_prefix()}error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapper


def _rank_prefix() -> str:
    from megamtp.parallel.environment import launch_environment  # which imports this module

    try:
        rank = launch_environment().rank
    except UserError:
        return ""
    return f"rank {rank}: " if rank else ""
