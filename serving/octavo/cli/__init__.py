"""L5: the `octavo` command. Each subcommand is a module with `add_arguments(parser)` and `run(arguments) -> int`."""
