"""``python -m benchmarks [NAME ...] [--device cpu] [--rounds 9]``."""

import argparse
from importlib import import_module

NAMES = ("step", "quality", "scaling", "overhead")
# Run when asked for: they take long, or need what is not installed with the package.
OTHERS = ("dead", "gallery", "models", "pictures")


def main() -> None:
    """Runs the benchmarks that were asked for; all, if none was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"among {', '.join(NAMES)} (default: all of these), and {', '.join(OTHERS)}",
    )
    parser.add_argument("--device", default="cpu", help="where to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each method (default: %(default)s)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES + OTHERS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES + OTHERS)}")
    for name in arguments.names or NAMES:
        import_module(f"benchmarks.{name}").main(arguments.device, arguments.rounds)


if __name__ == "__main__":
    main()
