"""The transformer: its weights, its LoRA, and each trick that makes it smaller or faster, one a file."""
