"""Checkpoints: written, verified, chosen, continued."""
