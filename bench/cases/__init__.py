"""What is measured: each case with its inputs, work and gate."""
