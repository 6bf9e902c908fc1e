"""8-bit number formats: scheme and checkpoint readers (L1), making checkpoints (L4)."""
