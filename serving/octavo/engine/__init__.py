"""L3: cache, runner, sampler and the loop that owns all sequences."""
