"""What a run's folder holds: saving, loading, what is complete and undamaged."""
