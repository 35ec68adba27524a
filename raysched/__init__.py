"""Train diffusion and flow-matching models with rollouts, and learn whether they pay."""
