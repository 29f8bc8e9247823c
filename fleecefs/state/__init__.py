"""What outlives a process: the state directory, and the runtime directory on tmpfs."""
