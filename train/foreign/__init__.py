"""What other trainers call things: their options and configuration files -> ours."""
