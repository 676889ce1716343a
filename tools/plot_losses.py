"""Draw a run's losses and accuracies per head."""

import argparse
import math
from pathlib import Path

from megamtp.errors import UserError, exits_cleanly
from megamtp.evaluation.loss_curves import plot_losses


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="a run's folder, with metrics.jsonl")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the PNG (default RUN_DIR/losses.png)")
    parser.add_argument("--baseline", metavar="LABEL=NATS", help='a dashed line, such as "Kneser-Ney bigram=3.21"')
    options = parser.parse_args(arguments)
    output = options.output or options.run_dir / "losses.png"
    plot_losses(options.run_dir, output, options.baseline and _baseline(options.baseline))
    print(output)


def _baseline(text: str) -> tuple[str, float]:
    label, _, value = text.rpartition("=")
    try:
        nats = float(value)
    except ValueError:
        nats = math.nan
    if not label or not math.isfinite(nats):
        raise UserError(f"--baseline {text!r}: write LABEL=NATS, such as 'Kneser-Ney bigram=3.21'")
    return label, nats


if __name__ == "__main__":
    main()
