"""Micro-benchmarks: python -m bench [op ...] compares every pynn op with its peers on this machine."""
