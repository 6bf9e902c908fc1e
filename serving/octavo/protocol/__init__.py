"""L0: what crosses a process border: wire types, validation, errors. No torch, no I/O."""
