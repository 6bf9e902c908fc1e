"""L1: the operations a model is made of, their specification and their fast forms."""
