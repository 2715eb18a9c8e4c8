"""What the benchmarks share. `worker` needs the standard library alone, so that peers can import it anywhere."""
