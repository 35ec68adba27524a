"""The mathematics: schedules, parameterization, solvers, rollouts, losses, compute."""
