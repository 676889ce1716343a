"""One HTML page of what happened in one run, or in several side by side; it opens without a network.

python tools/report.py runs/demo                                # writes runs/demo/report.html
python tools/report.py runs/narrow runs/wide --output both.html
"""

import argparse
from pathlib import Path

from megamtp.errors import exits_cleanly
from megamtp.report.page import write_report


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="RUN_FOLDER", type=Path, nargs="+", help="with metrics.jsonl")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="default: report.html in the run's folder, or of several here"
    )
    options = parser.parse_args(arguments)
    here = Path() if len(options.folders) > 1 else options.folders[0]
    output = options.output or here / "report.html"
    write_report(options.folders, output)
    print(output)


if __name__ == "__main__":
    main()
