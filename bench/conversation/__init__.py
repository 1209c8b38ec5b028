"""Conversations at the pace of the clock, with this or any other agent: ``python -m agent bench``."""
