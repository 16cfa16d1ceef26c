"""What a command returns to the shell, beside 0 for success."""

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
