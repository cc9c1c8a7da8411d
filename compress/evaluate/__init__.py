"""Measuring what was lost."""
