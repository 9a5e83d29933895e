"""`spark-vl`, `python -m spark_vl` and `accelerate launch -m spark_vl`."""

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it with one line, also while it is still being imported."""
    try:
        from spark_vl.cli import main

        main()
    except KeyboardInterrupt:
        print("\nspark-vl: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
