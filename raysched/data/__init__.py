"""Images: sources, the decoded cache, the held-out split and the batches of a step."""
