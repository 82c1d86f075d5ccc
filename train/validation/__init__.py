"""What is measured while training: the loss on held-out samples and on a general text, and a few answers."""
