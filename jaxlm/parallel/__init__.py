"""Processes, devices, the mesh, and where each array of the state lives on it."""
