"""From text to batches: sources (text in), tokens (ids on disk), packing (the plan), loader (grain)."""
