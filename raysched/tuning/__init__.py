"""Search over rollout settings at equal compute: proposals, early stopping, journal, verdict."""
