"""The mathematics of training: loss, accumulation, optimizer, schedules, precision; pure functions."""
