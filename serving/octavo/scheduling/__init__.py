"""L1: sequences, blocks and steps as plain integers and lists. No torch."""
