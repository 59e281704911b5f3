"""Run the hallucination benchmarks that papers quote on a run's policies, each with a named protocol."""
