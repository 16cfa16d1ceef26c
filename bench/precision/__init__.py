"""Experiments on storage formats, in numpy."""
