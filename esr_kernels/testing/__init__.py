"""Inputs shared by tests and benchmarks. Imported by nothing in the library."""
