"""The kernel's side: FUSE requests in, answers out."""
