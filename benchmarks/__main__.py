"""Measure featvis_func on this machine, against the published script and lower bounds (see benchmarks/README.md)."""

import argparse
from importlib import import_module

NAMES = ("step", "quality", "scaling", "overhead")
# Only run by name: they take long, or need packages or files that do not come with the package.
OTHERS = ("coverage", "dead", "gallery", "gpu", "models", "pictures", "hero", "retention", "sweep", "transfer")


def main() -> None:
    """Run the named benchmarks; without names, all of :data:`NAMES`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"any of {', '.join(NAMES)} (default: all four), {', '.join(OTHERS)}",
    )
    parser.add_argument("--device", default="cpu", help="device to measure on (default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="timed calls of each method in the benchmark step, at least 1 (default: %(default)s)",
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES + OTHERS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; expected one of {', '.join(NAMES + OTHERS)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    for name in arguments.names or NAMES:
        import_module(f"benchmarks.{name}").main(arguments.device, arguments.rounds)


if __name__ == "__main__":
    main()
