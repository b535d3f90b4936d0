"""Training: settings, the one loop, losses, gate monitor, checkpoints, token-loss evaluation."""
