"""From text to batches: sources (text in), tokens (ids on disk, made in shards), packing (the plan), loader (grain)."""
