"""What `esr-distill check` looks at, one room for each question."""
