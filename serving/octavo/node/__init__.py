"""L5: the parent of all server processes: starts, watches, restarts, drains and ends them; health and metrics pages."""
