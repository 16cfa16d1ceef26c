"""What is shown and recorded while a run goes on; nothing here changes it."""
