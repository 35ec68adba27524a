"""Ray Train: starting Ray, and running the loop in its workers."""
