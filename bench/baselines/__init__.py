"""What ours is compared with: PyTorch as one would write it, and the peers that are installed."""
