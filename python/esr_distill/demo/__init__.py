"""The embedded demo: two synthetic tasks, a character tokenizer, and the tiny models that ship with the package."""
