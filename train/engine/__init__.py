"""How a decoder block is executed."""
