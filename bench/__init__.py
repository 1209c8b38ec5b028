"""What is measured: ``python -m agent bench``, and one module for each further question."""
