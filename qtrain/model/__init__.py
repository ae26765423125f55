"""Loading a base model in 4 or 16 bit, its LoRA adapter, and attention over packed sequences."""
