"""What is measured: ``python -m bench.turns``, ``bench.endpointing``, ``bench.echo``."""
