"""L2: ranks of one model; the only users of torch.distributed."""
