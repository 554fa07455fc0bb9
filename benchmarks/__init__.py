"""Benchmarks: what the library costs against code written by hand, and published figures.

Run `python -m benchmarks list`, then `python -m benchmarks NAME [--quick] [--json FILE]`.
"""
