"""Measurements: cases, what they are compared with, ceilings, reports. Run from the repository: python -m bench.bench_ops"""
