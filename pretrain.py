"""Pretrain a multi-token model: ``python pretrain.py configs/demo.yaml [--dry-run] [--section.key VALUE ...]``."""

import argparse
import sys

from megamtp.errors import exits_cleanly


def read_command_line(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The config's path, the flags, and the overrides that follow."""
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        usage="pretrain.py CONFIG [--dry-run] [--section.key VALUE ...]",
        description="Pretrain a multi-token model from a YAML config, alone or under torchrun. "
        "A run that was interrupted goes on from its last checkpoint when the same command is given again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", help="YAML file; see configs/")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print what it will be, and stop")
    # The deepspeed command adds it; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true", help="this text, with every key of the config")
    options, overrides = parser.parse_known_args(arguments)
    if options.help or not options.config:
        from megamtp.config import describe
        from megamtp.training.run_config import RunConfig

        parser.epilog = "keys of the config, each of them also an option:\n" + describe(RunConfig)
        parser.print_help()
        sys.exit(0 if options.help else 2)
    return options, overrides


@exits_cleanly
def main(arguments: list[str]) -> int:
    options, overrides = read_command_line(arguments)
    from megamtp.config import load
    from megamtp.training.run_config import RunConfig

    config = load(RunConfig, options.config, overrides)
    from megamtp.training.launch import pretrain

    return pretrain(config, dry_run=options.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
