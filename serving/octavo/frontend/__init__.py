"""L4: admission, delivery and the link to the engine, inside Triton's stub process. No torch."""
