"""Exceptions that are told to the user in one line, and the exit codes that a command turns them into."""

import functools
import signal
import sys


class UserError(Exception):
    """Something that the user gave is wrong. The message is one line: what, where, what to do."""


class RunFailure(Exception):
    """Something outside of the input went wrong: a full disk, a killed process. One line: what, where, what to do."""


def exits_cleanly(main):
    """Decorate a command's ``main``: one line on stderr and exit code 2 for ``UserError``, 1 for ``RunFailure``."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (UserError, RunFailure) as error:
            print(f"{_rank_prefix()}error: {error}", file=sys.stderr)
            sys.exit(exit_code(error))
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            sys.exit(exit_code(error))

    return wrapper


def exit_code(error: BaseException) -> int:
    """What a command that ``error`` ends exits with."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, UserError) else 1


def _rank_prefix() -> str:
    from megamtp.parallel.environment import launch_environment  # which imports this module

    try:
        rank = launch_environment().rank
    except UserError:
        return ""
    return f"rank {rank}: " if rank else ""
