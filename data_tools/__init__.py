"""From the files a user has to token ids with supervision masks; knows nothing of training."""
