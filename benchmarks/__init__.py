"""Published baseline, evaluator and timings; see ``benchmarks/README.md``. Not part of the installed package."""
