"""What a command returns to the shell, beside 0 for success."""

BAD_INPUT = 2
NOT_FINITE = 3  # a loss, a gradient or logits became NaN or infinite; the last checkpoint is from before
INTERRUPTED = 130  # 128 + SIGINT, as shells count
