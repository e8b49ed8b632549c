"""The CPU: the operators on NumPy arrays."""
