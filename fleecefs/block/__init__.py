"""Disks, epochs and snapshots: blocking, thread-safe code without trio."""
