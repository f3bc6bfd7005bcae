"""Benchmarks: `make bench`. Every ratio compares medians of rounds in which both sides took turns."""
