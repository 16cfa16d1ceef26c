"""Replies to problems with answers: drawing, scoring, statistics, comparison."""
