"""Benchmarks: programs that measure, none of them a test."""
