"""Conversations at the pace of the clock, with any agent: ``python -m agent bench``."""
