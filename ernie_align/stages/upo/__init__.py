"""Stage upo: rollouts, rewards and preference in one loop."""
