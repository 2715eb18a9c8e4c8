"""What is seen of a run while it goes on: metrics and where they are written, progress, hangs, signals."""
