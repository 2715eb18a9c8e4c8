"""What a run is made of: set-up from a configuration, batches on the devices, judging its numbers."""
