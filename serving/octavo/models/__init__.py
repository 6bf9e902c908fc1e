"""L2: model configurations, families, layers and loading."""
