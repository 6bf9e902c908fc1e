"""L5: HTTP to gRPC; imports the protocol only."""
