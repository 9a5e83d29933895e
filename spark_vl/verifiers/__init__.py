"""Verifiers: `(completion, record) -> Verdict`, and the pool of processes that runs them under a deadline."""
