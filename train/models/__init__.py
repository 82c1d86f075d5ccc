"""The frozen base, its tokenizer, and the two with adapters as one module."""
