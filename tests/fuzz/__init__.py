"""Fuzzing: `make fuzz` runs all targets for FUZZ_SECONDS. What it finds becomes a test in `test_fuzz_findings.py`."""
